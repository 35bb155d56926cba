"""Many answers to one prompt: it is stored once, each answer has its own pool, and none of that changes a token."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

import kernels
from cache import Cache, CacheSize
from generate import Conversation, Engine, Options, generate, size_of
from harness import FROZEN, SHARED
from model import ModelConfig
from scope import COMPRESSORS, FORMATS, SCORES, WHOLE_PROMPT, Policy

PROMPTS = [[5, 9, 200, 31], [7], [101, 44, 3, 250, 250, 17, 8, 90, 12]]
RUN = {"heavy": 3, "recent": 4, "max_new_tokens": 24, "compile": False, "ignore_eos": True}
RUN |= {"temperature": 1.2, "top_k": 8}  # of many tokens, two could be so near that rounding decides between them
SNAPKV = {"compress": "snapkv", "prompt_budget": 5, "obs_window": 2}


def answers(tiny, policy="slide", **changes):
    """(prompt, sample) -> its tokens."""
    results = generate(*tiny, PROMPTS, policy, **RUN | changes)
    return {(result.index, result.sample): result.token_ids for result in results}


def assert_each_sample_is_a_run_with_the_next_seed(tiny, n, seed=0, **changes):
    found = answers(tiny, samples=n, seed=seed, **changes)
    assert list(found) == [(i, s) for i in range(len(PROMPTS)) for s in range(n)]  # prompt by prompt
    for s in range(n):
        alone = answers(tiny, seed=seed + s, **changes)
        assert {i: found[i, s] for i in range(len(PROMPTS))} == {i: ids for (i, _), ids in alone.items()}
    assert len({tuple(ids) for ids in found.values()}) > 1


# ---- the tokens


@pytest.mark.parametrize("policy", FROZEN)
def test_sample_2_has_the_tokens_of_a_run_with_the_seed_after_the_next(tiny, policy):
    assert_each_sample_is_a_run_with_the_next_seed(tiny, 3, policy=policy)


@pytest.mark.parametrize("score", [name for name in SCORES if name != "cumulative"])
def test_so_it_is_with_every_score(tiny, score):
    assert_each_sample_is_a_run_with_the_next_seed(tiny, 2, score=score)


@pytest.mark.parametrize("compress", [name for name, row in COMPRESSORS.items() if row.score and not row.measured])
def test_so_it_is_with_every_compressor(tiny, compress):
    assert_each_sample_is_a_run_with_the_next_seed(tiny, 2, seed=7, **SNAPKV | {"compress": compress})


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 2}, {"max_context": 200}, {"interval": 3}])
def test_so_it_is_in_batches_that_end_early_and_with_slots_that_stay_empty(tiny, changes):
    assert_each_sample_is_a_run_with_the_next_seed(tiny, 3, seed=2**63 - 3, **changes)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_so_it_is_in_every_format(tiny, kv_format):
    assert_each_sample_is_a_run_with_the_next_seed(tiny, 2, kv_format=kv_format)


def test_text_comes_under_the_number_of_its_answer(tiny):
    pieces = {}
    run = RUN | {"samples": 2}
    results = list(
        generate(*tiny, PROMPTS, "slide", on_text=lambda n, text: pieces.update({n: pieces.get(n, "") + text}), **run)
    )
    assert [pieces.get(i, "") for i in range(2 * len(PROMPTS))] == [result.text for result in results]


def test_a_trace_shows_the_shared_prompt_in_the_row_of_each_answer(tiny):
    shared, copies = [], []
    for frames, prompts, changes in ((shared, PROMPTS[2:], {"samples": 3}), (copies, PROMPTS[2:] * 3, {})):
        list(generate(*tiny, prompts, "slide", on_step=lambda c, to=frames: to.append(c.positions()), **RUN | changes))
    assert len(shared) == RUN["max_new_tokens"]
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(shared, copies, strict=True))  # the same seed and index
    assert all(a.shape == b.shape for a, b in zip(shared, copies, strict=True))


# ---- the attention


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from([(1, 1), (2, 1), (2, 3)]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.booleans(),
)
def test_one_softmax_over_a_shared_and_an_own_part_equals_one_over_copies(rows, heads, slots, in_graph):
    (prompts, n), (H, G), D = rows, heads, 32

    def part(batch, n_slots):
        live = torch.rand(batch, H, n_slots) > 0.3
        live[:, :, 0] = True
        return kernels.Part(*(kernels.Stored(torch.randn(batch, H, n_slots, D)) for _ in "kv"), live)

    def repeated(x):
        return x.repeat_interleave(n, 0)

    q, shared, own = torch.randn(prompts * n, H * G, 1, D), part(prompts, slots[0]), part(prompts * n, slots[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fuses", lambda x: in_graph)
        y, probs = kernels.attend_slots(q, shared, own)
        copies = [
            kernels.Stored(torch.cat((repeated(a.codes), b.codes), 2)) for a, b in zip(shared[:2], own[:2], strict=True)
        ]
        wanted, [prob] = kernels.attend_slots(q, kernels.Part(*copies, torch.cat((repeated(shared.live), own.live), 2)))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(torch.cat(probs, 2), prob)


def test_more_queries_than_one_loop_serves_give_the_same_attention():
    """8 answers of 3 query heads: the matrix library multiplies them with the prompt."""
    prompt = kernels.Part(*(kernels.Stored(torch.randn(1, 2, 11, 32)) for _ in "kv"), torch.rand(1, 2, 11) > 0.3)
    q = torch.randn(8, 6, 1, 32)
    assert not kernels.folds(torch.empty(1, 2, kernels.MOST_SUMS + 1, 32), prompt.k)
    y, [prob] = kernels.attend_slots(q, prompt)
    for row in range(8):
        alone, [of_row] = kernels.attend_slots(q[row : row + 1], prompt)
        torch.testing.assert_close(y[row], alone[0])
        torch.testing.assert_close(prob[row], of_row[0])


# ---- the memory


@pytest.mark.parametrize("policy", FROZEN)
def test_the_memory_is_one_prompt_and_n_pools(policy):
    config = ModelConfig(9, 16, 16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8)

    def nbytes(batch, samples):
        size = CacheSize(batch, [640], T=100, samples=samples)
        return Cache(config, Policy(policy, 5, 6, "cumulative"), WHOLE_PROMPT, size, torch.bfloat16).nbytes

    prompt = 2 * 2 * 640 * (2 * 8 * 2 + 4)  # layers, heads, slots; K and V of 8 channels, and pos
    prompt += 8 + 2 * 8  # its length, and how much of it each layer keeps
    pool = nbytes(8, 2) - nbytes(6, 2) - prompt  # of two answers
    assert nbytes(4, 4) - nbytes(2, 2) == pool
    assert nbytes(4, 1) - nbytes(4, 4) == 3 * prompt


def test_a_run_reports_less_memory_than_copies_take(tiny):
    shared, copies = (
        next(iter(generate(*tiny, prompts, "slide", **RUN | changes))).stats
        for prompts, changes in ((PROMPTS[:1], {"samples": 4}), (PROMPTS[:1] * 4, {}))
    )
    assert shared.kv_bytes < copies.kv_bytes and shared.kv_bytes_full == copies.kv_bytes_full
    assert (shared.prompt_slots, shared.decode_slots) == (copies.prompt_slots, copies.decode_slots)


# ---- the compiled graphs


def engine_for(model, **changes):
    options = Options(**RUN | {"policy": "slide", "samples": 4} | changes)
    return Engine(model, options, [], size_of(PROMPTS[:1], options))


def run_steps(engine):
    first = engine.prefill(PROMPTS[:1], [0])
    return [first.tolist()] + [engine.decode(t).tolist() for t in range(1, engine.options.max_new_tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"samples": 12}, {"kv_format": "int8"}])
def test_compiled_samples_equal_eager_ones(wide, changes):
    eager, engine = run_steps(engine_for(wide, **changes)), engine_for(wide, compile=True, **changes)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert run_steps(engine) == eager


@pytest.mark.slow
@pytest.mark.parametrize(("kv_format", "bits"), [("model", 16), ("int8", 8)])
def test_no_graph_holds_a_copy_of_the_prompt(wide, kv_format, bits):
    engine = engine_for(wide, max_context=512, kv_format=kv_format)
    how = kernels.compiler_options(bits, head_dim=64)
    engine.decode_step = torch.compile(engine.decode_step, fullgraph=True, dynamic=False, options=how)
    for key in sorted(set(engine.cache.graph_keys)):
        engine.reset()
        _, [code] = run_and_get_code(engine.decode, 1, key)
        found = re.findall(r"empty_strided_cpu\(\((.*?)\)", code)
        sizes = [torch.Size(map(int, re.findall(r"\d+", size))).numel() for size in found]
        assert sizes and max(sizes) < engine.cache.layers[0].shared.k.codes.numel()


# ---- what is refused


@pytest.mark.parametrize("policy", SHARED)
def test_policies_that_evict_the_prompt_are_refused(policy):
    with pytest.raises(ValueError, match="samples is 2: it must be 1 where answers evict the prompt: choose a policy"):
        Options(policy=policy, samples=2, temperature=1)


def test_what_makes_no_sense_with_samples_is_refused(tiny):
    with pytest.raises(ValueError, match="samples is 0: it must be 1 or more"):
        Options(samples=0)
    with pytest.raises(ValueError, match="samples is 2: it must be 1 without a temperature: all answers would be the"):
        Options(samples=2)
    with pytest.raises(ValueError, match="samples is 2: it must be 1 in a conversation"):
        Conversation(*tiny, PROMPTS[0], "slide", **RUN | {"samples": 2})
