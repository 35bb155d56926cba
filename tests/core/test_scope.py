"""Schedules: what each policy does to the decode pool, known before anything is computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import paper_budget, paper_interval, paper_selects
from scope import COMPRESSORS, SCORES, STRATEGIES, Policy, PromptPolicy, as_measured, gently_linear, linear, schedule

sizes = st.integers(0, 24)
scores, intervals = st.sampled_from(list(SCORES)), st.sampled_from([0, 0, 1, 2, 5, 30])
every_step = [name for name, strategy in STRATEGIES.items() if strategy.candidates]  # one token dies in each
others = [name for name in STRATEGIES if name not in every_step]
policies = st.builds(Policy, st.sampled_from(others), sizes, sizes, scores, intervals)
policies |= st.builds(Policy, st.sampled_from(every_step), sizes, sizes, scores)
limited = policies.filter(lambda policy: policy.name != "full")
lengths = st.integers(1, 80)


def numbers(policy):
    return policy.name, policy.heavy, policy.recent


def live_after(plan, t):
    """Generated tokens alive after step t."""
    return t - sum(step.evict for step in plan.steps[:t])


@given(policies, lengths)
def test_a_selection_leaves_exactly_the_papers_budget(policy, T):
    plan = schedule(policy, T)
    for t in range(1, T + 1):
        if paper_selects(*numbers(policy), T, t, policy.interval):
            assert live_after(plan, t) == min(t, paper_budget(*numbers(policy), T, t))


@given(limited, lengths)
def test_between_selections_the_pool_stays_below_budget_plus_interval(policy, T):
    plan, interval = schedule(policy, T), paper_interval(*numbers(policy), T, policy.interval)
    for t in range(1, T + 1):
        budget = paper_budget(*numbers(policy), T, t)
        assert live_after(plan, t) <= budget + interval - 1


@given(policies, lengths)
def test_no_step_selects_where_the_paper_does_not(policy, T):
    for t, step in enumerate(schedule(policy, T).steps, 1):
        assert not step.evict or paper_selects(*numbers(policy), T, t, policy.interval)


@given(policies, lengths)
def test_there_are_as_many_slots_as_tokens_are_ever_held_at_a_time(policy, T):
    plan = schedule(policy, T)
    assert plan.n_slots == max(live_after(plan, t) + plan.steps[t - 1].evict for t in range(1, T + 1))
    assert plan.max_evict == max(step.evict for step in plan.steps)


@given(limited, lengths)
def test_the_slots_do_not_grow_with_the_output(policy, T):
    interval = paper_interval(*numbers(policy), T, policy.interval)
    assert schedule(policy, T).n_slots <= min(T, policy.heavy + policy.recent + interval)


@given(policies, lengths)
def test_every_write_goes_to_a_victim_of_the_last_selection_or_to_the_next_fresh_slot(policy, T):
    plan = schedule(policy, T)
    free, fresh = [], 0
    for step in plan.steps:
        if free:
            assert step.reuse == free.pop(0)
        else:
            assert (step.reuse, step.fresh) == (-1, fresh)
            fresh += 1
        if step.evict:
            assert not free, "victims of the selection before were never overwritten"
            free = list(range(step.evict))


@given(policies, lengths)
def test_a_budget_of_the_whole_output_never_evicts(policy, T):
    roomy = Policy(policy.name, T, T, policy.score)
    assert not any(step.evict for step in schedule(roomy, T).steps)


def test_the_papers_example_peaks_three_percent_over_its_budget():
    """256 + 256 and T = 4096: an interval of 15, so at most 14 tokens above the budget between selections."""
    policy = Policy("discontinuous", 256, 256, "cumulative")
    plan = schedule(policy, 4096)
    assert policy.strategy.interval(policy, 4096) == 15
    assert max(live_after(plan, t) for t in range(1, 4097)) <= 512 + 14
    assert plan.n_slots <= 512 + 15
    assert live_after(plan, 4096) == 512


def test_an_interval_selects_every_so_many_steps_and_peaks_at_budget_plus_interval_minus_one():
    """3 + 2 tokens, every 4 steps, counted from step 2: 5 stay after steps 6, 10 and 14, and 8 before them."""
    plan = schedule(Policy("slide", 3, 2, "cumulative", interval=4), 16)
    assert [t for t, step in enumerate(plan.steps, 1) if step.evict] == [6, 10, 14]
    assert [live_after(plan, t) for t in (5, 6, 9, 10, 13, 14)] == [5, 5, 8, 5, 8, 5]
    assert (plan.n_slots, plan.max_evict) == (9, 4)  # step 10 writes its token before it selects


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "full"])
@pytest.mark.parametrize(("heavy", "recent"), [(0, 0), (0, 5), (5, 0), (100, 100)])
def test_extreme_budgets_are_legal(name, heavy, recent):
    plan = schedule(Policy(name, heavy, recent, "cumulative"), 20)
    assert live_after(plan, 20) == min(20, heavy + recent)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(2, 12), st.sampled_from([linear, gently_linear]))
def test_a_linear_spread_falls_with_the_layers_and_keeps_the_mean(budget, most, n_layers, spread):
    shares = [spread(budget, layer, n_layers, most) for layer in range(n_layers)]
    assert shares == sorted(shares, reverse=True)
    assert all(0 <= share <= most for share in shares)
    assert abs(sum(shares) / n_layers - min(budget, most)) <= 0.5


@given(st.integers(1, 200), st.integers(1, 200), st.lists(st.integers(1, 99), min_size=1, max_size=12))
def test_measured_shares_keep_the_total_and_give_more_to_those_that_need_more(budget, most, weights):
    shares = tuple(len(weights) * weight / sum(weights) for weight in weights)
    found = [as_measured(shares, budget, layer, len(shares), most) for layer in range(len(shares))]
    assert sum(found) == len(found) * min(budget, most)
    assert all(0 <= tokens <= most for tokens in found)
    for one, tokens in zip(shares, found, strict=True):
        assert all(tokens >= others - 1 for other, others in zip(shares, found, strict=True) if one >= other)


def test_equal_layers_share_evenly_and_a_layer_that_is_full_leaves_its_rest_to_the_others():
    assert [as_measured((1.0,) * 5, 7, layer, 5, 100) for layer in range(5)] == [7] * 5
    assert [as_measured((2, 0.5, 0.5), 4, layer, 3, 100) for layer in range(3)] == [8, 2, 2]
    assert [as_measured((2, 0.5, 0.5), 4, layer, 3, 6) for layer in range(3)] == [6, 3, 3]


def test_shares_of_another_model_are_refused():
    with pytest.raises(ValueError, match="layer_shares is for 2 layers: it must be for the 3 of the model"):
        as_measured((1.0, 1.0), 4, 0, 3, 9)


def ranking(compress, attention, window=1):
    """The prompt tokens by a compressor's score, the best first. attention: a row for each query, causal."""
    n = len(attention)
    logits = torch.tensor(attention).log().clamp(min=-99) * n**0.5  # kernels divide by the root of head_dim
    score = COMPRESSORS[compress].score(
        logits[None, None], torch.eye(n)[None, None], torch.tensor([n]), torch.tensor([window])
    )
    return score[0, 0].argsort(descending=True).tolist()


