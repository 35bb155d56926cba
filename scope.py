"""SCOPE's policies as data: what of the prompt and of the output may stay, when to choose, by which score.

Plain Python and small pure functions: no model and no cache in here. Symbols follow the paper (arXiv
2412.13649): t is the decode step, 1-based; T the most tokens to generate; alpha2 = obs_window, beta1 = heavy,
beta2 = recent. Three tables hold every method: STRATEGIES, SCORES and COMPRESSORS.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, where
from torch.nn.functional import max_pool1d

import kernels

# ---- what a user chooses ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """The decode phase. Budgets are generated tokens per KV head. ValueError names what is impossible."""

    name: str
    heavy: int
    recent: int
    score: str

    def __post_init__(self):
        require_known("policy", self.name, STRATEGIES)
        require_known("score", self.score, SCORES)
        require_count("heavy", self.heavy, 0)
        require_count("recent", self.recent, 0)

    @property
    def strategy(self) -> "Strategy":
        return STRATEGIES[self.name]

    @property
    def ranking(self) -> "Score":
        return self.strategy.ranking or SCORES[self.score]


@dataclass(frozen=True)
class Prompt:
    """The prefill phase: `budget` prompt tokens per KV head stay, the last `obs_window` of them in any case."""

    compress: str
    budget: int
    obs_window: int

    def __post_init__(self):
        require_known("compressor", self.compress, COMPRESSORS)
        require_count("prompt_budget", self.budget, 1)
        require_count("obs_window", self.obs_window, 1)
        if self.obs_window > self.budget:
            raise ValueError(f"obs_window is {self.obs_window}: it is part of prompt_budget, so at most {self.budget}")

    @property
    def compressor(self) -> "Compressor":
        return COMPRESSORS[self.compress]


def require_known(what: str, value: str, table: dict) -> None:
    if value not in table:
        raise ValueError(f"unknown {what} {value!r}: choose from {', '.join(table)}")


def require_count(what: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{what} is {value}: a budget counts tokens, so {least} or more")


# ---- the decode pool's budget after the selection of step t -----------------------------------------------


def unlimited(policy: Policy, T: int, t: int) -> int:
    return T


def fixed(policy: Policy, T: int, t: int) -> int:
    return policy.heavy + policy.recent


def growing(policy: Policy, T: int, t: int) -> int:
    """Eq. 4: the heavy part grows linearly from step `recent` on and is full at step T."""
    if policy.recent >= T:
        return policy.recent
    grown = min(max(t - policy.recent, 0), T - policy.recent)
    return policy.recent + policy.heavy * grown // (T - policy.recent)


# ---- the steps between two selections ---------------------------------------------------------------------


def every_step(policy: Policy, T: int) -> int:
    return 1


def one_heavy_hitter_apart(policy: Policy, T: int) -> int:
    """The paper's zeta: one selection each time Eq. 4 admits one more token. With heavy = 0 it never does and
    there is nothing to rank, so the pool slides with every step instead of growing until T."""
    return max(1, (T - policy.recent) // policy.heavy) if policy.heavy else 1


# ---- the newest tokens, which no selection touches (prompt: tokens kept of each row's prompt, [B]) ---------


def last_recent(policy: Policy, prompt: Tensor) -> int:
    return policy.recent


def whole_budget(policy: Policy, prompt: Tensor) -> int:
    return policy.heavy + policy.recent


def half_of_everything(policy: Policy, prompt: Tensor) -> Tensor:
    return (prompt + policy.heavy + policy.recent) // 2


# ---- scores: what makes a token worth keeping -------------------------------------------------------------


def cumulative(score: Tensor, prob: Tensor, age: Tensor) -> Tensor:
    """All attention since the token was written (H2O, arXiv 2306.14048)."""
    return score + prob


def current(score: Tensor, prob: Tensor, age: Tensor) -> Tensor:
    """The attention of this step's query alone: what SCOPE's published code ranks by."""
    return prob


def own(score: Tensor, prob: Tensor, age: Tensor) -> Tensor:
    """The attention that a token's own query gave it, for life: this project's finding (README, Results)."""
    return where(age == 1, prob, score)


def oldest(score: Tensor, prob: Tensor, age: Tensor) -> Tensor:
    """No attention at all: the first tokens stay (StreamingLLM's sinks, arXiv 2309.17453)."""
    return age.float()


@dataclass(frozen=True)
class Score:
    """`update(score, prob, age) -> score`, each [B, n_kv_heads, n]; the highest stay.

    score is 0 for a token just written, prob its attention probability in this step (mean over the query heads
    of its group), age the number of steps that have seen it (1 in the step that writes it).
    """

    update: Callable[[Tensor, Tensor, Tensor], Tensor]
    every_step: bool = True  # False: only selection steps compute it, what came before does not matter


SCORES = {
    "cumulative": Score(cumulative),
    "current": Score(current, every_step=False),
    "own": Score(own),
}


# ---- budgets that differ by layer: (mean budget, layer, n_layers, most) -> budget --------------------------


def uniform(budget: int, layer: int, n_layers: int, most: int) -> int:
    return min(budget, most)


def linear(budget: int, layer: int, n_layers: int, most: int, last: float = 1 / 20) -> int:
    """PyramidKV's spread (arXiv 2406.02069): down to 1/20 of the budget in the last layer, the mean stays `budget`.

    Less steep where layer 0 cannot hold more than `most`.
    """
    budget = min(budget, most)
    top = min(2 * budget - int(budget * last), most)
    return top - round(layer * 2 * (top - budget) / max(1, n_layers - 1)) if n_layers > 1 else budget


def gently_linear(budget: int, layer: int, n_layers: int, most: int) -> int:
    """PyramidInfer (arXiv 2405.12532) as a baseline: down to half the budget, so the recent half fits everywhere."""
    return linear(budget, layer, n_layers, most, last=1 / 2)


def all_but_two_layers(budget: int, layer: int, n_layers: int, most: int) -> int:
    return most if layer < 2 else min(budget, most)


# ---- decode strategies ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strategy:
    """One row of the policy table."""

    budget: Callable[[Policy, int, int], int]
    interval: Callable[[Policy, int], int] = every_step
    window: Callable[[Policy, Tensor], int | Tensor] = last_recent
    frozen_prompt: bool = True  # False: prompt and output are one pool of kept prompt + heavy + recent
    ranking: Score | None = None  # None: the one that --score names
    spread: Callable[[int, int, int, int], int] = uniform
    grows: bool = False  # the pool is small for long: worth a graph of its own while it is


STRATEGIES = {
    "full": Strategy(budget=unlimited),
    "slide": Strategy(budget=fixed),
    "adaptive": Strategy(budget=growing, grows=True),
    "discontinuous": Strategy(budget=growing, interval=one_heavy_hitter_apart, grows=True),
    "recent": Strategy(budget=fixed, window=whole_budget, ranking=Score(oldest, every_step=False)),
    "h2o": Strategy(budget=fixed, frozen_prompt=False),
    "streaming": Strategy(
        budget=fixed, window=half_of_everything, frozen_prompt=False, ranking=Score(oldest, every_step=False)
    ),
    "pyramidinfer": Strategy(budget=fixed, frozen_prompt=False, spread=gently_linear),
}


def for_layer(policy: Policy, layer: int, n_layers: int) -> Policy:
    """The same policy with this layer's share of the decode budget."""
    budget = policy.heavy + policy.recent
    share = policy.strategy.spread(budget, layer, n_layers, 2 * budget)
    recent = min(policy.recent, share)
    return replace(policy, heavy=share - recent, recent=recent)


# ---- prompt compressors: (q, k, lengths, obs_window) -> score [B, n_kv_heads, S], the highest stay ---------


def received_from_all(q: Tensor, k: Tensor, lengths: Tensor, obs_window: int) -> Tensor:
    """H2O (arXiv 2306.14048): attention received from every prompt query, summed; causal."""
    return kernels.received_attention(q, k, lengths)


def received_from_last(q: Tensor, k: Tensor, lengths: Tensor, obs_window: int) -> Tensor:
    """SnapKV (arXiv 2404.14469): attention from the last queries, the largest of 7 neighbours."""
    return max_pool1d(kernels.received_from_last(q, k, lengths, obs_window), 7, stride=1, padding=3)


def small_key_norm(q: Tensor, k: Tensor, lengths: Tensor, obs_window: int) -> Tensor:
    """arXiv 2406.11430: keys of low L2 norm attract attention in large pretrained models."""
    return -k.float().norm(dim=-1)


def first_tokens(q: Tensor, k: Tensor, lengths: Tensor, obs_window: int) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): attention sinks."""
    return -kernels.slot_numbers(k).float()


@dataclass(frozen=True)
class Compressor:
    """One row of the compressor table."""

    score: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None
    spread: Callable[[int, int, int, int], int] | None = None  # None: the decode strategy's
    head_floor: float = 1.0  # of a head's even share; what is above it goes to whichever head scores highest


COMPRESSORS = {
    "full": Compressor(None),
    "h2o": Compressor(received_from_all),
    "snapkv": Compressor(received_from_last),
    "pyramidkv": Compressor(received_from_last, spread=linear),
    "l2norm": Compressor(small_key_norm, spread=all_but_two_layers),
    "streaming": Compressor(first_tokens),
    "adakv": Compressor(received_from_last, head_floor=0.2),
}


# ---- the schedule: everything about a run that depends on t alone, known before the first step ------------


class Step(NamedTuple):
    """What step t does: write into a slot that the last selection emptied, or a fresh one, then evict."""

    reuse: int  # overwrite this victim of the last selection; -1: none is left
    fresh: int  # else take this decode slot, the first never used
    evict: int  # tokens that die after this step's attention; 0: an append step


@dataclass(frozen=True)
class Schedule:
    steps: tuple[Step, ...]  # step t is steps[t - 1]
    n_slots: int  # decode slots ever in use, so the ones to allocate
    max_evict: int  # most victims of one selection


def schedule(policy: Policy, T: int) -> Schedule:
    """Host-side plan of T decode steps: no step needs to look at data to know its shapes."""
    steps, live, used, victims, reused = [], 0, 0, 0, 0
    for t in range(1, T + 1):
        overwrites = reused < victims
        evict = evictions(policy, T, t, live + 1)
        steps.append(Step(reused if overwrites else -1, used, evict))
        reused, used = reused + overwrites, used + (not overwrites)
        live += 1 - evict
        if evict:
            victims, reused = evict, 0
    return Schedule(tuple(steps), used, max((step.evict for step in steps), default=0))


def evictions(policy: Policy, T: int, t: int, live: int) -> int:
    """How many tokens must go after step t, with `live` more than the prompt gave. Selections run where it is not 0."""
    selects = (t - policy.recent) % policy.strategy.interval(policy, T) == 0
    return max(0, live - policy.strategy.budget(policy, T, t)) if selects else 0


FULL = Policy("full", heavy=0, recent=0, score="cumulative")  # what every other policy is compared with
WHOLE = Prompt("full", budget=1, obs_window=1)
