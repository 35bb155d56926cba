"""The naive twin of the cache: the paper read literally, lists of positions in plain Python, nothing preallocated.

One `Oracle` is one (row, KV head). Every step it appends, attends over its list, and where the paper selects, it
sorts and rebuilds the list: top-k and gather, what `cache.py` must equal as a set.
"""

import math


def paper_budget(name: str, heavy: int, recent: int, T: int, t: int) -> float:
    """The most generated tokens that a selection at step t leaves (design: section 3; paper: Eq. 3 and 4)."""
    if name == "full":
        return math.inf
    if name in ("slide", "recent"):
        return heavy + recent
    if t <= recent:
        return recent
    return min(heavy + recent, recent + heavy * (t - recent) // (T - recent))


def paper_interval(name: str, heavy: int, recent: int, T: int) -> int:
    return max(1, (T - recent) // heavy) if name == "discontinuous" and heavy else 1


def paper_selects(name: str, heavy: int, recent: int, T: int, t: int) -> bool:
    return t > recent and (t - recent) % paper_interval(name, heavy, recent, T) == 0


class Oracle:
    def __init__(self, name: str, heavy: int, recent: int, score: str, T: int, prompt: list[tuple]):
        """prompt: (key, value) of each prompt token, each a list of floats."""
        self.setting = (name, heavy, recent, T)
        self.score = score
        self.entries = dict(enumerate(prompt))  # position -> (key, value)
        self.prompt_len = len(prompt)
        self.generated: list[int] = []  # live positions, oldest first
        self.totals: dict[int, float] = {}

    @property
    def live(self) -> set[int]:
        return set(range(self.prompt_len)) | set(self.generated)

    def step(self, t: int, queries: list[list[float]], key: list[float], value: list[float]) -> list[list[float]]:
        """One decode step of one KV head; queries are those of its group. Returns one output per query."""
        position = self.prompt_len + t - 1
        self.entries[position] = (key, value)
        self.generated.append(position)
        self.totals[position] = 0.0
        attended = [self.attend(query) for query in queries]
        mean = {p: sum(prob[p] for prob, _ in attended) / len(attended) for p in self.generated}
        for p in self.generated:
            self.totals[p] = mean[p] + (self.totals[p] if self.score == "cumulative" else 0.0)
        self.select(t)
        return [output for _, output in attended]

    def attend(self, query: list[float]) -> tuple[dict[int, float], list[float]]:
        live = sorted(self.live)
        logits = [
            sum(a * b for a, b in zip(query, self.entries[p][0], strict=True)) / math.sqrt(len(query)) for p in live
        ]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        prob = {p: w / sum(weights) for p, w in zip(live, weights, strict=True)}
        output = [sum(prob[p] * self.entries[p][1][i] for p in live) for i in range(len(query))]
        return prob, output

    def select(self, t: int) -> None:
        name, heavy, recent, T = self.setting
        if not paper_selects(name, heavy, recent, T, t):
            return
        excess = len(self.generated) - paper_budget(name, heavy, recent, T, t)
        protected = heavy + recent if name == "recent" else recent
        older = self.generated[: max(0, len(self.generated) - protected)]
        goes = sorted(older, key=lambda p: (self.totals[p], p))[: max(0, excess) if excess > 0 else 0]
        self.generated = [p for p in self.generated if p not in goes]
