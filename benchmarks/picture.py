"""Draw what the cache holds over time, as the README shows it: python benchmarks/picture.py

Every column is a decode step, every row a slot of one KV head of the bundled model; a colour is a kind of token.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from generate import MINI, generate, load  # noqa: E402

KINDS = {"empty": "#ffffff", "prompt": "#c9ced6", "recent": "#7fb8e6", "older, kept": "#e8853b", "dead": "#f4ecec"}
T, HEAVY, RECENT = 240, 24, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "cache.png"))
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--head", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = load(str(MINI))
    prompt = "".join((MINI / "demo.txt").read_text().splitlines(keepends=True)[:6]) + "\n"
    panels = {}
    for policy in ("full", "discontinuous"):
        panels[policy] = kinds_over_time(record(model, tokenizer, prompt, policy, args.layer, args.head))
    draw(panels, args.out)
    print(f"wrote {args.out}")


def record(model, tokenizer, prompt: str, policy: str, layer: int, head: int) -> tuple[np.ndarray, int]:
    """Positions [n_slots, steps + 1] held by one KV head, and the prompt's length."""
    frames = []
    settings = {"heavy": HEAVY, "recent": RECENT, "max_new_tokens": T, "ignore_eos": True, "compile": False}

    def on_step(cache):
        frames.append(cache.layers[layer].pos[0, head].numpy().copy())

    [result] = generate(model, tokenizer, [prompt], policy, on_step=on_step, **settings)
    held = np.stack(frames, axis=1)
    slots = np.r_[0 : result.prompt_len, result.stats.prompt_slots : len(held)]  # without the prompt's padding
    return held[slots], result.prompt_len


def kinds_over_time(recorded: tuple[np.ndarray, int]) -> np.ndarray:
    """Positions -> index into KINDS."""
    held, prompt_len = recorded
    now = prompt_len - 1 + np.arange(held.shape[1])
    ever = np.maximum.accumulate(held >= 0, axis=1)
    kinds = np.where(held > now - RECENT, 2, 3)
    kinds[held < prompt_len] = 1
    return np.where(held >= 0, kinds, np.where(ever, 4, 0))


def draw(panels: dict[str, np.ndarray], out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, (policy, kinds) in zip(axes, panels.items(), strict=True):
        axis.imshow(kinds, aspect="auto", cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=len(KINDS) - 1,
                    interpolation="nearest")  # fmt: skip
        axis.set_title(f"--policy {policy}: {len(kinds)} slots")
        axis.set_xlabel("decode step")
        axis.set_ylim(max(map(len, panels.values())), 0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("slot of one KV head")
    legend = [Patch(facecolor=colour, edgecolor="#888888", label=kind) for kind, colour in KINDS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
