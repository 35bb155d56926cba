"""Each kernel beside its slow twin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from scope import FORMATS, Format

scores = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 1e-30, 0.25, 0.5, 1.0, 3.0])
rows = st.lists(st.tuples(scores, st.booleans()), min_size=3, max_size=12)


@given(rows, st.randoms(), st.integers(1, 3))
def test_lowest_takes_the_lowest_scores_and_of_equal_ones_the_older(row, random, count):
    order = list(range(len(row)))
    random.shuffle(order)
    score, evictable = (torch.tensor([column]) for column in zip(*row, strict=True))
    pos = torch.tensor([order], dtype=torch.int32)
    ranked = sorted((s, p, slot) for slot, ((s, ok), p) in enumerate(zip(row, order, strict=True)) if ok)
    wanted = [slot for _, _, slot in ranked][:count]
    found = kernels.lowest(score[None], pos[None], evictable[None], count)
    assert found[0, 0, : len(wanted)].tolist() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 8, 16, 24])
def test_lowest_is_right_in_the_code_for_4_bit_formats_too(n):
    """A compiler takes the minimum of so few int64 wrongly, see `lowest`."""
    compiled = torch.compile(kernels.lowest, dynamic=False, options=kernels.compiler_options(bits=4, head_dim=64))
    score, pos = torch.rand(1, 1, n), torch.randperm(n, dtype=torch.int32)[None, None]
    wanted = score.argmin(-1, keepdim=True)
    assert torch.equal(compiled(score, pos, torch.ones_like(pos, dtype=torch.bool), 1), wanted)


def order_of(score, pos):
    """What rank_key must sort by. Minus zero equals zero."""
    return score + 0.0, pos


@given(st.lists(st.tuples(scores, st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_key_sorts_by_score_and_then_by_position(tokens):
    score, pos = torch.tensor([s for s, _ in tokens]), torch.tensor([p for _, p in tokens], dtype=torch.int32)
    keys = kernels.rank_key(score, pos).tolist()
    for one, key in zip(tokens, keys, strict=True):
        for other, other_key in zip(tokens, keys, strict=True):
            assert (key < other_key) == (order_of(*one) < order_of(*other))
            assert (key == other_key) == (order_of(*one) == order_of(*other))


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_ranks_count_from_the_largest_and_among_equals_from_the_first(row):
    found = kernels.ranks(torch.tensor(row)).tolist()
    assert found == [sum(x > mine or x == mine and j < i for j, x in enumerate(row)) for i, mine in enumerate(row)]


@given(st.data())
def test_highest_keeps_each_heads_floor_and_then_the_best_of_the_row(data):
    H, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    length = data.draw(st.integers(1, S))
    budget = data.draw(st.integers(1, length))
    floor = data.draw(st.integers(0, budget))
    score = [data.draw(st.lists(scores, min_size=S, max_size=S)) for _ in range(H)]
    one_row = [torch.tensor([n]) for n in (length, budget, floor)]
    found = kernels.highest(torch.tensor([score]), *one_row, length)[0].tolist()
    ranked = [sorted(range(length), key=lambda p, row=row: order_of(row[p], p), reverse=True) for row in score]
    kept = [order[:floor] for order in ranked]
    # The competition ranks by score and position; where these are equal too, the earlier head wins.
    rest = [(order_of(score[h][p], p), -h) for h, order in enumerate(ranked) for p in order[floor:]]
    for (_, p), minus_h in sorted(rest, reverse=True)[: H * (budget - floor)]:
        kept[-minus_h].append(p)
    assert found == [sorted(positions) + [-1] * (length - len(positions)) for positions in kept]


def test_attention_from_all_queries_is_attention_from_the_last_n_of_n():
    q, k, lengths = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8), torch.tensor([9, 5])
    received = kernels.received_attention(q, k, lengths)
    torch.testing.assert_close(kernels.received_from_last(q, k, lengths, torch.tensor([9, 9])), received)
    torch.testing.assert_close(received.sum(-1), lengths[:, None].float().expand(2, 3))


def test_each_row_asks_with_its_own_number_of_last_queries():
    q, k, lengths, last = torch.randn(3, 4, 9, 8), torch.randn(3, 2, 9, 8), torch.tensor([9, 7, 2]), [2, 5, 4]
    received = kernels.received_from_last(q, k, lengths, torch.tensor(last))
    torch.testing.assert_close(received.sum(-1), torch.tensor([2.0, 5, 2])[:, None].expand(3, 2))
    for row, n in enumerate(last):
        one = slice(row, row + 1)
        alone = kernels.received_from_last(q[one], k[one], lengths[one], torch.tensor([n]))
        torch.testing.assert_close(received[one], alone)


def test_a_channel_that_no_query_of_the_window_uses_goes_first_and_changes_no_logit():
    """Queries (3, 0, 1) and (4, 0, 1), keys with the sums of squares 0.1, 9, 5: the strengths are 2.5, 0 and 10."""
    q = torch.tensor([[9.0, 9, 9], [9, 9, 9], [3, 0, 1], [4, 0, 1]])[None, None]
    k = torch.tensor([[0.1**0.5, 3, 1], [0, 0, 2], [0, 0, 0], [0, 0, 0]])[None, None]
    whole, two, one = (
        kernels.zero_weak_channels(q, k, torch.arange(4)[None, None], torch.tensor([4]), torch.tensor([2]), share)
        for share in (1.0, 0.6, 0.3)
    )
    assert torch.equal(whole, k)
    assert torch.equal(two, k * torch.tensor([1, 0, 1])) and torch.equal(one, k * torch.tensor([0, 0, 1]))
    assert torch.equal(q[:, :, 2:] @ two.mT, q[:, :, 2:] @ k.mT)


def test_keys_in_the_window_keep_all_channels_and_tokens_that_went_do_not_count():
    q, k, pos = torch.ones(1, 2, 4, 2), torch.tensor([[1.0, 2], [50, 1], [1, 2]])[None, None], [0, -1, 3]
    thin = kernels.zero_weak_channels(q, k, torch.tensor([[pos]]), torch.tensor([4]), torch.tensor([1]), 0.5)
    assert thin[0, 0, [0, 2]].tolist() == [[0, 2], [1, 2]], "the key of 50 is no token's: channel 1 is the stronger one"


def test_write_slots_writes_only_the_named_slot_of_each_head():
    buffer = torch.zeros(2, 3, 5, 4)
    slots = torch.tensor([[[0], [4], [2]], [[1], [1], [3]]])
    values = torch.randn(2, 3, 1, 4)
    kernels.write_slots(buffer, slots, values)
    for b in range(2):
        for h in range(3):
            assert torch.equal(buffer[b, h, slots[b, h, 0]], values[b, h, 0])
    assert (buffer != 0).any(-1).sum() == 6


def test_attend_slots_equals_sdpa_over_the_live_slots():
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8)
    live = torch.rand(2, 3, 11) > 0.4
    live[:, :, 0] = True
    y, (prob,) = kernels.attend_slots(q, kernels.Part(kernels.Stored(k), kernels.Stored(v), live))
    mask = live.repeat_interleave(2, 1)[:, :, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(prob.sum(-1), torch.ones(2, 3))
    assert (prob[~live] == 0).all()


def fused(kernel, *inputs):
    """What the kernel computes inside a CPU graph: there it is written as sums that compile into one pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fuses", lambda x: True)
        return kernel(*inputs)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_a_linear_layer_in_a_graph_equals_the_library(rows, n_out, n_in, with_bias):
    x, weight = torch.randn(rows, 1, n_in), torch.randn(n_out, n_in)
    bias = torch.randn(n_out) if with_bias else None
    torch.testing.assert_close(fused(kernels.linear, x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 8, 48, 64, 80]))
