"""The naive twin of the cache: the papers read literally, lists of positions in plain Python, nothing preallocated.

One `Oracle` is one (row, KV head). Every step it appends, attends over its list, and where the policy selects, it
sorts and rebuilds the list: top-k and gather, what `cache.py` must equal as a set. `kept_of_prompt` does the same for
the prompt compressors.
"""

import math
from collections import Counter

import numpy as np

UNIFIED = ("h2o", "streaming", "pyramidinfer")  # prompt and output are one pool


def paper_budget(name: str, heavy: int, recent: int, T: int, t: int) -> float:
    """The most tokens beyond the kept prompt that a selection at step t leaves (paper: Eq. 3 and 4)."""
    if name == "full":
        return math.inf
    if name not in ("adaptive", "discontinuous"):
        return heavy + recent
    if t <= recent:
        return recent
    return min(heavy + recent, recent + heavy * (t - recent) // (T - recent))


def paper_interval(name: str, heavy: int, recent: int, T: int, asked: int = 0) -> int:
    """asked: what --interval says; 0: nothing."""
    return asked or (max(1, (T - recent) // heavy) if name == "discontinuous" and heavy else 1)


def paper_selects(name: str, heavy: int, recent: int, T: int, t: int, asked: int = 0) -> bool:
    return (t > recent or name in UNIFIED) and (t - recent) % paper_interval(name, heavy, recent, T, asked) == 0


def layer_budgets(mean: int, n_layers: int, most: int, last: float) -> list[int]:
    """Linear down to a share of the mean in the last layer; the first holds what is missing, at most `most`."""
    mean = min(mean, most)
    top = min(mean * 2 - int(mean * last), most)
    bottom = 2 * mean - top
    return [top - round((top - bottom) * layer / (n_layers - 1)) for layer in range(n_layers)]


def layer_prompt_budgets(compress: str, policy: str, mean: int, n_layers: int, n: int, shares: tuple) -> list[int]:
    """For each layer, the tokens that stay of a prompt of n; shares: measured ones of the mean, one for each layer."""
    if compress in ("prefixkv", "zipvl"):
        return measured_budgets(min(mean, n) * n_layers, shares, n)
    if compress == "l2norm":
        return [n if layer < 2 else mean for layer in range(n_layers)]
    halves = policy == "pyramidinfer" and compress != "finch"
    last = 1 / 20 if compress == "pyramidkv" else 1 / 2 if halves else 1
    return layer_budgets(mean, n_layers, n, last)


def measured_budgets(total: int, shares: tuple, most: int) -> list[int]:
    """Deal out the total in proportion to the shares, the largest first, and deal out anew what exceeds `most`."""
    if not shares:
        return []
    largest = shares.index(max(shares))
    tokens = min(most, round(total * shares[largest] / sum(sorted(shares, reverse=True))))
    others = measured_budgets(total - tokens, shares[:largest] + shares[largest + 1 :], most)
    return [*others[:largest], tokens, *others[largest:]]


def layer_decode_budget(policy: str, heavy: int, recent: int, layer: int, n_layers: int) -> tuple[int, int]:
    if policy != "pyramidinfer":
        return heavy, recent
    budget = layer_budgets(heavy + recent, n_layers, 2 * (heavy + recent), 1 / 2)[layer]
    return budget - min(recent, budget), min(recent, budget)


class Oracle:
    def __init__(
        self,
        setting: tuple,
        score: str,
        head: tuple,
        prompt: list[tuple],
        kept: list[int],
        formats: tuple,
        keys: list[list[float]],
    ):
        """prompt: (queries of the group, key, value) of each prompt token; kept: the positions that stay of it.

        head: its number, and how many there are. formats: (bits, group, minimum, rotated) of keys and of values. keys:
        of the prompt, as they are stored.
        """
        self.formats = formats
        self.name, self.heavy, self.recent, self.T, self.interval = setting
        self.head, self.n_heads = head
        self.sub_caches: list[list[int]] = []  # cascade's, each with its oldest token first
        self.score = score
        self.entries = {p: self.stored(keys[p], value) for p, (_, _, value) in enumerate(prompt) if p in kept}
        self.prompt_len, self.n_kept = len(prompt), len(kept)  # in a later turn: all that was there before the output
        received = received_attention([queries for queries, _, _ in prompt], [key for _, key, _ in prompt])
        self.totals = {p: self.updated(0.0, received[p], self.prompt_len - p) for p in kept}
        self.add_bonus({p: token[1:] for p, token in enumerate(prompt)}, self.prompt_len - 5)

    def stored(self, key: list[float], value: list[float]) -> tuple[list[float], list[float]]:
        return rounded(key, *self.formats[0]), rounded(value, *self.formats[1])

    @property
    def live(self) -> list[int]:
        """Positions held, oldest first."""
        return sorted(self.entries)

    def step(self, t: int, queries: list[list[float]], key: list[float], value: list[float]) -> list[list[float]]:
        """One decode step of one KV head; queries are those of its group. Returns one output per query."""
        position = self.prompt_len + t - 1
        self.entries[position] = self.stored(key, value)
        self.totals[position] = 0.0
        live = self.live
        probs = [softmax(query, [self.entries[p][0] for p in live]) for query in queries]
        for i, p in enumerate(live):
            seen = sum(prob[i] for prob in probs) / len(probs)
            self.totals[p] = self.updated(self.totals[p], seen, position - p + 1)
        self.add_bonus({p: self.entries[p] for p in self.pool}, position - 4)
        outputs = [weighted(prob, [self.entries[p][1] for p in live]) for prob in probs]
        if self.name == "cascade":
            if (dropped := self.cascade(t, position)) is not None:
                del self.entries[dropped]
        elif paper_selects(self.name, self.heavy, self.recent, self.T, t, self.interval):
            for p in self.victims(t):
                del self.entries[p]
        return outputs

    def read(self, position: int, block: list[tuple]) -> list[list[list[float]]]:
        """A later turn: each token of the block sees what is left of all before it. Returns their outputs per query."""
        outputs, newest, received = [], position + len(block) - 1, Counter()
        for p, (queries, key, value) in enumerate(block, position):
            self.entries[p] = (key, value)
            self.totals[p] = 0.0
            probs = [softmax(query, [self.entries[other][0] for other in self.live]) for query in queries]
            for i, other in enumerate(self.live):
                received[other] += sum(prob[i] for prob in probs) / len(probs)
            outputs.append([weighted(prob, [self.entries[other][1] for other in self.live]) for prob in probs])
        self.totals = {p: self.updated(self.totals[p], received[p], newest - p + 1) for p in self.live}
        self.add_bonus(self.entries, newest - 4)
        for p, (_, key, value) in enumerate(block, position):  # among themselves they were read exactly
            self.entries[p] = self.stored(key, value)
        self.prompt_len, self.n_kept = newest + 1, len(self.entries)
        return outputs

    def snapshot(self) -> tuple:
        return self.prompt_len, dict(self.totals)

    def rewind(self, snapshot: tuple) -> None:
        """Back to a moment when a turn had just been read. What was evicted since is gone for good."""
        position, totals = snapshot
        self.entries = {p: entry for p, entry in self.entries.items() if p < position}
        self.totals = {p: totals[p] for p in self.entries}
        self.prompt_len, self.n_kept = position, len(self.entries)

    @property
    def pool(self) -> list[int]:
        """Positions that compete, oldest first."""
        return [p for p in self.live if self.name in UNIFIED or p >= self.prompt_len]

    def victims(self, t: int) -> list[int]:
        pool = self.pool
        frozen = len(self.entries) - len(pool)
        excess = len(self.entries) - self.n_kept - paper_budget(self.name, self.heavy, self.recent, self.T, t)
        if excess <= 0:
            return []
        if self.name == "streaming":  # half of what is kept are the newest tokens, the other half the oldest
            newest = (self.n_kept + self.heavy + self.recent) // 2
            return pool[: len(pool) - newest][-excess:]
        if self.name == "recent":
            return pool[:excess]
        older = pool[: max(0, len(pool) - self.recent)]
        assert frozen + len(older) >= excess
        worth = self.worth(pool)
        return sorted(older, key=lambda p: (worth[p], p))[:excess]

    def cascade(self, t: int, arrival: int) -> int | None:
        """Put a token into the first sub-cache; what falls out of one goes to the next. Returns the token that is lost.

        The paper's sub-caches have one size. Where the budget is no multiple of it, the last one has what is left.
        """
        budget, size = self.heavy + self.recent, max(1, self.recent)
        if t == 1:
            self.sub_caches = [[] for _ in range(math.ceil(budget / size))]
        worth = self.worth([p for p in self.live if p >= self.prompt_len])
        for i, tokens in enumerate(self.sub_caches):
            if i and t - 1 > budget and (t - 1) % 2**i:  # it does not let in: its newest token or the arrival is lost
                if worth[arrival] < worth[tokens[-1]]:
                    return arrival
                arrival, tokens[-1] = tokens[-1], arrival
                return arrival
            tokens.append(arrival)
            if len(tokens) <= min(size, budget - i * size):
                return None
            arrival = tokens.pop(0)
        return arrival

    def updated(self, total: float, seen: float, age: int) -> float:
        """What a token's record becomes when queries have given it this much attention."""
        if self.score == "own":  # the token's own query, once
            return seen if age == 1 else total
        if self.score == "gkv":
            return max(seen, total * 0.8 ** (1 / 128))
        if self.score == "raas":
            return 0.0 if seen > 1e-4 else total - 1
        return seen if self.score == "current" else total + seen

    def add_bonus(self, pool: dict[int, tuple[list[float], list[float]]], at: int) -> None:
        """Four tokens follow the one at this position: it gets its bonus."""
        if self.score == "novel" and at in pool and at in self.totals:
            self.totals[at] += bonus(pool, at)

    def worth(self, pool: list[int]) -> dict[int, float]:
        """What the tokens that compete are compared by: their records, or what the score makes of the whole pool."""
        if self.score == "sampled":
            return {p: self.totals[p] / -math.log(noise(p * self.n_heads + self.head)) for p in pool}
        if self.score == "keydiff":
            return away_from_mean({p: self.entries[p][0] for p in pool})
        if self.score == "vase":
            seed = sum(self.newest - p + 1 for p in pool)
            return {p: projected(self.entries[p][0], seed) * projected(self.entries[p][1], seed) for p in pool}
        return self.totals

    @property
    def newest(self) -> int:
        return max(self.entries)


def away_from_mean(keys: dict[int, list[float]]) -> dict[int, float]:
    """Minus the cosine between each key and the mean of all keys' directions, three decimals of it."""
    units = {p: np.array(key) / max(1e-30, np.linalg.norm(key)) for p, key in keys.items()}
    mean = sum(units.values())
    return {p: -round(float(unit @ mean) / max(1e-30, np.linalg.norm(mean)), 3) for p, unit in units.items()}


def bonus(pool: dict[int, tuple[list[float], list[float]]], at: int) -> float:
    """By distances from the mean of the newest 64 positions: of the nine tokens around this one, and of its own."""
    newest, around = ([entry for p, entry in pool.items() if p > at + 4 - n] for n in (64, 9))

    def gap(tokens: list, part: int) -> float:
        here, there = (np.array([entry[part] for entry in each]) for each in (tokens, newest))
        variance = (there**2).sum(1).mean() * (1 + 1e-5) - (there.mean(0) ** 2).sum()
        return ((here.mean(0) - there.mean(0)) ** 2).sum() / max(1e-30, variance)

    return 25 * gap(around, 1) ** 2 * gap([pool[at]], 0) * gap([pool[at]], 1)


def projected(x: list[float], seed: int) -> float:
    """The squared length of x after a projection to 20 dimensions by normal noise, drawn from the seed."""
    total, first, draws = 0.0, seed * 2 * len(x) * 20, len(x) * 20
    for column in range(20):
        length = 0.0
        for i, channel in enumerate(x):
            at = first + i * 20 + column
            normal = math.sqrt(-2 * math.log(noise(at))) * math.cos(2 * math.pi * noise(at + draws))
            length += channel * normal
        total += length**2
    return total


def noise(number: int) -> float:
    """A hash of the number, as a fraction between 0 and 1."""
    x = (number + 0x9E3779B9) % 2**32
    for _ in range(2):
        x = (x ^ x // 2**16) * 0x45D9F3B % 2**32
    return ((x ^ x // 2**16) % 2**23 + 0.5) / 2**23


def kept_of_prompt(
    compress: str, budget: int, obs_window: int, question: int, heads: list[list[tuple]]
) -> list[list[int]]:
    """Positions that stay for each KV head of a row; heads hold (queries of the group, key, value) per token.

    question: tokens at the end that choose and stay, in place of obs_window; 0: there are none.
    """
    n = len(heads[0])
    if compress == "full" or n <= budget:
        return [list(range(n)) for _ in heads]
    window = question or obs_window
    scores = [prompt_score(compress, window, head) for head in heads]
    for score in scores:
        score[max(0, n - window) :] = [math.inf] * min(n, window)
    ranked = [sorted(range(n), key=lambda p, score=score: (-score[p], -p)) for score in scores]
    others = budget - min(obs_window, budget)
    floor = budget - others + int(others * 0.2) if compress == "adakv" else budget
    kept = [order[:floor] for order in ranked]
    rest = [(h, p) for h, order in enumerate(ranked) for p in order[floor:]]
    rest.sort(key=lambda hp: (-scores[hp[0]][hp[1]], -hp[1]))
    for h, p in rest[: len(heads) * (budget - floor)]:
        kept[h].append(p)
    return [sorted(positions) for positions in kept]


def prompt_score(compress: str, window: int, head: list[tuple]) -> list[float]:
    queries, keys = [q for q, _, _ in head], [k for _, k, _ in head]
    n = len(head)
    if compress in ("h2o", "prefixkv"):
        return received_attention(queries, keys)
    if compress in ("h2o-mean", "zipvl"):  # token p is seen by the queries p to n - 1
        return [received / (n - p) for p, received in enumerate(received_attention(queries, keys))]
    if compress == "l2norm":
        return [-math.sqrt(sum(x * x for x in key)) for key in keys]
    if compress == "streaming":
        return [-p for p in range(n)]
    received = received_attention(queries, keys, first=n - window)
    if compress == "finch":
        return received
    return [max(received[max(0, p - 3) : p + 4]) for p in range(n)]


def thin_keys(head: list[tuple], kept: list[int], window: int, share: float) -> list[list[float]]:
    """The keys of a prompt. Those before the window have 0 where its queries times the keys that stay are weak."""
    asking = [query for queries, _, _ in head[max(0, len(head) - window) :] for query in queries]
    strength = [
        sum(query[i] ** 2 for query in asking) * sum(head[p][1][i] ** 2 for p in kept) for i in range(len(head[0][1]))
    ]
    strong = sorted(range(len(strength)), key=lambda i: -strength[i])[: max(1, round(share * len(strength)))]
    return [
        [x if i in strong or p >= len(head) - window else 0.0 for i, x in enumerate(key)]
        for p, (_, key, _) in enumerate(head)
    ]


def received_attention(queries: list, keys: list, first: int = 0) -> list[float]:
    """Attention that each token receives from the queries at `first` and after; causal, mean over the group."""
    received = [0.0] * len(keys)
    for i in range(max(0, first), len(keys)):
        for query in queries[i]:
            for p, weight in enumerate(softmax(query, keys[: i + 1])):
                received[p] += weight / len(queries[i])
    return received


def rounded(x: list[float], bits: int, group: int, minimum: bool, turned: bool) -> list[float]:
    """A key or a value as its storage format gives it back, group of channels by group, in float32.

    turned: by a Hadamard matrix before, and back afterwards. Tests have a power of two of channels.
    """
    if bits == 16:
        return x
    if turned:
        return hadamard(rounded(hadamard(x), bits, group, minimum, False))
    group, result = group or len(x), []
    for start in range(0, len(x), group):
        part = np.array(x[start : start + group], dtype=np.float32)
        low = part.min() if minimum else np.float32(0)
        steps = 2**bits - 1 if minimum else 2 ** (bits - 1) - 1
        scale = (part.max() - low if minimum else abs(part).max()) / np.float32(steps)
        result += [float(low + scale * np.rint((number - low) / scale)) if scale else float(low) for number in part]
    return result


def hadamard(x: list[float]) -> list[float]:
    """Row i of the matrix has a minus in column j where i and j have an odd number of ones in common."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(len(x))] for i in range(len(x))]
    return [sum(sign * each for sign, each in zip(row, x, strict=True)) / math.sqrt(len(x)) for row in signs]


def softmax(query: list[float], keys: list[list[float]]) -> list[float]:
    logits = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def weighted(prob: list[float], values: list[list[float]]) -> list[float]:
    return [sum(w * value[i] for w, value in zip(prob, values, strict=True)) for i in range(len(values[0]))]
