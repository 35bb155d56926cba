"""One answer: the cache beside the naive oracle, and what must hold at every step for every policy and score."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import Cache, CacheSize
from harness import FROZEN, HEAD_DIM, SHARED, Play, Setting, as_stored, bits, settings_of_a_run
from model import ModelConfig
from oracle import paper_budget, paper_interval, paper_selects
from scope import SCORES, STRATEGIES, WHOLE_PROMPT, Policy, PromptPolicy

NOT_STREAMING = [name for name in STRATEGIES if name != "streaming"]  # whose window is half of everything


@given(settings_of_a_run())
@settings(max_examples=150)
def test_kept_positions_and_outputs_equal_the_naive_oracle(setting):
    for _ in Play(setting, with_oracle=True).run():
        pass


@given(settings_of_a_run(), st.sampled_from([0.01, 0.3, 0.6]))
@settings(max_examples=50)
def test_prompt_keys_that_lost_their_weak_channels_are_attended_to_as_in_the_oracle(setting, share):
    thin = replace(setting, prompt=replace(setting.prompt, key_channels=share))
    for _ in Play(thin, with_oracle=True).run():
        pass


@pytest.mark.parametrize("policy", SHARED)
@pytest.mark.parametrize("compress", ["h2o", "adakv"])
def test_a_window_counts_tokens_where_a_compressed_prompt_has_gaps(policy, compress):
    """A slot of the prompt that a later token has taken over has no gap any more."""
    for seed in range(12):
        heavy, recent, length = seed % 3, seed % 4, 3 + seed % 7
        rules = Policy(policy, heavy, recent, "current"), PromptPolicy(compress, 2 + seed % 3, 1)
        setting = Setting(*rules, T=9, prompts=[length], steps=9, turns=[], n_kv_heads=2, group=1, layer=0, seed=seed)
        for _ in Play(setting, with_oracle=True).run():
            pass


@given(settings_of_a_run(policies=("slide", "pyramidinfer"), compressors=("finch",)))
@settings(max_examples=50)
def test_the_question_always_stays(setting):
    """Also beside a policy that gives some layers half of its budget."""
    play = Play(setting)
    play.prefill()
    for b, h in play.pairs:
        end, question = setting.prompts[b], setting.questions[b] or setting.prompt.obs_window
        assert set(range(max(0, end - question), end)) <= set(play.live(b, h))


@given(settings_of_a_run(policies=FROZEN))
def test_prompt_slots_never_change_after_prefill(setting):
    play = Play(setting)
    n = play.layer.prompt_slots
    for t in play.run():
        prompt = [x[:, :, :n].clone() for x in (*bits(play.layer), play.layer.pos)]
        if t == 0:
            after_prefill = prompt
        assert all(torch.equal(a, b) for a, b in zip(prompt, after_prefill, strict=True))


@pytest.mark.parametrize("policy", SHARED)
def test_a_shared_pool_also_evicts_prompt_tokens(policy):
    """So the test above tells frozen policies from shared ones."""
    whole = PromptPolicy("full", 1, 1)
    play = Play(Setting(Policy(policy, 1, 1, "current"), whole, 12, [8], 12, [], 2, 1, 1, seed=0))
    for _ in play.run():
        pass
    assert all(not set(range(8)) <= set(live) for live in play.held())


@given(settings_of_a_run())
def test_a_selection_leaves_the_papers_budget_and_between_two_the_pool_grows_by_one_a_step(setting):
    play, (heavy, recent) = Play(setting), Play(setting).decode_budget()
    numbers = setting.policy.name, heavy, recent
    asked = setting.policy.interval
    interval = paper_interval(*numbers, setting.T, asked)
    for t in play.run():
        held = [len(live) for live in play.held()]
        if t == 0:
            kept = held
        budget = paper_budget(*numbers, setting.T, t)
        for n, of_prompt in zip(held, kept, strict=True):
            assert n - of_prompt <= min(t, budget + interval - 1)
            if t and paper_selects(*numbers, setting.T, t, asked):
                assert n - of_prompt == min(t, budget)


@given(settings_of_a_run(policies=NOT_STREAMING))
def test_the_last_recent_generated_tokens_are_always_held(setting):
    play = Play(setting)
    _, recent = play.decode_budget()
    for t in play.run():
        for b, h in play.pairs:
            end = setting.prompts[b] + t
            assert set(range(end - min(t, recent), end)) <= set(play.live(b, h))


@given(settings_of_a_run())
def test_the_token_of_a_step_attends_to_itself(setting):
    """Also where the budget is 0: then it is evicted in the step that writes it, but after its attention."""
    play = Play(setting)
    play.prefill()
    for t in range(1, setting.steps + 1):
        play.layer.pos.fill_(-1)  # all others are dead now: what is left is its own value
        output = play.step(t)
        for b, h in play.pairs:
            _, _, value = play.written[b][-1]
            group = output[b, h * setting.group : (h + 1) * setting.group, 0]
            torch.testing.assert_close(group, as_stored(play.layer.v, value[h]).expand_as(group))


@given(settings_of_a_run())
def test_no_position_is_held_twice_and_every_slot_holds_what_its_position_brought(setting):
    play = Play(setting)
    for _ in play.run():
        pass
    play.check_slots()


@given(settings_of_a_run())
def test_a_token_never_moves_and_each_step_writes_one_slot_per_head(setting):
    play, before = Play(setting), None
    for t in play.run():
        k = bits(play.layer)[0].clone()
        if t:
            changed = (k != before).any(-1).sum(-1)  # [B, n_kv_heads] slots
            assert (changed == 1).all()
        before = k


@given(settings_of_a_run())
@settings(max_examples=50)
def test_after_a_reset_the_cache_does_the_same_again(setting):
    play = Play(setting)
    first, again = (
        [play.prefill(), *map(play.step, range(1, setting.steps + 1)), play.layer.pos.clone()] for _ in "12"
    )
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


@given(settings_of_a_run(rows=(2, 2)))
@settings(max_examples=50)
def test_a_row_of_a_ragged_batch_keeps_what_it_keeps_alone(setting):
    together = Play(setting)
    for _ in together.run():
        pass
    for b in range(len(setting.prompts)):
        alone = Play(setting.alone(b))
        for _ in alone.run():
            pass
        assert alone.held() == [together.live(b, h) for h in range(setting.n_kv_heads)]


@given(settings_of_a_run())
def test_the_plan_alone_tells_how_many_tokens_each_step_attends_to(setting):
    """`held_of_output` looks at no slot, and it counts only what exceeds the kept prompt."""
    play, told = Play(setting), []
    for t in play.run():
        held = [len(live) for live in play.held()]
        if t == 0:
            kept = before = held
        else:  # a step attends to what was held before it and to its own token
            told = play.cache.held_of_output(t)[:, setting.layer].tolist()
            assert len(told) == t
            assert [n + 1 - of_prompt for n, of_prompt in zip(before, kept, strict=True)] == [told[-1]] * len(held)
        before = held


def test_the_cache_holds_kv_heads_and_counts_every_byte_that_it_allocates():
    config = ModelConfig(9, 64, 64, 3, n_heads=8, n_kv_heads=2, head_dim=8)
    cache = Cache(config, Policy("slide", 5, 6, "cumulative"), WHOLE_PROMPT, CacheSize(4, [64], 1000), torch.bfloat16)
    assert cache.layers[0].k.codes.shape == (4, 2, 64 + 5 + 6 + 1, 8)
    kv = 3 * 2 * (4 * 2 * 76 * 8) * 2
    pos, score, victims, number = 4 * 2 * 76 * 4, 4 * 2 * 12 * 4, 4 * 2 * 1 * 8, 8
    bookkeeping = (
        3 * (pos + score + victims + number) + 1000 * 3 * 3 * 8 + 4 * 8 + 3 * 4 * 8
    )  # and the plan, the prompts' lengths and what is kept
    assert cache.nbytes == kv + bookkeeping
    full = Cache(config, Policy("full", 5, 6, "cumulative"), WHOLE_PROMPT, CacheSize(4, [64], 1000), torch.bfloat16)
    assert full.layers[0].k.codes.shape[2] == 64 + 1000


def held_with_equal_scores(policy: Policy, T: int) -> list[str]:
    """Generated tokens, counted from 0, that are held after each step. All attention is uniform."""
    config = ModelConfig(9, 8, 8, 1, 1, 1, HEAD_DIM)
    cache, found = Cache(config, policy, WHOLE_PROMPT, CacheSize(1, [1], T), torch.float32), []
    cache.begin_prefill([1])
    nothing = torch.zeros(3, 1, 1, 1, HEAD_DIM)
    cache.prefill_attention(torch.arange(1))[0](*nothing)
    for t, (select, reads) in enumerate(cache.graph_keys, 1):
        cache.layers[0](*nothing, *cache.step_input(t, select, reads))
        found.append("".join(str(p - 1) for p in sorted(cache.layers[0].pos.flatten().tolist()) if p > 0))
    return found


def test_a_cascade_of_two_times_two_tokens():
    """Token 5 is odd, so buffer 1 does not take 3, which fell out of buffer 0: it meets 2, and the older dies."""
    held = held_with_equal_scores(Policy("cascade", heavy=2, recent=2, score="raas"), T=9)
    assert held == ["0", "01", "012", "0123", "1234", "1345", "3456", "3567", "5678"]


@pytest.mark.parametrize("score", SCORES)
def test_the_scores_disagree_where_they_should(score):
    """A token that was once looked at much and is not now: cumulative keeps it, current and others let it go."""
    config = ModelConfig(9, 8, 8, 1, 1, 1, HEAD_DIM)
    cache = Cache(config, Policy("slide", 1, 1, score), WHOLE_PROMPT, CacheSize(1, [1], 4), torch.float32)
    cache.begin_prefill([1])
    [fill] = cache.prefill_attention(torch.arange(1))
    fill(*torch.zeros(3, 1, 1, 1, HEAD_DIM))
    keys = torch.eye(HEAD_DIM) * 6
    queries = [keys[0], keys[0], keys[1]]  # looked at: the first token, the first, the second
    for t in (1, 2, 3):
        select, reads = cache.graph_keys[t - 1]
        token = (x.view(1, 1, 1, HEAD_DIM) for x in (queries[t - 1], keys[t - 1], keys[t - 1]))
        cache.layers[0](*token, *cache.step_input(t, select, reads))
    kept = {p for p in cache.layers[0].pos[0, 0].tolist() if p >= 0}
    assert kept == ({0, 1, 3} if score in ("cumulative", "own", "novel") else {0, 2, 3})