def test_attend_slots_in_a_graph_equals_itself_outside(batch, group, head_dim):
    q, k, v = (torch.randn(batch, heads, n, head_dim) for heads, n in ((2 * group, 1), (2, 7), (2, 7)))
    live = torch.rand(batch, 2, 7) > 0.4
    live[:, :, 0] = True
    inputs = q, kernels.Part(kernels.Stored(k), kernels.Stored(v), live)
    torch.testing.assert_close(fused(kernels.attend_slots, *inputs), kernels.attend_slots(*inputs))


def test_attend_block_equals_sdpa_over_the_live_slots_that_are_no_newer():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8)
    pos = torch.stack([torch.randperm(11) for _ in range(6)]).view(2, 3, 11)
    pos[pos == 4] = -1
    query_positions = torch.tensor([[1, 2, 3, 5, 9], [0, 6, 7, 8, 10]])
    y, received = kernels.attend_block(q, k, v, pos, query_positions)
    seen = (pos[:, :, None] >= 0) & (pos[:, :, None] <= query_positions[:, None, :, None])
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen.repeat_interleave(2, 1), enable_gqa=True
    )
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(received.sum(-1), torch.full((2, 3), 5.0))
    assert (received[~seen.any(2)] == 0).all()


@pytest.mark.parametrize("block_scores", [1, 100, 500])
def test_the_size_of_a_block_of_scores_changes_nothing(monkeypatch, block_scores):
    q, k, v, lengths = torch.randn(2, 6, 17, 8), torch.randn(2, 3, 17, 8), torch.randn(2, 3, 17, 8), [17, 9]
    pos, query_positions = torch.arange(17).expand(2, 3, 17), torch.arange(17).expand(2, 17)

    def compute():
        received = kernels.received_attention(q, k, torch.tensor(lengths))
        from_last = kernels.received_from_last(q, k, torch.tensor(lengths), torch.tensor([9, 4]))
        return received, from_last, *kernels.attend_block(q, k, v, pos, query_positions)

    in_one_block = compute()
    monkeypatch.setattr(kernels, "BLOCK_SCORES", block_scores)
    torch.testing.assert_close(compute(), in_one_block)


