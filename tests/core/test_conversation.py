"""Turns and requests over one context: the cache against the oracle, and what a conversation may not change."""

import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, kept_of_prompt, layer_decode_budget, layer_prompt_budget

from cache import Cache, Shape
from generate import READ_EVERY, Conversation, generate
from model import ModelConfig
from scope import COMPRESSORS, SCORES, STRATEGIES, Policy, Prompt

HEAD_DIM, N_LAYERS, HEADS, GROUP = 4, 3, 2, 2
FROZEN = [name for name, strategy in STRATEGIES.items() if strategy.frozen_prompt]
SHARED = [name for name in STRATEGIES if name not in FROZEN]
every_policy = pytest.mark.parametrize("policy", STRATEGIES)
every_frozen_policy = pytest.mark.parametrize("policy", FROZEN)


# ---- the cache: three layers, random queries, keys and values; one of the layers is looked at


@dataclass
class Turn:
    """Tokens read, then decode steps."""

    reads: int
    steps: int


@st.composite
def talks(draw, policies=tuple(STRATEGIES)):
    T = draw(st.integers(1, 12))
    turns = st.lists(st.builds(Turn, st.integers(1, 5), st.integers(0, T)), min_size=2, max_size=4)
    policy = Policy(
        draw(st.sampled_from(policies)),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 4)),
        draw(st.sampled_from([*SCORES])),
    )
    budget = draw(st.integers(1, 10))
    prompt = Prompt(draw(st.sampled_from([*COMPRESSORS])), budget, draw(st.integers(1, budget)))
    return Talk(policy, prompt, T, draw(turns), draw(st.integers(0, N_LAYERS - 1)), draw(st.integers(0, 10**6)))


class Talk:
    def __init__(self, policy, prompt, T, turns, layer, seed):
        self.policy, self.prompt, self.T, self.turns, self.index, self.seed = policy, prompt, T, turns, layer, seed
        self.generator = torch.Generator().manual_seed(seed)
        config = ModelConfig(9, 8, 8, N_LAYERS, HEADS * GROUP, HEADS, HEAD_DIM)
        room = sum(turn.reads + turn.steps for turn in turns[1:]) + turns[0].steps
        self.cache = Cache(config, policy, prompt, Shape(1, [turns[0].reads], T, turns[0].reads + room), torch.float32)
        self.layer = self.cache.layers[layer]
        self.brought = []  # K and V of every position, in order

    def __repr__(self):
        return f"Talk({self.policy}, {self.prompt}, T={self.T}, {self.turns}, layer={self.index}, seed={self.seed})"

    def draw(self, n):
        """q, k, v of n tokens."""
        return [torch.randn(1, heads, n, HEAD_DIM, generator=self.generator) for heads in (HEADS * GROUP, HEADS, HEADS)]

    def read(self, first, n):
        q, k, v = self.draw(n)
        del self.brought[self.cache.position :]
        self.brought += zip(k[0].unbind(1), v[0].unbind(1), strict=True)
        attends = self.cache.fills([n]) if first else self.cache.joins(n)[1]
        outputs = [attend(q, k, v) for attend in attends]
        if not first:
            self.cache.count()
        return (q, k, v), outputs[self.index]

    def decode(self, t):
        select, reads = self.cache.graph_at[t - 1]
        now = self.cache.now(t, reads)
        q, k, v = self.draw(1)
        self.brought.append((k[0, :, 0], v[0, :, 0]))
        attends = self.cache.selects(now) if select else self.cache.appends(now)
        return (q, k, v), [attend(q, k, v) for attend in attends][self.index]

    def answer(self, steps):
        for t in range(1, steps + 1):
            self.decode(t)
        self.cache.settle(steps, self.cache.position + steps)

    def live(self, h):
        return sorted(p for p in self.layer.pos[0, h].tolist() if p >= 0)

    def tokens(self, block, h):
        """(queries of the group, key, value) of each token of a block, for one KV head."""
        q, k, v = (x[0].transpose(0, 1).tolist() for x in block)  # [n][heads][head_dim]
        return [(q[i][h * GROUP : (h + 1) * GROUP], k[i][h], v[i][h]) for i in range(len(q))]

    def oracles(self, block):
        name, budget = self.policy.name, self.prompt.budget
        heads = [self.tokens(block, h) for h in range(HEADS)]
        budget = layer_prompt_budget(self.prompt.compress, name, budget, self.index, N_LAYERS, len(heads[0]))
        kept = kept_of_prompt(self.prompt.compress, budget, self.prompt.obs_window, heads)
        decode = layer_decode_budget(name, self.policy.heavy, self.policy.recent, self.index, N_LAYERS)
        return [Oracle((name, *decode, self.T), self.policy.score, heads[h], kept[h]) for h in range(HEADS)]


