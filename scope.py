"""SCOPE's policies as data: how many tokens stay in the cache, when a selection runs, and which score it uses.

This file holds plain Python and small pure functions; it knows no model and no cache. Symbols follow the paper (arXiv
2412.13649): t is the decode step, counted from 1; T is the most tokens to generate; alpha2 = obs_window, beta1 = heavy,
beta2 = recent. Three tables hold every method: STRATEGIES, SCORES and COMPRESSORS.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor, where
from torch.nn.functional import max_pool1d

import kernels

# ---- what a user chooses ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """What happens to generated tokens. Budgets count tokens per KV head. Raises ValueError for impossible values."""

    name: str
    heavy: int
    recent: int
    score: str
    interval: int = 0  # steps from one selection to the next; 0: the strategy's own

    def __post_init__(self):
        require_known("policy", self.name, STRATEGIES)
        require_known("score", self.score, SCORES)
        require(self.heavy >= 0, "heavy", self.heavy, "0 tokens or more")
        require(self.recent >= 0, "recent", self.recent, "0 tokens or more")
        require(self.interval >= 0, "interval", self.interval, "0 (the policy's own) or more")
        no_pairs = self.interval < 2 or not self.strategy.candidates
        require(no_pairs, "interval", self.interval, f"0 or 1: {self.name} evicts a token in every step")

    @property
    def strategy(self) -> "Strategy":
        return STRATEGIES[self.name]

    @property
    def ranking(self) -> "Score":
        return self.strategy.ranking or SCORES[self.score]


@dataclass(frozen=True)
class PromptPolicy:
    """What happens to the prompt after prefill: `budget` tokens per KV head stay, among them the last `obs_window`."""

    compress: str
    budget: int
    obs_window: int
    shares: tuple[float, ...] = ()  # of the budget, one for each layer, with the mean 1; for `measured` compressors
    key_channels: float = 1.0  # share of its channels that a prompt key keeps; the others are 0, which saves no byte

    def __post_init__(self):
        require_known("compressor", self.compress, COMPRESSORS)
        require(self.budget >= 1, "prompt_budget", self.budget, "1 token or more")
        most = f"1 to {self.budget} tokens: it is part of prompt_budget"
        require(1 <= self.obs_window <= self.budget, "obs_window", self.obs_window, most)
        require(0 < self.key_channels <= 1, "key_channels", self.key_channels, "above 0 and at most 1")
        measure = "the file that benchmarks/calibrate.py writes for this model"
        require(bool(self.shares) or not self.compressor.measured, "layer_shares", "not given", measure)

    @property
    def compressor(self) -> "Compressor":
        return COMPRESSORS[self.compress]

    @property
    def spread(self) -> Callable[[int, int, int, int], int] | None:
        """(mean budget, layer, n_layers, most) -> tokens; None: the decode strategy's."""
        return partial(as_measured, self.shares) if self.compressor.measured else self.compressor.spread


# ---- budgets: generated tokens per KV head that stay after the selection of step t ------------------------


def unlimited(policy: Policy, T: int, t: int) -> int:
    return T


def fixed(policy: Policy, T: int, t: int) -> int:
    return policy.heavy + policy.recent


def growing(policy: Policy, T: int, t: int) -> int:
    """Eq. 4: the heavy part grows linearly from step `recent` on, and reaches `heavy` at step T.

    heavy 6, recent 4, T 16: the budget is 4 at step 4, 7 at step 10, 10 at step 16.
    """
    if policy.recent >= T:
        return policy.recent
    grown = min(max(t - policy.recent, 0), T - policy.recent)
    return policy.recent + policy.heavy * grown // (T - policy.recent)


# ---- intervals: steps from one selection to the next ------------------------------------------------------


def every_step(policy: Policy, T: int) -> int:
    return 1


