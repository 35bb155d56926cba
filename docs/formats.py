"""Draw what a byte buys in each storage format: python docs/formats.py mini.json real.json

The two files are what the benchmarks write with --json, for the commands in results.md, "Tokens against precision".
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import parse_method
from benchmarks.plots import PERCENT, Panel, plot
from scope import FORMATS

POS_AND_SCORE = 8  # bytes of a token, in each format


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mini", help="of longgenbench.py --mini; head_dim 32")
    parser.add_argument("real", help="of fidelity.py on SmolLM2; head_dim 64")
    parser.add_argument("--out", default=str(Path(__file__).with_name("formats.png")))
    arguments = parser.parse_args()
    panels = [
        Panel("Bundled model, 24 questions", X, PERCENT, curves(arguments.mini, 32, "accuracy")),
        Panel("SmolLM2-135M, prose", X, "change in NLL per token", curves(arguments.real, 64, "change")),
    ]
    plot(arguments.out, panels, list(FORMATS))
    print(f"wrote {arguments.out}")


X = "kB of generated tokens per KV head and layer, bf16"


def curves(path: str, head_dim: int, value: str) -> dict[str, list[tuple[float, float]]]:
    """For each format, a point for each decode budget: bytes of its pool, and what the table says, (mean, error)."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMATS}
    for line in json.loads(Path(path).read_text())["lines"]:
        method = parse_method(line["method"])
        if "heavy" in method:
            name = method.get("kv_format", "model")
            kilobytes = (method["heavy"] + method["recent"]) * bytes_of(name, head_dim) / 1000
            found[name].append((kilobytes, line[value][0]))
    return {name: sorted(points) for name, points in found.items()}


def bytes_of(name: str, head_dim: int) -> float:
    """One token in one KV head: codes, scales and minima in bf16, position and score."""
    codes = sum(each.bits * head_dim / 8 for each in FORMATS[name])
    scales = sum(2 * each.n_groups(head_dim) * (1 + each.minimum) for each in FORMATS[name] if each.bits < 16)
    return codes + scales + POS_AND_SCORE


if __name__ == "__main__":
    main()
