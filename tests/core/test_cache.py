"""The cache against the naive oracle, and the invariants that hold at every step, for every policy and score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    Oracle,
    kept_of_prompt,
    layer_decode_budget,
    layer_prompt_budget,
    paper_budget,
    paper_interval,
    paper_selects,
)

from cache import Cache, Shape
from model import ModelConfig
from scope import COMPRESSORS, SCORES, STRATEGIES, WHOLE, Policy, Prompt

HEAD_DIM, N_LAYERS = 4, 3


@st.composite
def runs(draw, policies=tuple(STRATEGIES), compressors=tuple(COMPRESSORS)):
    """A policy, a compressor, a length, prompt lengths of a ragged batch, and head counts."""
    size = st.integers(0, 7)
    name, score = draw(st.sampled_from(policies)), draw(st.sampled_from(list(SCORES)))
    policy = Policy(name, draw(size), draw(size), score)
    budget = draw(st.integers(1, 10))
    prompt = Prompt(draw(st.sampled_from(compressors)), budget, draw(st.integers(1, budget)))
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=2))
    heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    layer, T, seed = draw(st.integers(0, N_LAYERS - 1)), draw(st.integers(1, 24)), draw(st.integers(0, 10**6))
    return Run(policy, prompt, T, lengths, heads, group, seed, layer)


class Run:
    """One layer of three driven by random queries, keys and values; keeps what was written, to compare with."""

    def __init__(self, policy, prompt, T, prompts, heads, group, seed, layer):
        self.policy, self.prompt, self.T, self.prompts = policy, prompt, T, prompts
        self.heads, self.group, self.seed, self.index = heads, group, seed, layer
        config = ModelConfig(9, 8, 8, N_LAYERS, heads * group, heads, HEAD_DIM)
        self.cache = Cache(config, policy, prompt, Shape(len(prompts), prompts, T), torch.float32)
        self.layer = self.cache.layers[layer]
        generator = torch.Generator().manual_seed(seed)
        self.blocks = [self.draw(max(prompts), generator), *(self.draw(1, generator) for _ in range(T))]

    def __repr__(self):
        heads = f"heads={self.heads}x{self.group}, layer={self.index}"
        return f"Run({self.policy}, {self.prompt}, T={self.T}, {self.prompts}, {heads}, seed={self.seed})"

    def draw(self, width, generator):
        heads = (self.heads * self.group, self.heads, self.heads)
        return [torch.randn(len(self.prompts), n, width, HEAD_DIM, generator=generator) * 1.5 for n in heads]

    def play(self):
        """Yields t after prefill (0) and after every step, with the attention's output."""
        self.cache.reset()
        yield 0, self.cache.fills(self.prompts)[self.index](*self.blocks[0])
        for t in range(1, self.T + 1):
            select, reads = self.cache.graph_at[t - 1]
            now = self.cache.now(t, reads)
            attends = self.cache.selects(now) if select else self.cache.appends(now)
            yield t, attends[self.index](*self.blocks[t])

    def pairs(self):
        return [(b, h) for b in range(len(self.prompts)) for h in range(self.heads)]

    def live(self, b, h):
        return sorted(p for p in self.layer.pos[b, h].tolist() if p >= 0)

    def queries(self, t, b, h, column=0):
        """Those of a KV head's group, [group, head_dim]."""
        return self.blocks[t][0][b, h * self.group : (h + 1) * self.group, column]

    def written(self, b, h, position):
        """K and V that the token at this position brought."""
        n = self.prompts[b]
        block, column = (self.blocks[0], position) if position < n else (self.blocks[position - n + 1], 0)
        return block[1][b, h, column], block[2][b, h, column]

    def oracles(self):
        """One naive twin per (row, KV head)."""
        policy, prompt, twins = self.policy, self.prompt, {}
        for b, n in enumerate(self.prompts):
            heads = [
                [(self.queries(0, b, h, p).tolist(), *(x.tolist() for x in self.written(b, h, p))) for p in range(n)]
                for h in range(self.heads)
            ]
            budget = layer_prompt_budget(prompt.compress, policy.name, prompt.budget, self.index, N_LAYERS, n)
            kept = kept_of_prompt(prompt.compress, budget, prompt.obs_window, heads)
            for h, head in enumerate(heads):
                decode = layer_decode_budget(policy.name, policy.heavy, policy.recent, self.index, N_LAYERS)
                setting = policy.name, *decode, self.T
                twins[b, h] = Oracle(setting, policy.score, head, kept[h])
        return twins


@given(runs())
@settings(max_examples=150, deadline=None)
def test_kept_positions_and_outputs_equal_the_naive_oracle(run):
    oracles = run.oracles()
    for t, output in run.play():
        for (b, h), oracle in oracles.items():
            if t:
                key, value = (x.tolist() for x in run.written(b, h, run.prompts[b] + t - 1))
                wanted = oracle.step(t, run.queries(t, b, h).tolist(), key, value)
                found = output[b, h * run.group : (h + 1) * run.group, 0]
                torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
            assert run.live(b, h) == oracle.live


FROZEN = [name for name, strategy in STRATEGIES.items() if strategy.frozen_prompt]


@given(runs(policies=FROZEN))
@settings(deadline=None)
def test_prompt_slots_are_bit_frozen_from_prefill_on(run):
    n = run.layer.prompt_slots
    for t, _ in run.play():
        frozen = [x[:, :, :n].clone() for x in (run.layer.k, run.layer.v, run.layer.pos)]
        if t == 0:
            after_prefill = frozen
        assert all(torch.equal(a, b) for a, b in zip(frozen, after_prefill, strict=True))