def one_heavy_hitter_apart(policy: Policy, T: int) -> int:
    """The paper's zeta: a selection runs each time Eq. 4 admits one more heavy hitter.

    With heavy = 0 Eq. 4 never admits one. The pool is then a sliding window, which selects every step.
    """
    if policy.heavy == 0:
        return 1
    return max(1, (T - policy.recent) // policy.heavy)


# ---- windows: how many of the newest tokens no selection touches (held: before the output, [B, n_kv_heads, 1]) ----


def last_recent(policy: Policy, held: Tensor) -> int:
    return policy.recent


def whole_budget(policy: Policy, held: Tensor) -> int:
    return policy.heavy + policy.recent


def half_of_everything(policy: Policy, held: Tensor) -> Tensor:
    return (held + policy.heavy + policy.recent) // 2


# ---- candidates: the place, newest first, of the newer of two tokens of which the lower-scored one dies at step t ----


def cascade_pair(policy: Policy, t: int) -> int:
    """Cascading KV cache (arXiv 2406.17808): at token n, buffer i takes what falls out of buffer i - 1 if 2^i | n.

    Otherwise that token and the newest of buffer i compete. W 2, n 5: buffer 1 does not take the token that falls out
    of buffer 0, so places 2 and 3 compete. Where every buffer takes one, the oldest token dies.
    """
    W, budget, n = max(1, policy.recent), policy.heavy + policy.recent, t - 1
    place = W * (n & -n).bit_length()  # n 12: 12 & -12 is 4, which has 3 bits. 2 and 4 divide 12, 8 does not: buffer 3
    return place if n > budget and place < budget else budget  # up to n = budget, all buffers take all


# ---- scores: what makes a token worth keeping -------------------------------------------------------------


def cumulative(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum of all attention that the token has received since it was written (H2O, arXiv 2306.14048)."""
    return score + prob


def current(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of this step's query alone. SCOPE's published code ranks by it."""
    return prob


def own(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The token's attention to itself in the step that wrote it; never updated (docs/results.md)."""
    return where(age == 1, prob, score)


def oldest(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Old tokens score higher than young ones, so the first tokens stay (StreamingLLM's sinks, arXiv 2309.17453)."""
    return age.float()


def gkv(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The most attention of any step; what is past fades to 0.8 of it in 128 steps (G-KV, arXiv 2512.00504)."""
    return prob.maximum(0.8 ** (1 / 128) * score)


def raas(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor, enough: float = 1e-4) -> Tensor:
    """Minus the steps since the token last received more attention than `enough` (RaaS, arXiv 2502.11147)."""
    return where(prob > enough, 0.0, score - 1)


def keydiff(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys that point away from the mean direction of the live ones score highest (KeyDiff, arXiv 2504.15364)."""
    return -kernels.cosine_to_mean(k, age > 0)


def vase(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """|kG|^2 |vG|^2 for a Gaussian G [head_dim, 20] that is drawn anew for each selection (VaSE, arXiv 2606.03928)."""
    G = kernels.gaussian(age.sum(-1), k.shape[-1], 20)  # the ages of the pool add up to another number at each step
    return kernels.squared_norm(k, G) * kernels.squared_norm(v, G)


def novel(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`cumulative`, and a bonus, four steps after the token was written, if it stands out from the newest 64 tokens.

    Its key and its value count, and the mean value of the nine tokens around it (found here, docs/results.md).
    """
    live, here = age > 0, age == 5
    newest, around = live & (age <= 64), live & (age <= 9)
    alone = kernels.gap(k, here, newest) * kernels.gap(v, here, newest)
    return score + prob + where(here, 25 * kernels.gap(v, around, newest) ** 2 * alone, 0.0)


def drawn_by_score(score: Tensor, number: Tensor) -> Tensor:
    """The highest are a sample without replacement by score: a token draws once for life, by its number."""
    return score / kernels.exponential(number)  # the order of log(score) + Gumbel noise


@dataclass(frozen=True)
class Score:
    """`update(score, prob, age, k, v) -> score`, each [B, n_kv_heads, n]. The tokens with the highest score stay.

    score: what `update` returned one step before; 0 for a token that was just written. prob: the attention probability
    that this step's query gives the token, averaged over the query heads of its group. age: the number of queries that
    have seen the token; 1 in the step that writes it, 0 in a dead slot. k, v: [B, n_kv_heads, n, head_dim].
    """

    update: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    every_step: bool = True  # False: the result ignores `score`, so only selection steps need to compute it
    reads_kv: bool = False  # False: k and v may be None, because to unpack a storage format takes time
    # (score, number) -> what a selection compares in its place; number: of the token's position and head
    rank: Callable[[Tensor, Tensor], Tensor] | None = None


SCORES = {
    "cumulative": Score(cumulative),
    "current": Score(current, every_step=False),
    "own": Score(own),
    "gkv": Score(gkv),
    "raas": Score(raas),
    "keydiff": Score(keydiff, every_step=False, reads_kv=True),
    "vase": Score(vase, every_step=False, reads_kv=True),
    "novel": Score(novel, reads_kv=True),
    "sampled": Score(cumulative, rank=drawn_by_score),
}


# ---- spreads: a layer's share of the mean budget; `most` is what one layer can use -------------------------


def uniform(budget: int, layer: int, n_layers: int, most: int) -> int:
    return min(budget, most)


def linear(budget: int, layer: int, n_layers: int, most: int, last: float = 1 / 20) -> int:
    """PyramidKV (arXiv 2406.02069): falls linearly to `last` of the budget in the last layer; the mean stays `budget`.

    Budget 100, 4 layers: 195, 132, 68, 5. With `most` = 150, layer 0 gets 150 and the slope is less steep.
    """
    budget = min(budget, most)
    top = min(2 * budget - int(budget * last), most)
    return top - round(layer * 2 * (top - budget) / max(1, n_layers - 1)) if n_layers > 1 else budget


def gently_linear(budget: int, layer: int, n_layers: int, most: int) -> int:
    """PyramidInfer (arXiv 2405.12532): falls to half the budget, so that the recent half fits into every layer."""
    return linear(budget, layer, n_layers, most, last=1 / 2)


def all_but_two_layers(budget: int, layer: int, n_layers: int, most: int) -> int:
    return most if layer < 2 else min(budget, most)


def as_measured(shares: tuple[float, ...], budget: int, layer: int, n_layers: int, most: int) -> int:
    """The layer's own share. What a layer cannot use goes to those with smaller shares, so that the total stays.

    Shares 2, 0.5, 0.5 and budget 4: 8, 2, 2. With `most` = 6, layer 0 gets 6, and the other two 3 each.
    """
    require(len(shares) == n_layers, "layer_shares", f"for {len(shares)} layers", f"for the {n_layers} of the model")
    order = sorted(range(n_layers), key=lambda other: -shares[other])  # the largest, which may reach `most`, first
    left = n_layers * min(budget, most)
    for rank, other in enumerate(order):
        tokens = min(most, round(left * shares[other] / sum(shares[i] for i in order[rank:])))
        if other == layer:
            return tokens
        left -= tokens


# ---- decode strategies ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strategy:
    """One row of the policy table; the functions are those above."""

    budget: Callable[[Policy, int, int], int]  # (policy, T, t) -> tokens
    interval: Callable[[Policy, int], int] = every_step  # (policy, T) -> steps
    window: Callable[[Policy, Tensor], int | Tensor] = last_recent
    candidates: Callable[[Policy, int], int] | None = None  # (policy, t) -> place; None: all older than the window
    frozen_prompt: bool = True  # False: prompt and output are one pool of kept prompt + heavy + recent tokens
    ranking: Score | None = None  # None: the score that --score names
    spread: Callable[[int, int, int, int], int] = uniform  # (mean budget, layer, n_layers, most) -> tokens
    grows: bool = False  # the pool grows with t: attention reads a prefix of it


STRATEGIES = {
    "full": Strategy(budget=unlimited),
    "slide": Strategy(budget=fixed),
    "adaptive": Strategy(budget=growing, grows=True),
    "discontinuous": Strategy(budget=growing, interval=one_heavy_hitter_apart, grows=True),
    "cascade": Strategy(budget=fixed, candidates=cascade_pair),
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


# ---- prompt compressors: (q, k, lengths, window) -> score [B, n_kv_heads, S]; the highest stay -------------


def received_from_all(q: Tensor, k: Tensor, lengths: Tensor, window: Tensor) -> Tensor:
    """H2O (arXiv 2306.14048): the sum of the attention received from all prompt queries, causal."""
    return kernels.received_attention(q, k, lengths)


def mean_received(q: Tensor, k: Tensor, lengths: Tensor, window: Tensor) -> Tensor:
    """ZipVL (arXiv 2410.08584): H2O's sum over the number of queries that see the token; the sum favours early ones."""
    seen_by = lengths[:, None, None] - kernels.slot_numbers(k)
    return kernels.received_attention(q, k, lengths) / seen_by.clamp(min=1)  # below 1: padding


def received_from_last(q: Tensor, k: Tensor, lengths: Tensor, window: Tensor) -> Tensor:
    """SnapKV (arXiv 2404.14469): the attention from the last queries; each token takes the maximum of 7 neighbours."""
    return max_pool1d(kernels.received_from_last(q, k, lengths, window), 7, stride=1, padding=3)


def received_from_question(q: Tensor, k: Tensor, lengths: Tensor, window: Tensor) -> Tensor:
    """FINCH (TACL 2024, arXiv 2408.00167): the attention from the question, which is the window; no neighbours."""
    return kernels.received_from_last(q, k, lengths, window)


def small_key_norm(q: Tensor, k: Tensor, lengths: Tensor, window: Tensor) -> Tensor:
    """Keys of low L2 norm score highest: in large pretrained models they attract attention (arXiv 2406.11430)."""
    return -k.float().norm(dim=-1)


def first_tokens(q: Tensor, k: Tensor, lengths: Tensor, window: Tensor) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): the first tokens are attention sinks, so they score highest."""
    return -kernels.slot_numbers(k).float()


@dataclass(frozen=True)
class Compressor:
    """One row of the compressor table."""

    score: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None  # None: the whole prompt stays
    spread: Callable[[int, int, int, int], int] | None = None  # None: the decode strategy's
    measured: bool = False  # True: spread as benchmarks/calibrate.py has measured it
    head_floor: float = 1.0  # share of its budget that each head keeps; the heads of a layer compete for the rest


COMPRESSORS = {
    "full": Compressor(None),
    "h2o": Compressor(received_from_all),
    "h2o-mean": Compressor(mean_received),
    "snapkv": Compressor(received_from_last),
    "pyramidkv": Compressor(received_from_last, spread=linear),
    "l2norm": Compressor(small_key_norm, spread=all_but_two_layers),
    "streaming": Compressor(first_tokens),
    "adakv": Compressor(received_from_last, head_floor=0.2),
    "prefixkv": Compressor(received_from_all, measured=True),  # arXiv 2412.03409
    "zipvl": Compressor(mean_received, measured=True),
    "finch": Compressor(received_from_question, spread=uniform),  # a layer with less could lose some of the question
}


# ---- storage formats of K and V: a token is one slot in each of them ----------------------------------------


@dataclass(frozen=True)
class Format:
    """How keys or values are stored: so many bits a channel, with one scale for each group of channels of a token."""

    bits: int = 16  # 16: the model's dtype as it is, without a scale
    group: int = 0  # channels that share a scale; 0: all of the head's
    minimum: bool = False  # codes count from the group's minimum, not from 0
    rotated: bool = False  # a Hadamard rotation comes first (kernels.rotate)

    def n_groups(self, head_dim: int) -> int:
        """Groups of a head: head_dim / group, or the power of two below. Raises ValueError where a word breaks up."""
        channels = 32 // self.bits  # of one word
        wanted = f"a multiple of {channels} where K or V has {self.bits} bits: choose another --kv-format"
        require(self.bits == 16 or head_dim % channels == 0, "head_dim", head_dim, wanted)
        groups = min(head_dim // self.group, channels) if self.group else 1
        return 1 << max(groups, 1).bit_length() - 1  # 3 becomes 2: the codes of a word are shared out evenly


FORMATS = {  # (of keys, of values)
    "model": (Format(), Format()),
    "int8": (Format(8), Format(8)),
    "k8v4": (Format(8), Format(4, minimum=True)),  # keys need more bits than values (arXiv 2502.15075)
    "int4": (Format(4, group=32, minimum=True, rotated=True), Format(4, group=32, minimum=True)),
}


# ---- the schedule: everything about a run that depends on t alone, known before the first step ------------


class StepPlan(NamedTuple):
    """What step t does: write its token into a victim's slot or a fresh one, attend, then evict."""

    reuse: int  # index into LayerCache.victims of the dead slot to overwrite; -1: use `fresh`
    fresh: int  # the first decode slot that no token has used yet
    evict: int  # tokens that die after this step's attention; 0: an append step
    pair: int  # place, newest first, of the two tokens of which one dies; 0: the strategy names no pair


@dataclass(frozen=True)
class Schedule:
    steps: tuple[StepPlan, ...]  # step t is steps[t - 1]
    n_slots: int  # decode slots to allocate: the most that are ever in use
    max_evict: int  # the most victims of one selection


def schedule(policy: Policy, T: int) -> Schedule:
    """The host's plan of T decode steps. It depends on t alone, so no step looks at data to know its shapes.

    slide, heavy 1, recent 1 (budget 2), T 4. Slots are counted from the first decode slot:
      t = 1 writes slot 0; t = 2 writes slot 1; t = 3 writes slot 2 and one of the three tokens dies;
      t = 4 overwrites the dead slot, and again one dies. Three slots are enough for any T.
    """
    steps = []
    live = 0  # generated tokens alive
    used = 0  # decode slots that ever held a token
    victims = 0  # dead slots that the last selection left
    reused = 0  # of those, how many are overwritten already
    for t in range(1, T + 1):
        reuse, fresh = -1, used
        if reused < victims:
            reuse = reused
            reused += 1
        else:
            used += 1
        live += 1
        evict = eviction_count(policy, T, t, live)
        pair = policy.strategy.candidates(policy, t) if policy.strategy.candidates else 0
        steps.append(StepPlan(reuse, fresh, evict, pair))
        if evict:
            live -= evict
            victims, reused = evict, 0
    return Schedule(tuple(steps), used, max((step.evict for step in steps), default=0))


def eviction_count(policy: Policy, T: int, t: int, live: int) -> int:
    """Tokens that must die after step t, when `live` more are held than the prompt gave; 0: step t only appends."""
    if (t - policy.recent) % (policy.interval or policy.strategy.interval(policy, T)):
        return 0
    return max(0, live - policy.strategy.budget(policy, T, t))


# ---- refusals ---------------------------------------------------------------------------------------------


def require(holds: bool, name: str, value, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: it must be {wanted}")


def require_known(what: str, value: str, table: dict) -> None:
    if value not in table:
        raise ValueError(f"unknown {what} {value!r}: choose from {', '.join(table)}")


def one_line(error: BaseException) -> str:
    """The error's text, or its type where it has none: what a terminal would obey is escaped, a long middle cut out."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) < 450 else text[:300] + " ... " + text[-145:]  # the file comes first, the remedy last


FULL = Policy("full", heavy=0, recent=0, score="cumulative")  # the policy that every other one is compared with
WHOLE_PROMPT = PromptPolicy("full", budget=1, obs_window=1)
