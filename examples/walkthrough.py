"""One KV head, six slots, step by step: the printed blocks of docs/walkthrough.md.

    python examples/walkthrough.py            print them
    python examples/walkthrough.py --write    put them into docs/walkthrough.md

The cache is the real one. Only q, k and v are made by hand, so that the attention of every step is a round number.
"""

import math
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cache import Cache, CacheSize  # noqa: E402
from model import ModelConfig  # noqa: E402
from scope import WHOLE_PROMPT, Policy  # noqa: E402

PAGE = ROOT / "docs" / "walkthrough.md"
PROMPT = 2  # tokens, at positions 0 and 1; the token of step t has position t + 1
SIZE = 16  # channels of a head: room for 16 positions, and sqrt(SIZE) is a whole number

# The attention that the query of each step gives to each live position. A row sums to 1.
SLIDE = [
    {0: 0.5, 1: 0.3, 2: 0.2},
    {0: 0.4, 1: 0.2, 2: 0.3, 3: 0.1},
    {0: 0.3, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.4},
    {0: 0.3, 1: 0.1, 2: 0.1, 3: 0.2, 4: 0.1, 5: 0.2},
    {0: 0.2, 1: 0.1, 2: 0.1, 4: 0.1, 5: 0.2, 6: 0.3},
    {0: 0.1, 1: 0.1, 2: 0.1, 4: 0.1, 6: 0.5, 7: 0.1},
]
DISCONTINUOUS = SLIDE[:4] + [
    {0: 0.3, 1: 0.1, 2: 0.1, 5: 0.2, 6: 0.3},
    {0: 0.2, 1: 0.1, 2: 0.1, 5: 0.1, 6: 0.2, 7: 0.3},
    {0: 0.2, 1: 0.1, 2: 0.1, 5: 0.1, 6: 0.2, 7: 0.1, 8: 0.2},
]


def blocks() -> list[str]:
    """The page's printed blocks, in order: a plan, the prompt and six steps; then a plan and four steps."""
    every_step = run("slide", SLIDE)
    every_third = run("discontinuous", DISCONTINUOUS)
    return every_step + [every_third[0], *every_third[5:]]


def run(policy: str, attention: list[dict[int, float]]) -> list[str]:
    """The plan, the cache after prefill, and the cache after each step."""
    T = len(attention)
    config = ModelConfig(16, SIZE, SIZE, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=SIZE)
    size = CacheSize(batch=1, lengths=[PROMPT], T=T, prompt_slots=PROMPT)
    cache = Cache(config, Policy(policy, heavy=2, recent=1, score="cumulative"), WHOLE_PROMPT, size, torch.float32)
    printed = [show_plan(cache)]

    cache.begin_prefill([PROMPT])
    [attend] = cache.prefill_attention(torch.arange(1))
    tokens = torch.stack([token(0), token(1)])[None, None]  # [1, 1, 2, SIZE]
    attend(torch.zeros_like(tokens), tokens, tokens)
    printed.append("prefill\n" + show_slots(cache))

    for t, weights in enumerate(attention, 1):
        select, reads = cache.graph_keys[t - 1]
        now = cache.step_input(t, select, reads)
        before = positions(cache)
        new = token(PROMPT + t - 1)[None, None, None]
        output = cache.layers[0](query(weights), new, new, *now)  # v is one-hot: the output is the attention
        printed.append(show_step(cache, t, before, output.flatten().tolist()))
    return printed


def token(position: int) -> Tensor:
    """k and v of a token: one channel of its own, so that a query can address it and the output names it."""
    return torch.eye(SIZE)[position]


def query(weights: dict[int, float]) -> Tensor:
    """A query whose softmax over the live keys gives exactly these weights."""
    q = torch.zeros(1, 1, 1, SIZE)
    for position, weight in weights.items():
        q[..., position] = math.log(weight) * math.sqrt(SIZE)
    return q


# ---- printing


def positions(cache: Cache) -> list[int]:
    return cache.positions().flatten().tolist()


def show_plan(cache: Cache) -> str:
    plan = cache.plan[:, 0].tolist()
    rows = [f"{t:>3} {reuse:>7} {fresh:>7} {evict:>7}" for t, (reuse, fresh, evict) in enumerate(plan, 1)]
    return "\n".join(["  t   reuse   fresh   evict", *rows])


def show_step(cache: Cache, t: int, before: list[int], given: list[float]) -> str:
    after = positions(cache)
    kind = "select" if cache.graph_keys[t - 1][0] else "append"
    new = PROMPT + t - 1
    evict = cache.plan[t - 1, 0, 2].item()
    held = [now if now >= 0 else old for now, old in zip(after, before, strict=True)]  # while this step attended
    title = f"t = {t}, {kind}: position {new} goes to slot {after.index(new)}"
    title += f", {evict} must die" if evict else ""
    attention = [f"{given[position]:.2f}" if position >= 0 else "" for position in held]
    return f"{title}\n{show_slots(cache, attention)}"


def show_slots(cache: Cache, attention: list[str] | None = None) -> str:
    layer = cache.layers[0]
    score = [""] * PROMPT + [f"{x:.2f}" for x in layer.score.flatten().tolist()]
    rows = [line("slot", range(len(score)))]
    rows += [line("attention", attention)] if attention else []
    rows += [line("score", score), line("pos", positions(cache))]
    return "\n".join([*rows, f"victims    {layer.victims.flatten().tolist()}"])


def line(name: str, cells) -> str:
    cells = [f"{cell:>6}" for cell in cells]
    return f"{name:<9}{''.join(cells[:PROMPT])}  |{''.join(cells[PROMPT:])}".rstrip()


def written(page: str) -> str:
    """The page with its text blocks printed anew."""
    fresh = iter(blocks())
    return re.sub(r"```text\n.*?```", lambda _: f"```text\n{next(fresh)}\n```", page, flags=re.DOTALL)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text()))
    else:
        print("\n\n".join(blocks()))
