"""Schedules: what each policy does to the decode pool, known before anything is computed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle import paper_budget, paper_interval, paper_selects
from scope import SCORES, STRATEGIES, Policy, PromptPolicy, gently_linear, linear, schedule

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
    ],
)
def test_impossible_prompt_policies_are_refused_by_name(compress, budget, obs_window, complaint):
    with pytest.raises(ValueError, match=complaint):
        PromptPolicy(compress, budget, obs_window)
