"""Turns and requests over one context: the cache beside the oracle, and what a conversation may not change."""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generate import READ_EVERY, Conversation, Options, generate
from harness import FROZEN, SHARED, Play, assert_same_state, bits, settings_of_a_conversation, visible_state
from scope import STRATEGIES

every_policy = pytest.mark.parametrize("policy", STRATEGIES)
every_frozen_policy = pytest.mark.parametrize("policy", FROZEN)


# ---- the cache: random queries, keys and values


@given(settings_of_a_conversation())
@settings(max_examples=150)
def test_every_turn_keeps_and_attends_to_what_the_naive_oracle_does(setting):
    for _ in Play(setting, with_oracle=True).run_turns():
        pass


@given(settings_of_a_conversation(), st.booleans(), st.integers(0, 12))
@settings(max_examples=60)
def test_after_a_rewind_all_goes_on_as_the_naive_oracle_does(setting, later, broken_off):
    """The snapshot is taken before the first or the second answer. That answer is broken off; then all turns follow,
    and follow once more."""
    play, steps, turns = Play(setting, with_oracle=True), setting.steps, list(setting.turns)
    play.prefill()
    if later:
        play.answer(steps)
        play.read(turns[0].reads)
        steps = turns.pop(0).steps
    snapshot = play.snapshot()
    for t in range(1, min(broken_off, setting.T) + 1):
        play.step(t)
    play.rewind(snapshot)
    for _ in range(2):
        play.answer(steps)
        for turn in turns:
            play.read(turn.reads)
            play.answer(turn.steps)
        play.rewind(snapshot)


@given(settings_of_a_conversation(policies=FROZEN))
def test_a_turn_never_changes_an_older_frozen_slot(setting):
    play, older = Play(setting), []
    for _ in play.run_turns():
        for n, before in older:
            now = [x[:, :, :n] for x in (*bits(play.layer), play.layer.pos)]
            assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
        n = play.cache.used[setting.layer]
        older.append((n, [x[:, :, :n].clone() for x in (*bits(play.layer), play.layer.pos)]))


@given(settings_of_a_conversation())
def test_in_every_turn_a_slot_holds_what_its_position_brought_and_no_position_is_held_twice(setting):
    play = Play(setting)
    for _ in play.run_turns():
        play.check_slots()


@given(settings_of_a_conversation(policies=FROZEN), st.booleans())
def test_a_frozen_prompt_rewinds_to_the_state_of_the_snapshot_bit_for_bit(setting, ended):
    play = Play(setting)
    play.prefill()
    before, snapshot = visible_state(play.cache), play.snapshot()
    for turn in setting.turns:
        play.read(turn.reads)
        if ended:
            play.answer(turn.steps)
    if not ended:  # in the middle of an answer
        for t in range(1, setting.turns[-1].steps + 1):
            play.step(t)
    play.rewind(snapshot)
    assert_same_state(visible_state(play.cache), before)


@given(settings_of_a_conversation())
def test_where_nothing_was_evicted_every_policy_rewinds_bit_for_bit(setting):
    play = Play(setting)
    play.prefill()
    before, snapshot = visible_state(play.cache), play.snapshot()
    for turn in setting.turns:
        play.read(turn.reads)
        play.rewind(snapshot)
        assert_same_state(visible_state(play.cache), before)


