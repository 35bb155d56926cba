"""The naive twin of the cache: the papers read literally, lists of positions in plain Python, nothing preallocated.

One `Oracle` is one (row, KV head). Every step it appends, attends over its list, and where the policy selects, it
sorts and rebuilds the list: top-k and gather, what `cache.py` must equal as a set. `kept_of_prompt` does the same for
the prompt compressors.
"""

import math

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


def paper_interval(name: str, heavy: int, recent: int, T: int) -> int:
    return max(1, (T - recent) // heavy) if name == "discontinuous" and heavy else 1


def paper_selects(name: str, heavy: int, recent: int, T: int, t: int) -> bool:
    return (t > recent or name in UNIFIED) and (t - recent) % paper_interval(name, heavy, recent, T) == 0


def layer_budgets(mean: int, n_layers: int, most: int, last: float) -> list[int]:
    """Linear down to a share of the mean in the last layer; the first holds what is missing, at most `most`."""
    mean = min(mean, most)
    top = min(mean * 2 - int(mean * last), most)
    bottom = 2 * mean - top
    return [top - round((top - bottom) * layer / (n_layers - 1)) for layer in range(n_layers)]


def layer_prompt_budget(compress: str, policy: str, budget: int, layer: int, n_layers: int, n: int) -> int:
    if compress == "l2norm":
        return n if layer < 2 else budget
    last = 1 / 20 if compress == "pyramidkv" else 1 / 2 if policy == "pyramidinfer" else 1
    return layer_budgets(budget, n_layers, n, last)[layer]


def layer_decode_budget(policy: str, heavy: int, recent: int, layer: int, n_layers: int) -> tuple[int, int]:
    if policy != "pyramidinfer":
        return heavy, recent
    budget = layer_budgets(heavy + recent, n_layers, 2 * (heavy + recent), 1 / 2)[layer]
    return budget - min(recent, budget), min(recent, budget)


class Oracle:
    def __init__(self, setting: tuple, score: str, prompt: list[tuple], kept: list[int], formats: tuple):
        """prompt: (queries of the group, key, value) of each prompt token; kept: the positions that stay of it.

        formats: (bits, group, minimum, rotated) of keys and of values.
        """
        self.formats = formats
        self.name, self.heavy, self.recent, self.T = setting
        self.score = score
        self.entries = {p: self.stored(key, value) for p, (_, key, value) in enumerate(prompt) if p in kept}
        self.prompt_len, self.n_kept = len(prompt), len(kept)  # in a later turn: all that was there before the output
        received = received_attention([queries for queries, _, _ in prompt], [key for _, key, _ in prompt])
        newest = self.prompt_len - 1  # the only prompt token that just one query has seen, its own
        self.totals = {p: received[p] if self.score != "own" or p == newest else 0.0 for p in kept}

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
            if self.score == "cumulative":
                self.totals[p] += seen
            elif self.score == "current" or p == position:  # "own": the token's own query, once
                self.totals[p] = seen
        outputs = [weighted(prob, [self.entries[p][1] for p in live]) for prob in probs]
        if paper_selects(self.name, self.heavy, self.recent, self.T, t):
            for p in self.victims(t):
                del self.entries[p]
        return outputs

    def read(self, position: int, block: list[tuple]) -> list[list[list[float]]]:
        """A later turn: each token of the block sees what is left of all before it. Returns their outputs per query."""
        outputs, newest = [], position + len(block) - 1
        for p, (queries, key, value) in enumerate(block, position):
            self.entries[p] = (key, value)
            self.totals[p] = 0.0
            probs = [softmax(query, [self.entries[other][0] for other in self.live]) for query in queries]
            for i, other in enumerate(self.live):
                if self.score == "cumulative" or self.score == "own" and other == p == newest:
                    self.totals[other] += sum(prob[i] for prob in probs) / len(probs)
            outputs.append([weighted(prob, [self.entries[other][1] for other in self.live]) for prob in probs])
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

    def victims(self, t: int) -> list[int]:
        pool = [p for p in self.live if self.name in UNIFIED or p >= self.prompt_len]
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
        return sorted(older, key=lambda p: (self.totals[p], p))[:excess]


def kept_of_prompt(compress: str, budget: int, obs_window: int, heads: list[list[tuple]]) -> list[list[int]]:
    """Positions that stay for each KV head of a row; heads hold (queries of the group, key, value) per token."""
    n = len(heads[0])
    if compress == "full" or n <= budget:
        return [list(range(n)) for _ in heads]
    obs_window = min(obs_window, budget)
    newest = list(range(n - obs_window, n))
    ranked = []
    for head in heads:
        score = prompt_score(compress, obs_window, head)
        ranked.append(sorted(range(n - obs_window), key=lambda p, score=score: (-score[p], -p)))
    others = budget - obs_window
    floor = int(others * 0.2) if compress == "adakv" else others
    kept = [order[:floor] for order in ranked]
    best = {h: prompt_score(compress, obs_window, head) for h, head in enumerate(heads)}
    rest = [(h, p) for h, order in enumerate(ranked) for p in order[floor:]]
    rest.sort(key=lambda hp: (-best[hp[0]][hp[1]], -hp[1]))
    for h, p in rest[: len(heads) * (others - floor)]:
        kept[h].append(p)
    return [sorted(positions + newest) for positions in kept]


def prompt_score(compress: str, obs_window: int, head: list[tuple]) -> list[float]:
    queries, keys = [q for q, _, _ in head], [k for _, k, _ in head]
    n = len(head)
    if compress == "h2o":
        return received_attention(queries, keys)
    if compress == "l2norm":
        return [-math.sqrt(sum(x * x for x in key)) for key in keys]
    if compress == "streaming":
        return [-p for p in range(n)]
    received = received_attention(queries, keys, first=n - obs_window)
    return [max(received[max(0, p - 3) : p + 4]) for p in range(n)]


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
