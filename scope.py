"""SCOPE's policies as data: how many generated tokens may stay, when to choose among them, by which score.

Plain Python and small pure functions: no model and no cache in here. Symbols follow the paper (arXiv
2412.13649): t is the decode step, 1-based; T the most tokens to generate; beta1 = heavy, beta2 = recent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """What a user chooses. Budgets are generated tokens per KV head. ValueError names what is impossible."""

    name: str
    heavy: int
    recent: int
    score: str

    def __post_init__(self):
        require_known("policy", self.name, STRATEGIES)
        require_known("score", self.score, SCORES)
        for field in ("heavy", "recent"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}: a budget counts tokens, so 0 or more")

    @property
    def strategy(self) -> "Strategy":
        return STRATEGIES[self.name]


def require_known(what: str, value: str, table: dict) -> None:
    if value not in table:
        raise ValueError(f"unknown {what} {value!r}: choose from {', '.join(table)}")


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


# ---- the newest tokens, which no selection touches --------------------------------------------------------


def last_recent(policy: Policy) -> int:
    return policy.recent


def whole_budget(policy: Policy) -> int:
    return policy.heavy + policy.recent


@dataclass(frozen=True)
class Strategy:
    """One row of the policy table: three functions of the policy and the run's length."""

    budget: Callable[[Policy, int, int], int]
    interval: Callable[[Policy, int], int] = every_step
    window: Callable[[Policy], int] = last_recent


STRATEGIES = {
    "full": Strategy(budget=unlimited),
    "slide": Strategy(budget=fixed),
    "adaptive": Strategy(budget=growing),
    "discontinuous": Strategy(budget=growing, interval=one_heavy_hitter_apart),
    "recent": Strategy(budget=fixed, window=whole_budget),
}


# ---- scores: what makes a generated token worth keeping ---------------------------------------------------


def cumulative(score: Tensor, prob: Tensor, age: Tensor) -> Tensor:
    """All attention since the token was written (H2O, arXiv 2306.14048)."""
    return score + prob


def current(score: Tensor, prob: Tensor, age: Tensor) -> Tensor:
    """The attention of this step's query alone: what SCOPE's published code ranks by."""
    return prob


@dataclass(frozen=True)
class Score:
    """`update(score, prob, age) -> score`, each [B, n_kv_heads, n_decode_slots]; the highest stay.

    score is 0 for a token just written, prob its attention probability in this step (mean over the query heads
    of its group), age the number of steps that have seen it (1 in the step that writes it).
    """

    update: Callable[[Tensor, Tensor, Tensor], Tensor]
    every_step: bool = True  # False: only selection steps compute it, what came before does not matter


SCORES = {
    "cumulative": Score(cumulative),
    "current": Score(current, every_step=False),
}

FULL = Policy("full", heavy=0, recent=0, score="cumulative")  # what every other policy is compared with


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
    """How many of `live` generated tokens must go after step t. `select` runs only where this is not 0."""
    since_recent = t - policy.recent
    selects = since_recent > 0 and since_recent % policy.strategy.interval(policy, T) == 0
    return max(0, live - policy.strategy.budget(policy, T, t)) if selects else 0