@given(settings_of_a_conversation(policies=SHARED))
def test_a_shared_pool_rewinds_to_what_is_left_of_the_snapshot(setting):
    play = Play(setting)
    play.prefill()
    before, snapshot = [set(live) for live in play.held()], play.snapshot()
    for turn in setting.turns:
        play.read(turn.reads)
        play.answer(turn.steps)
    left = [sorted(set(live) & old) for live, old in zip(play.held(), before, strict=True)]
    play.rewind(snapshot)
    assert play.held() == left
    assert play.cache.kept[setting.layer].tolist() == [sum(map(len, left)) // setting.n_kv_heads]


@given(settings_of_a_conversation(), st.integers(0, 3))
def test_tokens_that_a_device_ran_ahead_to_do_not_stay(setting, ahead):
    play, ahead = Play(setting), min(ahead, setting.steps)
    for _ in play.run():
        pass
    end = setting.prompts[0] + setting.steps - ahead
    held = [[p for p in live if p < end] for live in play.held()]
    play.settle(setting.steps, ahead)
    assert play.cache.position == end
    assert play.held() == held


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
    fresh = [request(converse(tiny, policy, **changes), ids) for ids in TURNS]
    conversation = converse(tiny, policy, **changes)
    shared = conversation.mark()
    for ids, wanted in zip(TURNS * 2, fresh * 2, strict=True):
        assert request(conversation, ids) == wanted
        conversation.rewind(shared)


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


def stopping_at(tiny, stop):
    """The model, with a tokenizer whose only stop token is this one."""
    model, tokenizer = tiny
    return model, replace(tokenizer, stop_ids=[stop])


@every_policy
def test_how_often_the_host_reads_changes_no_answer(tiny, monkeypatch, policy):
    """On a GPU a batch runs steps beyond its stop tokens; a conversation would lose tokens to them."""
    stopping, found = stopping_at(tiny, request(converse(tiny, policy), TURNS[0])[9]), []
    for every in (1, 8):
        monkeypatch.setitem(READ_EVERY, "cpu", every)
        conversation = converse(stopping, policy, ignore_eos=False)
        found.append([request(conversation, ids) for ids in TURNS])
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
    time.sleep(0.2)
    started = time.perf_counter()
    decode_s = conversation.answer().stats.decode_s
    assert decode_s <= time.perf_counter() - started


def test_a_conversation_takes_options_too(tiny):
    options = Options(policy="slide", **RUN)
    by_name, by_options = converse(tiny, "slide", seed=2), Conversation(*tiny, CONTEXT, options, seed=2)
    assert [request(by_options, ids) for ids in TURNS] == [request(by_name, ids) for ids in TURNS]
    assert by_options.options == by_name.options == replace(options, seed=2)


def test_a_conversation_declares_all_of_its_state_when_it_is_made(tiny):
    conversation = converse(tiny, "discontinuous")
    declared = set(vars(conversation)), set(vars(conversation.engine))
    question = conversation.mark()
    conversation.answer()
    request(conversation, TURNS[0])
    conversation.rewind(question)
    conversation.answer()
    assert (set(vars(conversation)), set(vars(conversation.engine))) == declared


def test_small_budgets_change_the_second_answer(tiny):
    answers = {}
    for policy in ("full", "slide"):
        conversation = converse(tiny, policy, heavy=1, recent=1)
        answers[policy] = [request(conversation, ids) for ids in TURNS][1:]
    assert answers["full"] != answers["slide"]


def test_a_stop_token_is_read_once_with_the_next_turn(tiny):
    free = request(converse(tiny, "full"), TURNS[0])
    stopping = stopping_at(tiny, free[5])
    conversation = converse(stopping, "full", ignore_eos=False)
    answer = request(conversation, TURNS[0])
    second = request(conversation, TURNS[1])
    ids = CONTEXT + TURNS[0] + answer + TURNS[1]
    [whole] = generate(*stopping, [ids], "full", **RUN | {"ignore_eos": False})
    assert answer == free[: free.index(free[5]) + 1]
    assert second == whole.token_ids


def test_running_out_of_room_is_said_before_anything_is_computed(tiny):
    conversation = converse(tiny, "full", max_context=52)
    request(conversation, TURNS[0])
    before = visible_state(conversation.engine.cache)
    with pytest.raises(ValueError, match="turn 1 needs 41 slots, 22 of max_context 52 are left: raise --max-context"):
        conversation.read([1] * 40)  # and the last token of the answer
    assert_same_state(visible_state(conversation.engine.cache), before)
    fresh = converse(tiny, "full")
    request(fresh, TURNS[0])
    assert request(conversation, TURNS[1]) == request(fresh, TURNS[1])


def test_a_mark_that_has_no_room_for_the_answer_before_it_is_refused(tiny):
    conversation = converse(tiny, "full", max_context=20, max_new_tokens=60)
    conversation.answer()
    before = visible_state(conversation.engine.cache)
    with pytest.raises(ValueError, match="of max_context 20 are left"):
        conversation.mark()
    assert_same_state(visible_state(conversation.engine.cache), before)


def test_a_snapshot_after_the_one_that_was_rewound_to_is_gone(tiny):
    conversation = converse(tiny, "slide")
    early = conversation.mark()
    conversation.read([1])
    late = conversation.mark()
    conversation.rewind(late)
    conversation.rewind(early)
    with pytest.raises(ValueError, match="this snapshot is gone"):
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
