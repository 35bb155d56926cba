"""Draw what the cache holds over time, as the README shows it: python docs/picture.py

Every column is a decode step, every row a slot of one KV head of the bundled model; a colour is a kind of token.
"""

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from generate import MINI, Options, generate, load
from scope import growing

EMPTY, PROMPT, RECENT, KEPT, DEAD = range(5)
COLOURS = ["#ffffff", "#d3d8de", "#8ec3ec", "#f0913d", "#4a1d3d"]
OPTIONS = Options(heavy=24, recent=24, max_new_tokens=240, ignore_eos=True, compile=False)
INK = "#1f2933"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(Path(__file__).with_name("cache.png")))
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--head", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = load(str(MINI))
    prompt = "".join((MINI / "demo.txt").read_text().splitlines(keepends=True)[:3]) + "\n"
    full, scope = (record(model, tokenizer, prompt, name, args.layer, args.head) for name in ("full", "discontinuous"))
    draw(full, scope, args.out)
    print(f"wrote {args.out}")


@dataclass
class Recording:
    """Positions in the slots of one KV head after prefill and after each step, and the steps that select."""

    layer: int
    head: int
    frames: list[np.ndarray] = field(default_factory=list)
    selections: list[int] = field(default_factory=list)
    prompt_len: int = 0

    def __call__(self, cache) -> None:
        layer, step = cache.layers[self.layer], len(self.frames)
        if step and cache.graph_keys[step - 1][0]:
            self.selections.append(step)
        slots = np.r_[0 : cache.lengths[0].item(), layer.prompt_slots : layer.pos.shape[2]]  # without padding
        self.frames.append(layer.pos[0, self.head].numpy()[slots])

    def kinds(self) -> np.ndarray:
        """[slots, steps + 1]: an index into COLOURS."""
        held = np.stack(self.frames, axis=1)
        now = self.prompt_len - 1 + np.arange(held.shape[1])
        ever = np.maximum.accumulate(held >= 0, axis=1)
        kinds = np.where(held > now - OPTIONS.recent, RECENT, KEPT)
        kinds[held < self.prompt_len] = PROMPT
        return np.where(held >= 0, kinds, np.where(ever, DEAD, EMPTY))


def record(model, tokenizer, prompt: str, policy: str, layer: int, head: int) -> Recording:
    recording = Recording(layer, head)
    [result] = generate(model, tokenizer, [prompt], replace(OPTIONS, policy=policy), on_step=recording)
    recording.prompt_len = result.prompt_len
    return recording


def draw(full: Recording, scope: Recording, out: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold"}):
        picture, (left, right) = pyplot.subplots(1, 2, figsize=(8.3, 4.2), sharey=True, layout="constrained")
        paint(left, full, "full cache")
        paint(right, scope, "SCOPE, discontinuous")
        left.set_ylabel("slot of one KV head")
        bottom = full.prompt_len
        say(left, "prompt: stays", (120, bottom / 2))
        say(left, "older generated\ntokens", (185, bottom + 80))
        say(left, f"newest {OPTIONS.recent} tokens", (60, bottom + 115), to=(104, bottom + 91))
        say(left, "empty: not used yet", (75, bottom + 195))
        say(right, "prompt: never evicted", (120, bottom / 2))
        say(right, "these slots are never allocated", (120, bottom + 225))
        explain(right, scope)
        picture.savefig(out, dpi=200)
        pyplot.close(picture)


def paint(ax, recording: Recording, name: str) -> None:
    from matplotlib.colors import ListedColormap

    kinds = recording.kinds()
    colours = ListedColormap(COLOURS)
    ax.imshow(kinds, aspect="auto", cmap=colours, vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest")
    ax.set_title(f"{name}: {len(kinds)} slots", loc="left")
    ax.set(xlabel="decode step", ylim=(recording.prompt_len + OPTIONS.max_new_tokens, 0))
    ax.spines[["top", "right"]].set_visible(False)


def explain(ax, scope: Recording) -> None:
    """The budget as a line, a tick for every step that selects, and what the colours below the prompt mean."""
    policy, _ = OPTIONS.rules()
    kinds, steps = scope.kinds(), np.arange(1, len(scope.frames))
    budget = [scope.prompt_len + growing(policy, OPTIONS.max_new_tokens, t) for t in steps]
    ticks = len(kinds) + 8
    ax.step(steps, budget, color=INK, linewidth=1.3, where="mid")
    ax.plot(scope.selections, [ticks] * len(scope.selections), "|", color=INK, markersize=5)
    say(ax, "tick: a selection runs", (194, ticks + 60), to=(scope.selections[14], ticks + 5))
    say(ax, "line: the budget", (208, ticks + 30), to=(222, budget[221]))
    for kind, text, where in (
        (DEAD, "dead: evicted, the next\ntoken overwrites it", (54, ticks + 38)),
        (RECENT, f"newest {OPTIONS.recent} tokens", (107, ticks + 80)),
        (KEPT, "older tokens, kept for their score", (144, ticks + 112)),
    ):
        say(ax, text, where, to=middle_of(kinds == kind, around=where[0]))


def middle_of(mask: np.ndarray, around: int) -> tuple[int, float]:
    """The middle of the longest vertical stretch in the columns near `around`: a place for an arrow to point at."""
    best = (0, around, 0.0)
    for x in range(around - 15, around + 15):
        edges = np.flatnonzero(np.diff(np.r_[0, mask[:, x], 0]))
        best = max([best, *((stop - start, x, (start + stop - 1) / 2) for start, stop in edges.reshape(-1, 2))])
    return best[1], best[2]


def say(ax, text: str, where: tuple[float, float], to: tuple[float, float] | None = None) -> None:
    """Write on the picture, with an arrow where there is something to point at."""
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    style = {"ha": "center", "va": "center", "color": INK, "fontsize": 8.5}
    ax.annotate(text, to or where, xytext=where, arrowprops=arrow if to else None, **style)


if __name__ == "__main__":
    main()