def assert_same(output, wanted, h):
    """output [1, H * G, n, d]; wanted [n][G][d] of KV head h."""
    found = output[0, h * GROUP : (h + 1) * GROUP].transpose(0, 1)
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-4)


@given(talks())
@settings(max_examples=150, deadline=None)
def test_every_turn_keeps_and_attends_to_what_the_naive_oracle_does(talk):
    for number, turn in enumerate(talk.turns):
        position = talk.cache.position
        block, output = talk.read(number == 0, turn.reads)
        if number == 0:
            oracles = talk.oracles(block)
        for h, oracle in enumerate(oracles):
            if number:
                assert_same(output, oracle.read(position, talk.tokens(block, h)), h)
            assert talk.live(h) == oracle.live
        for t in range(1, turn.steps + 1):
            block, output = talk.decode(t)
            for h, oracle in enumerate(oracles):
                [token] = talk.tokens(block, h)
                assert_same(output, [oracle.step(t, *token)], h)
                assert talk.live(h) == oracle.live
        talk.cache.settle(turn.steps, talk.cache.position + turn.steps)
        assert [talk.live(h) for h in range(HEADS)] == [oracle.live for oracle in oracles]


@given(talks(policies=FROZEN))
@settings(deadline=None)
def test_a_turn_never_changes_an_older_frozen_slot(talk):
    older = []
    for number, turn in enumerate(talk.turns):
        talk.read(number == 0, turn.reads)
        talk.answer(turn.steps)
        for n, snapshot in older:
            assert all(
                torch.equal(a[:, :, :n], b)
                for a, b in zip((talk.layer.k, talk.layer.v, talk.layer.pos), snapshot, strict=True)
            )
        n = talk.cache.used[talk.index]
        older.append((n, [x[:, :, :n].clone() for x in (talk.layer.k, talk.layer.v, talk.layer.pos)]))


@given(talks())
@settings(deadline=None)
def test_in_every_turn_a_slot_holds_what_its_position_brought_and_no_position_is_held_twice(talk):
    for number, turn in enumerate(talk.turns):
        talk.read(number == 0, turn.reads)
        talk.answer(turn.steps)
        for h in range(HEADS):
            live = (talk.layer.pos[0, h] >= 0).nonzero().flatten().tolist()
            positions = [int(talk.layer.pos[0, h, slot]) for slot in live]
            assert len(set(positions)) == len(positions)
            for slot, position in zip(live, positions, strict=True):
                key, value = talk.brought[position]
                assert torch.equal(talk.layer.k[0, h, slot], key[h]) and torch.equal(talk.layer.v[0, h, slot], value[h])


def state(cache):
    """All that a later step can see."""
    held = [layer.pos.clone() for layer in cache.layers]
    live = [pos[..., None] >= 0 for pos in held]
    pairs = [(layer.k * alive, layer.v * alive) for layer, alive in zip(cache.layers, live, strict=True)]
    position, used, kept, _ = cache.mark()
    scores = [layer.score * (layer.pos >= 0) for layer in cache.layers if layer.ranks_prompt]
    return [*held, *(x for pair in pairs for x in pair), *scores, cache.lengths.clone(), kept], (position, used)


def assert_same_state(one, other):
    assert one[1] == other[1] and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