@given(runs(policies=[*FROZEN, "h2o"]))
@settings(deadline=None)
def test_the_decode_pool_keeps_to_its_budget(run):
    name, heavy, recent = run.policy.name, run.policy.heavy, run.policy.recent
    interval = paper_interval(name, heavy, recent, run.T)
    for t, _ in run.play():
        if t == 0:
            kept = {pair: len(run.live(*pair)) for pair in run.pairs()}
        for b, h in run.pairs():
            n, budget = len(run.live(b, h)) - kept[b, h], paper_budget(name, heavy, recent, run.T, t)
            assert n <= budget + interval - 1
            if t and paper_selects(name, heavy, recent, run.T, t):
                assert n == min(t, budget)


@given(runs(policies=[*FROZEN, "h2o"]))
@settings(deadline=None)
def test_the_last_recent_generated_tokens_are_always_live(run):
    for t, _ in run.play():
        for b, h in run.pairs():
            newest = range(run.prompts[b] + t - min(t, run.policy.recent), run.prompts[b] + t)
            assert set(newest) <= set(run.live(b, h))


@given(runs())
@settings(deadline=None)
def test_no_position_is_held_twice_and_every_slot_holds_what_its_position_brought(run):
    for _ in run.play():
        pass
    for b, h in run.pairs():
        assert len(set(run.live(b, h))) == len(run.live(b, h))
        for slot, position in enumerate(run.layer.pos[b, h].tolist()):
            if position >= 0:
                key, value = run.written(b, h, position)
                assert torch.equal(run.layer.k[b, h, slot], key)
                assert torch.equal(run.layer.v[b, h, slot], value)


@given(runs())
@settings(deadline=None)
def test_a_token_never_moves_and_each_step_writes_one_slot_per_head(run):
    before = None
    for _ in run.play():
        k = run.layer.k.clone()
        if before is not None:
            changed = (k != before).any(-1).sum(-1)  # [B, n_kv_heads] slots
            assert (changed == 1).all()
        before = k


@given(runs())
@settings(deadline=None)
def test_after_reset_the_cache_does_the_same_again(run):
    first = [(output.clone(), run.layer.pos.clone()) for _, output in run.play()]
    again = [(output.clone(), run.layer.pos.clone()) for _, output in run.play()]
    assert all(torch.equal(x, y) for one, two in zip(first, again, strict=True) for x, y in zip(one, two, strict=True))


@given(runs())
@settings(deadline=None)
def test_a_row_of_a_ragged_batch_keeps_what_it_keeps_alone(run):
    for _ in run.play():
        pass
    for b, length in enumerate(run.prompts):
        alone = Run(run.policy, run.prompt, run.T, [length], run.heads, run.group, run.seed, run.index)
        alone.blocks = [[x[b : b + 1, :, : length if t == 0 else 1] for x in run.blocks[t]] for t in range(run.T + 1)]
        for _ in alone.play():
            pass
        assert all(alone.live(0, h) == run.live(b, h) for h in range(run.heads))


def test_the_cache_holds_kv_heads_and_counts_every_byte_that_it_allocates():
    config = ModelConfig(9, 64, 64, 3, n_heads=8, n_kv_heads=2, head_dim=8)
    cache = Cache(config, Policy("slide", 5, 6, "cumulative"), WHOLE, Shape(4, [64], 1000), torch.bfloat16)
    assert cache.layers[0].k.shape == (4, 2, 64 + 5 + 6 + 1, 8)
    kv = 3 * 2 * (4 * 2 * 76 * 8) * 2
    pos, score, victims = 4 * 2 * 76 * 4, 4 * 2 * 12 * 4, 4 * 2 * 1 * 8
    bookkeeping = (
        3 * (pos + score + victims) + 1000 * 3 * 3 * 8 + 4 * 8 + 3 * 4 * 8
    )  # and the plan, the prompts' lengths and what is kept
    assert cache.nbytes == kv + bookkeeping
    full = Cache(config, Policy("full", 5, 6, "cumulative"), WHOLE, Shape(4, [64], 1000), torch.bfloat16)
    assert full.layers[0].k.shape[2] == 64 + 1000


@pytest.mark.parametrize("score", SCORES)
def test_the_scores_disagree_where_they_should(score):
    """A token that was once looked at much and is not now: cumulative keeps it, current lets it go."""
    config = ModelConfig(9, 8, 8, 1, 1, 1, HEAD_DIM)
    cache = Cache(config, Policy("slide", 1, 1, score), WHOLE, Shape(1, [1], 4), torch.float32)
    [fill] = cache.fills([1])
    fill(*torch.zeros(3, 1, 1, 1, HEAD_DIM))
    keys = torch.eye(HEAD_DIM) * 6
    queries = [keys[0], keys[0], keys[1]]  # looked at: the first token, the first, the second
    for t in (1, 2, 3):
        select, reads = cache.graph_at[t - 1]
        now = cache.now(t, reads)
        [attend] = cache.selects(now) if select else cache.appends(now)
        attend(*(x.view(1, 1, 1, HEAD_DIM) for x in (queries[t - 1], keys[t - 1], keys[t - 1])))
    kept = {p for p in cache.layers[0].pos[0, 0].tolist() if p >= 0}
    assert kept == {"cumulative": {0, 1, 3}, "current": {0, 2, 3}, "own": {0, 1, 3}}[score]
