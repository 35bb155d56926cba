"""The worked examples in the docstrings: their numbers hold, and the docstrings still say them."""

import numpy as np
import pytest
import torch

import kernels
import scope
from cache import Cache, CacheSize, round_up
from generate import Options
from model import ModelConfig
from scope import FULL, Policy, PromptPolicy


def says(documented, text: str) -> bool:
    return text in " ".join(documented.__doc__.split())


def test_growing():
    assert says(scope.growing, "heavy 6, recent 4, T 16: the budget is 4 at step 4, 7 at step 10, 10 at step 16.")
    policy = Policy("adaptive", heavy=6, recent=4, score="cumulative")
    assert [scope.growing(policy, 16, t) for t in (4, 10, 16)] == [4, 7, 10]


def test_linear():
    assert says(scope.linear, "Budget 100, 4 layers: 195, 132, 68, 5. With `most` = 150, layer 0 gets 150")
    assert [scope.linear(100, layer, 4, most=1000) for layer in range(4)] == [195, 132, 68, 5]
    capped = [scope.linear(100, layer, 4, most=150) for layer in range(4)]
    assert capped[0] == 150 and sum(capped) == 400  # the slope is less steep, the mean is the same


def run_score(update, **tensors) -> list[float]:
    """What a score function makes of three tokens of one head; what is not given is 0."""
    given = {name: torch.zeros(1, 1, 3) for name in ("score", "prob")} | {"age": torch.tensor([[[3, 2, 1]]])}
    given |= {name: torch.ones(1, 1, 3, 2) for name in "kv"}
    return update(**given | {name: torch.tensor([[x]]) for name, x in tensors.items()})[0, 0].tolist()


def test_keydiff():
    assert says(kernels.cosine_to_mean, "(1, 0), (1, 0), (0, 1): the mean direction is (2/3, 1/3), and the cosines are")
    keys = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert run_score(scope.keydiff, k=keys) == pytest.approx([-0.894, -0.894, -0.447])
    dead = [[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0]]  # the last: age 0
    assert run_score(scope.keydiff, k=dead, age=[2, 1, 0]) == pytest.approx([-0.707, -0.707, 0.707])