@given(talks(policies=FROZEN), st.booleans())
@settings(deadline=None)
def test_after_rewind_the_state_is_that_of_the_mark_bit_for_bit(talk, ended):
    first, *others = talk.turns
    talk.read(True, first.reads)
    before, mark = state(talk.cache), talk.cache.mark()
    for turn in others:
        talk.read(False, turn.reads)
        if ended:
            talk.answer(turn.steps)
    if not ended:  # in the middle of an answer
        for t in range(1, others[-1].steps + 1):
            talk.decode(t)
    talk.cache.rewind(mark)
    assert_same_state(state(talk.cache), before)


@given(talks())
@settings(deadline=None)
def test_where_nothing_was_evicted_every_policy_rewinds_bit_for_bit(talk):
    talk.read(True, talk.turns[0].reads)
    before, mark = state(talk.cache), talk.cache.mark()
    for turn in talk.turns[1:]:
        talk.read(False, turn.reads)
        talk.cache.rewind(mark)
        assert_same_state(state(talk.cache), before)


@given(talks(policies=SHARED))
@settings(deadline=None)
def test_a_shared_pool_rewinds_to_what_is_left_of_the_mark(talk):
    first, *others = talk.turns
    talk.read(True, first.reads)
    before, mark = [set(talk.live(h)) for h in range(HEADS)], talk.cache.mark()
    for turn in others:
        talk.read(False, turn.reads)
        talk.answer(turn.steps)
    left = [set(talk.live(h)) & before[h] for h in range(HEADS)]
    talk.cache.rewind(mark)
    assert [set(talk.live(h)) for h in range(HEADS)] == left
    assert talk.cache.kept[talk.index].tolist() == [sum(map(len, left)) // HEADS]


@given(talks(), st.integers(0, 3))
@settings(deadline=None)
def test_tokens_that_a_device_ran_ahead_to_do_not_stay(talk, ahead):
    talk.read(True, talk.turns[0].reads)
    steps = talk.turns[0].steps
    end = talk.cache.position + max(0, steps - ahead)
    for t in range(1, steps + 1):
        talk.decode(t)
    talk.cache.settle(steps, end)
    assert talk.cache.position == end
    assert all(max(talk.live(h), default=-1) < end for h in range(HEADS))


# ---- the engine: a tiny model

CONTEXT = [5, 9, 200, 31, 44, 250, 17, 8, 90, 12, 77, 3]
TURNS = [[101, 44, 3], [7], [250, 250, 17, 9]]
RUN = {"heavy": 3, "recent": 4, "max_new_tokens": 16, "compile": False, "ignore_eos": True, "max_context": 120}
HOT = {"temperature": 1.5, "seed": 3}
SNAPKV = {"compress": "snapkv", "prompt_budget": 6, "obs_window": 2}


def converse(tiny, policy, **changes):
    return Conversation(*tiny, CONTEXT, policy, **RUN | changes)


def request(conversation, ids):
    conversation.read(ids)
    return conversation.answer().token_ids


def test_under_full_turns_equal_one_long_run(tiny):
    conversation, ids = converse(tiny, "full"), CONTEXT
    for turn in TURNS:
        ids = ids + turn
        answer = request(conversation, turn)
        [whole] = generate(*tiny, [ids], "full", **RUN)
        assert answer == whole.token_ids
        ids = ids + answer


@every_policy
def test_the_answer_to_the_context_is_that_of_a_plain_run(tiny, policy):
    [plain] = generate(*tiny, [CONTEXT], policy, **RUN | SNAPKV)
    assert converse(tiny, policy, **SNAPKV).answer().token_ids == plain.token_ids


@every_frozen_policy
@pytest.mark.parametrize("changes", [{}, HOT, SNAPKV])
def test_a_request_after_rewind_equals_one_over_a_fresh_context(tiny, policy, changes):
    conversation = converse(tiny, policy, **changes)
    shared = conversation.mark()
    for ids in TURNS * 2:
        answer = request(conversation, ids)
        conversation.rewind(shared)
        assert answer == request(converse(tiny, policy, **changes), ids)


@every_frozen_policy
@pytest.mark.parametrize("changes", [{}, HOT])
def test_an_answer_after_rewind_is_the_same_answer(tiny, policy, changes):
    conversation = converse(tiny, policy, **changes)
    for ids in TURNS:  # turns stay, only the answer is taken back
        conversation.read(ids)
        question = conversation.mark()
        answer = conversation.answer()
        request(conversation, [1, 2])
        conversation.rewind(question)
        again = conversation.answer()
        assert replace(again, stats=None) == replace(answer, stats=None)
        assert again.stats.live_peak == answer.stats.live_peak and again.stats.prefill_s == 0


@every_policy
def test_a_turn_depends_on_the_turns_before_it(tiny, policy):
    one, two = converse(tiny, policy), converse(tiny, policy)
    request(one, TURNS[0])
    request(two, TURNS[2])
    assert request(one, TURNS[1]) != request(two, TURNS[1])


@every_policy
def test_two_conversations_in_one_process_do_not_touch_each_other(tiny, policy):
    alone = converse(tiny, policy)
    wanted = [request(alone, ids) for ids in TURNS]
    one, two = converse(tiny, policy), Conversation(*tiny, [8, 8, 8], "slide", **RUN)
    found = []
    for ids in TURNS:
        found.append(request(one, ids))
        request(two, ids[::-1])
    assert found == wanted


@every_policy
def test_how_often_the_host_reads_changes_no_answer(tiny, monkeypatch, policy):
    """On a GPU a batch runs steps beyond its stop tokens; a conversation would lose tokens to them."""
    model, tokenizer = tiny
    tokenizer.stop_ids, before = [request(converse(tiny, policy), TURNS[0])[9]], tokenizer.stop_ids
    try:
        found = []
        for every in (1, 8):
            monkeypatch.setitem(READ_EVERY, "cpu", every)
            conversation = converse(tiny, policy, ignore_eos=False)
            found.append([request(conversation, ids) for ids in TURNS])
    finally:
        tokenizer.stop_ids = before
    assert found[0] == found[1] and len(found[0][0]) < 16


@every_policy
def test_an_interrupted_answer_leaves_nothing_behind(tiny, policy):
    class Interrupted(Exception):
        pass

    def interrupt(cache):
        seen.append(cache)
        if len(seen) == 3:
            raise Interrupted

    conversation, seen = converse(tiny, policy, heavy=30), []
    conversation.read(TURNS[0])
    question = conversation.mark()
    with pytest.raises(Interrupted):
        conversation.answer(on_step=interrupt)
    with pytest.raises(ValueError, match="nothing to answer"):
        conversation.answer()
    conversation.rewind(question)
    assert conversation.answer().token_ids == request(converse(tiny, policy, heavy=30), TURNS[0])


def test_time_between_reading_and_answering_is_no_decode_time(tiny):
    conversation = converse(tiny, "slide")
    time.sleep(0.5)
    assert conversation.answer().stats.decode_s < 0.5


def test_small_budgets_change_the_second_answer(tiny):
    answers = {}
    for policy in ("full", "slide"):
        conversation = converse(tiny, policy, heavy=1, recent=1)
        answers[policy] = [request(conversation, ids) for ids in TURNS][1:]
    assert answers["full"] != answers["slide"]


def test_a_stop_token_is_read_once_with_the_next_turn(tiny):
    model, tokenizer = tiny
    free = request(converse(tiny, "full"), TURNS[0])
    tokenizer.stop_ids, before = [free[5]], tokenizer.stop_ids
    try:
        conversation = converse(tiny, "full", ignore_eos=False)
        answer = request(conversation, TURNS[0])
        second = request(conversation, TURNS[1])
        [whole] = generate(
            model, tokenizer, [CONTEXT + TURNS[0] + answer + TURNS[1]], "full", **RUN | {"ignore_eos": False}
        )
    finally:
        tokenizer.stop_ids = before
    assert answer == free[: free.index(free[5]) + 1]
    assert second == whole.token_ids


def test_running_out_of_room_is_said_before_anything_is_computed(tiny):
    conversation = converse(tiny, "full", max_context=52)
    request(conversation, TURNS[0])
    before = state(conversation.engine.cache)
    with pytest.raises(ValueError, match="turn 1 needs 41 slots, 22 of max_context 52 are left: raise --max-context"):
        conversation.read([1] * 40)  # and the last token of the answer
    assert_same_state(state(conversation.engine.cache), before)
    fresh = converse(tiny, "full")
    request(fresh, TURNS[0])
    assert request(conversation, TURNS[1]) == request(fresh, TURNS[1])


def test_a_mark_that_has_no_room_for_the_answer_before_it_is_refused(tiny):
    conversation = converse(tiny, "full", max_context=20, max_new_tokens=60)
    conversation.answer()
    before = state(conversation.engine.cache)
    with pytest.raises(ValueError, match="of max_context 20 are left"):
        conversation.mark()
    assert_same_state(state(conversation.engine.cache), before)


def test_a_moment_after_the_one_that_was_rewound_to_is_forgotten(tiny):
    conversation = converse(tiny, "slide")
    early = conversation.mark()
    conversation.read([1])
    late = conversation.mark()
    conversation.rewind(late)
    conversation.rewind(early)
    with pytest.raises(ValueError, match="forgotten"):
        conversation.rewind(late)
    with pytest.raises(ValueError, match="another conversation's"):
        converse(tiny, "slide").rewind(early)


def test_a_context_beyond_max_context_is_refused(tiny):
    with pytest.raises(ValueError, match="a prompt of 12 tokens needs 12 slots, max_context is 11"):
        converse(tiny, "slide", max_context=11)
    with pytest.raises(ValueError, match="max_context is 513: it must be at most the model's 512 positions"):
        converse(tiny, "slide", max_context=513)
    compressed = converse(tiny, "slide", max_context=11, **SNAPKV)
    assert request(compressed, TURNS[1]) == request(converse(tiny, "slide", **SNAPKV), TURNS[1])


def test_a_conversation_ends_where_the_models_positions_do(tiny):
    conversation = converse(tiny, "slide", max_context=512)
    request(conversation, [1] * 400)
    with pytest.raises(ValueError, match="512 positions"):
        conversation.read([1] * 80)


def test_what_cannot_be_read_or_answered_is_refused(tiny):
    conversation = converse(tiny, "slide")
    conversation.answer()
    with pytest.raises(ValueError, match="nothing to answer"):
        conversation.answer()
    with pytest.raises(ValueError, match="turn 1 is empty"):
        conversation.read([])
    with pytest.raises(ValueError, match="token id 999"):
        conversation.read([999])


def test_a_turn_reports_what_it_read_and_what_it_cost(tiny):
    conversation = converse(tiny, "slide")
    results = []
    for ids in TURNS:
        conversation.read(ids)
        results.append(conversation.answer())
    assert [result.prompt_len for result in results] == [3, 1 + 1, 1 + 4]  # and the last token of the answer before
    assert [result.index for result in results] == [0, 1, 2]
    live = [result.stats.live_peak for result in results]
    assert live == [12 + 3 + 8, 15 + 7 + 2 + 8, 24 + 7 + 5 + 8]  # frozen, + heavy + recent + the one being written


@pytest.mark.slow
def test_no_turn_and_no_rewind_recompiles(shallow):
    eager = converse(shallow, "discontinuous", **HOT)
    wanted = [request(eager, ids) for ids in TURNS]
    conversation = converse(shallow, "discontinuous", compile=True, **HOT)
    context = conversation.mark()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [request(conversation, ids) for ids in TURNS] == wanted
        conversation.rewind(context)
        assert request(conversation, TURNS[0]) == wanted[0]
        conversation.rewind(context)
        assert conversation.answer().token_ids == converse(shallow, "discontinuous", **HOT).answer().token_ids