def test_the_sum_of_attention_favours_early_tokens_and_the_mean_does_not():
    """1.8, 0.7 and 0.5 are received, from 3, 2 and 1 queries: 0.6, 0.35 and 0.5 from each that sees the token."""
    attention = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.3, 0.2, 0.5]]
    assert ranking("h2o", attention) == [0, 1, 2]
    assert ranking("h2o-mean", attention) == [0, 2, 1]


def test_only_the_question_chooses_in_finch_and_without_neighbours():
    attention = [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.6, 0.2, 0], [0.3, 0.4, 0.1, 0.2]]
    assert ranking("finch", attention, window=1) == [1, 0, 3, 2]
    assert ranking("finch", attention, window=2) == [1, 0, 2, 3]
    assert ranking("finch", attention, window=4) == ranking("h2o", attention) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "heavy", "recent", "score", "complaint"),
    [
        ("slid", 1, 1, "current", "unknown policy 'slid': choose from full, slide"),
        ("slide", -1, 1, "current", "heavy is -1"),
        ("slide", 1, -2, "current", "recent is -2"),
        ("slide", 1, 1, "best", "unknown score 'best': choose from cumulative, current"),
    ],
)
def test_impossible_policies_are_refused_by_name(name, heavy, recent, score, complaint):
    with pytest.raises(ValueError, match=complaint):
        Policy(name, heavy, recent, score)


def test_an_impossible_interval_is_refused():
    with pytest.raises(ValueError, match=r"interval is -1: it must be 0 \(the policy's own\) or more"):
        Policy("slide", 1, 1, "current", interval=-1)
    with pytest.raises(ValueError, match="interval is 2: it must be 0 or 1: cascade evicts a token in every step"):
        Policy("cascade", 1, 1, "current", interval=2)


@pytest.mark.parametrize(
    ("compress", "budget", "obs_window", "complaint"),
    [
        ("zip", 4, 2, "unknown compressor 'zip': choose from full, h2o"),
        ("snapkv", 0, 1, "prompt_budget is 0: it must be 1 token or more"),
        ("snapkv", 4, 0, "obs_window is 0: it must be 1 to 4 tokens"),
        ("snapkv", 4, 5, "obs_window is 5: it must be 1 to 4 tokens"),
        ("prefixkv", 4, 2, "layer_shares is not given: it must be the file that benchmarks/calibrate.py writes"),
    ],
)
def test_impossible_prompt_policies_are_refused_by_name(compress, budget, obs_window, complaint):
    with pytest.raises(ValueError, match=complaint):
        PromptPolicy(compress, budget, obs_window)