def test_gap():
    assert says(
        kernels.gap, "Tokens (1, 0), (3, 0) and (2, 6), a the first two, b all: the means are (2, 0) and (2, 2),"
    )
    assert says(kernels.gap, "squared distance is 4, the variance is 26 / 3, and the gap is 0.46.")
    x = torch.tensor([[[[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]]]])
    a, b = torch.tensor([[[True, True, False]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    assert kernels.gap(x, a, b).item() == pytest.approx(4 / (26 / 3), rel=1e-4)
    assert kernels.gap(torch.full_like(x, 0.1), a, b).item() < 1e-6, "equal tokens have no gap"


def test_novel():
    """Positions 0, 60 and 64: the oldest is among the newest 64 or not, and never one of the nine around 60."""
    keys, values = [[9.0, 9.0], [0.0, 2.0], [0.0, 0.0]], [[8.0, 8.0], [0.0, 0.0], [6.0, 8.0]]
    given = {"k": keys, "v": values, "score": [0.5, 0.25, 0.0], "prob": [0.125, 0.125, 0.5]}
    without = run_score(scope.novel, age=[66, 6, 2], **given)
    assert without == [0.625, 0.375, 0.5], "no token is 5 steps old: the sum of attention"
    for age, newest in (65, [1, 2]), (60, [0, 1, 2]):
        key, value = (np.array(x)[newest] for x in (keys, values))
        variances = [((x - x.mean(0)) ** 2).sum(1).mean() for x in (key, value)]
        around = ([3, 4] - value.mean(0)) @ ([3, 4] - value.mean(0)) / variances[1]
        alone = ((keys[1] - key.mean(0)) ** 2).sum() / variances[0] * (value.mean(0) ** 2).sum() / variances[1]
        found = run_score(scope.novel, age=[age, 5, 1], **given)
        assert found == pytest.approx([0.625, 0.375 + 25 * around**2 * alone, 0.5], rel=1e-3)


def test_vase(monkeypatch):
    """With the identity in place of noise: |k|^2 |v|^2."""
    monkeypatch.setattr(kernels, "gaussian", lambda seed, rows, columns: torch.eye(rows)[None, None])
    keys, values = [[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [2.0, 2.0], [5.0, 5.0]]
    assert run_score(scope.vase, k=keys, v=values) == [25, 8, 0]


def test_vase_draws_anew_at_each_step_and_the_same_for_equal_pools():
    keys = torch.randn(3, 2).tolist()
    first, again, later = (run_score(scope.vase, k=keys, age=age) for age in ([3, 2, 1], [3, 2, 1], [4, 3, 2]))
    assert first == again != later


def test_raas():
    scores = [scope.raas(torch.zeros(3), torch.tensor([0.2, 0.05, 0.05]), None, None, None, enough=0.1)]
    scores += [scope.raas(scores[0], torch.tensor([0.05, 0.2, 0.05]), None, None, None, enough=0.1)]
    assert [score.tolist() for score in scores] == [[0, -1, -1], [-1, 0, -2]]


def test_gkv():
    """What was received 128 steps ago counts 0.8 of it."""
    score = torch.tensor([0.5])
    for _ in range(128):
        score = scope.gkv(score, torch.tensor([0.1]), None, None, None)
    assert score.item() == pytest.approx(0.4, rel=1e-5)
    assert scope.gkv(score, torch.tensor([0.45]), None, None, None).item() == pytest.approx(0.45)


def test_cascade_pair():
    two_buffers, four_buffers = (Policy("cascade", heavy, recent=2, score="cumulative") for heavy in (2, 6))
    assert says(
        scope.cascade_pair, "W 2, n 5: buffer 1 does not take the token that falls out of buffer 0, so places 2 and 3"
    )
    assert scope.cascade_pair(two_buffers, t=6) == 2
    assert [scope.cascade_pair(four_buffers, n + 1) for n in (9, 10, 12, 20, 24, 16)] == [2, 4, 6, 6, 8, 8]
    assert [scope.cascade_pair(four_buffers, n + 1) for n in range(9)] == [8] * 9  # up to n = budget


def test_schedule():
    assert says(scope.schedule, "slide, heavy 1, recent 1 (budget 2), T 4.")
    plan = scope.schedule(Policy("slide", heavy=1, recent=1, score="cumulative"), 4)
    assert says(scope.schedule, "t = 1 writes slot 0; t = 2 writes slot 1; t = 3 writes slot 2 and one of the three")
    assert [(step.reuse, step.fresh, step.evict) for step in plan.steps[:3]] == [(-1, 0, 0), (-1, 1, 0), (-1, 2, 1)]
    assert says(scope.schedule, "t = 4 overwrites the dead slot, and again one dies.")
    assert (plan.steps[3].reuse, plan.steps[3].evict) == (0, 1)
    assert says(scope.schedule, "Three slots are enough for any T.")
    assert {scope.schedule(Policy("slide", 1, 1, "cumulative"), T).n_slots for T in (4, 5, 50, 500)} == {3}


def test_rank_key():
    wanted = "Scores 0.5, 0.25, 0.25 at positions 7, 9, 3 sort as (0.25, 3), (0.25, 9), (0.5, 7)."
    assert says(kernels.rank_key, wanted)
    tokens = [(0.5, 7), (0.25, 9), (0.25, 3)]
    score, pos = torch.tensor([s for s, _ in tokens]), torch.tensor([p for _, p in tokens], dtype=torch.int32)
    order = kernels.rank_key(score, pos).argsort().tolist()
    assert [tokens[i] for i in order] == [(0.25, 3), (0.25, 9), (0.5, 7)]


def test_highest():
    assert says(kernels.highest, "Example with 2 heads, budget 2, floor 1: scores (9, 8, 7) and (3, 2, 1).")
    assert says(kernels.highest, "Head 0 keeps 0, 1, 2 and head 1 keeps 0.")
    score = torch.tensor([[[9.0, 8.0, 7.0], [3.0, 2.0, 1.0]]])
    length, budget, floor = (torch.tensor([n]) for n in (3, 2, 1))
    assert kernels.highest(score, length, budget, floor, 3).tolist() == [[[0, 1, 2], [0, -1, -1]]]


def test_ranks():
    assert says(kernels.ranks, "(30, 50, 40) -> (2, 0, 1)")
    assert kernels.ranks(torch.tensor([30, 50, 40])).tolist() == [2, 0, 1]


def test_sample():
    example = "Probabilities 0.5, 0.3, 0.2 and top_p 0.7: tokens 0 and 1 stay, with edges 0.5 and 0.8."
    assert says(kernels.Sampler.sample, example)
    sampler = kernels.Sampler(Options(temperature=1.0, top_p=0.7), [])
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(3, 1)
    assert says(
        kernels.Sampler.sample, "Noise 0.6 is scaled to 0.6 * 0.8 = 0.48, which is below the first edge: token 0."
    )
    assert says(kernels.Sampler.sample, "Noise 0.7 gives 0.56: token 1.")
    almost_one = 1 - 2**-24  # the largest noise: token 2 is cut off
    assert sampler.sample(logits, torch.tensor([0.6, 0.7, almost_one])).tolist() == [0, 1, 1]


def test_slots_for():
    assert says(Cache.slots_for, "2 heads keep 100 tokens each, 32 of them in the window, and adakv's floor is 0.2")
    assert says(Cache.slots_for, "a head is sure of 13 and may lose 55 to the other head. So each head needs 100 + 55")
    config = ModelConfig(9, 8, 8, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4)
    cache = Cache(config, FULL, PromptPolicy("adakv", 100, 32), CacheSize(1, [500], 4), torch.float32)
    assert cache.slots_for(0, [500]) == 155
    assert cache.slots_for(0, [120]) == 120  # no head keeps more than the whole prompt


def test_round_up():
    assert says(round_up, "round_up(65, 64) is 128")
    assert [round_up(n, 64) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]