# ---- storage formats

STORED = [*FORMATS.values(), (Format(8, group=2, rotated=True), Format(4, group=2, minimum=True, rotated=True))]
every_format = pytest.mark.parametrize("format", sorted({each for pair in STORED for each in pair}, key=str))


def stored(x, format):
    """x [..., head_dim], of any shape with 4 dimensions or fewer."""
    x = x[(None,) * (4 - x.dim())]
    return kernels.encode(x, format.bits, format.n_groups(x.shape[-1]), format.minimum, format.rotated)


def codes(x):
    """The codes of one token by channel, whatever words they lie in."""
    return [int(number) for j in range(32 // x.bits) for number in kernels.code(x, j).flatten()]


def test_the_hand_examples_of_8_and_4_bits():
    key = stored(torch.tensor([63.5, -32, 16, 0.5]), Format(8))
    assert codes(key) == [127, -64, 32, 1] and key.scale.item() == 0.5
    assert key.codes.view(torch.uint8).flatten().tolist() == [127, 256 - 64, 32, 1]
    assert kernels.dot(torch.tensor([1.0, 0, 0, 2])[None, None, None], key).item() == 64.5
    value = stored(torch.tensor([-1, 0, 2, 6.5, 6.5, 2, 0, -1]), Format(4, minimum=True))
    assert codes(value) == [0, 2, 6, 15, 15, 6, 2, 0] and (value.scale.item(), value.low.item()) == (0.5, -1)
    assert value.codes.view(torch.int32).item() == 0x026FF620, "the first channel in the lowest bits"
    assert kernels.decode(value, torch.float32).flatten().tolist() == [-1, 0, 2, 6.5, 6.5, 2, 0, -1]


@given(st.integers(0, 10**6), st.sampled_from([8, 64, 80, 96]))
def test_a_rotation_keeps_products_and_undoes_itself(seed, head_dim):
    q, k = torch.randn(2, 5, head_dim, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close((kernels.rotate(q) * kernels.rotate(k)).sum(-1), (q * k).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kernels.rotate(kernels.rotate(q)), q)
    assert kernels.rotate(torch.tensor([[8.0, 0, 0, 0], [1, 2, 3, 4]])).tolist() == [[4, 4, 4, 4], [5, -1, -2, 0]]


def test_a_word_holds_channels_that_lie_n_words_apart():
    x = stored(torch.arange(64.0) - 20, Format(8))
    word = x.codes.view(torch.int8).view(16, 4)[3]
    assert word.tolist() == [codes(x)[channel] for channel in (3, 19, 35, 51)]


@every_format
@given(st.integers(0, 10**6), st.sampled_from([8, 32, 64, 80, 96, 128]), st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
def test_what_is_stored_differs_by_half_a_scale_at_most(format, seed, head_dim, size):
    x = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(seed)) * size
    found = stored(x, format)
    back = kernels.decode(found, torch.float32)
    if found.scale is None:
        assert torch.equal(back, x)
    else:
        scale = found.scale.unflatten(1, (-1, 3)).movedim(1, -1)  # [2, 3, 5, n_groups]
        most = scale.repeat_interleave(head_dim // scale.shape[-1], -1) / 2
        x, back = (kernels.rotate(each) if format.rotated else each for each in (x, back))
        assert ((back - x).abs() <= most * 1.0001 + 1e-6 * size).all()


@pytest.mark.parametrize("formats", STORED, ids=str)
@given(st.integers(1, 2), st.integers(1, 3), st.sampled_from([8, 64, 96]))
def test_attention_over_what_is_stored_equals_attention_over_a_decoded_copy(formats, batch, group, head_dim):
    """In a graph the scales are folded into the products; outside, a copy is made."""
    q, k, v = (torch.randn(batch, heads, n, head_dim) for heads, n in ((2 * group, 1), (2, 7), (2, 7)))
    live = torch.rand(batch, 2, 7) > 0.4
    live[:, :, 0] = True
    k, v = (stored(x, format) for x, format in zip((k, v), formats, strict=True))
    copies = (kernels.Stored(kernels.decode(x, torch.float32)) for x in (k, v))
    wanted = kernels.attend_slots(q, kernels.Part(*copies, live))
    torch.testing.assert_close(fused(kernels.attend_slots, q, kernels.Part(k, v, live)), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kernels.attend_slots(q, kernels.Part(k, v, live)), wanted, atol=1e-5, rtol=1e-4)


BYTES = {"model": (512, 256, 128), "int8": (260, 132, 68), "k8v4": (198, 102, 54), "int4": (160, 80, 40)}


@pytest.mark.parametrize("name", FORMATS)
def test_the_bytes_of_a_token_are_those_of_the_table(name):
    """K and V of one token and KV head in bf16, for head_dim 128, 64 and 32: codes, scales and minima."""
    for head_dim, wanted in zip((128, 64, 32), BYTES[name], strict=True):
        parts = [stored(torch.zeros(head_dim, dtype=torch.bfloat16), format).tensors for format in FORMATS[name]]
        assert sum(part.nbytes for tensors in parts for part in tensors) == wanted


def test_a_head_that_a_format_cannot_divide_is_refused():
    with pytest.raises(ValueError, match="head_dim is 12: it must be a multiple of 8"):
        Format(4, group=32).n_groups(12)
    with pytest.raises(ValueError, match="head_dim is 6: it must be a multiple of 4"):
        Format(8).n_groups(6)
    assert Format().n_groups(5) == 1
    assert [Format(4, group=32).n_groups(head_dim) for head_dim in (32, 64, 80, 96, 128, 256)] == [1, 2, 2, 2, 4, 8]


# ---- noise that any run repeats


def test_noise_is_spread_evenly_and_no_number_tells_of_the_next():
    u = kernels.uniform(torch.arange(40_000))
    assert u.min() > 0 and (u.log() < 0).all()
    assert (u.sort().values - torch.linspace(0, 1, 40_000)).abs().max() < 0.01
    for lag in (1, 2, 8, 64, 4096):
        assert abs(torch.corrcoef(torch.stack((u[:-lag], u[lag:])))[0, 1]) < 0.02


def test_gaussian_noise_is_normal_and_another_for_each_seed():
    G = kernels.gaussian(torch.arange(6).view(3, 2), 64, 20)
    assert G.shape == (3, 2, 64, 20)
    assert abs(G.mean()) < 0.03 and abs(G.std() - 1) < 0.03 and abs((G**4).mean() - 3) < 0.3
    one, two = G.flatten(2)[0]
    assert abs(torch.corrcoef(torch.stack((one, two)))[0, 1]) < 0.1


def test_the_highest_after_division_by_exponential_noise_are_a_sample_by_score():
    """Scores 3, 2, 1: the first place goes to them in 3, 2 and 1 of 6 cases. The second, after the 3 (half of all
    cases), goes to the 2 in 2 of 3."""
    pos = torch.arange(60_000, dtype=torch.int32).view(1, 1, -1, 3)
    worth = torch.tensor([3.0, 2.0, 1.0]) / kernels.exponential(pos.long()).view(-1, 3)
    order = worth.argsort(descending=True)
    for token, share in enumerate((3 / 6, 2 / 6, 1 / 6)):
        assert abs((order[:, 0] == token).float().mean() - share) < 0.01
    assert abs(((order[:, 0] == 0) & (order[:, 1] == 1)).float().mean() - 1 / 3) < 0.01


def test_each_head_draws_numbers_of_its_own_and_each_row_the_same():
    pos = torch.arange(9, dtype=torch.int32).expand(2, 3, 9)
    noise = kernels.exponential(kernels.token_numbers(pos, 0, 3))
    assert torch.equal(noise[0], noise[1]) and noise[0].unique().numel() == 27
    last = kernels.exponential(kernels.token_numbers(pos[:, 2:], 2, 3))  # where this head lies in a process of its own
    assert torch.equal(last, noise[:, 2:])
