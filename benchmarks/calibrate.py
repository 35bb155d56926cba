"""How the layers of a model should share a prompt budget: measured on prompts, for --compress prefixkv and zipvl.

python benchmarks/calibrate.py --checkpoint DIR --data FILE.jsonl --out SHARES.json
python generate.py --checkpoint DIR --compress prefixkv --layer-shares SHARES.json --prompt-budget 512

A layer whose attention rests on few prompt tokens needs few of them. A share is a layer's number of tokens over the
mean of the layers. It is measured once for a model, so every size of a run is known before the cache is allocated.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import kernels
from benchmarks import common, report
from benchmarks.report import figure
from cli.output import check_outputs
from cli.program import note, run_program
from cli.prompts import encode, read_file
from generate import Options, check_run, load, place_of
from model import Llama


def main(argv: list[str] | None = None) -> int:
    return run_program("calibrate.py", lambda: calibrate(parse_arguments(argv)))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser("calibrate.py", __doc__)
    common.add_model_flags(parser)
    parser.add_argument("--data", required=True, metavar="FILE.jsonl", help="prompts, as generate.py's --prompt-file")
    parser.add_argument("--chat", action="store_true", help="apply the chat template")
    parser.add_argument("--limit", type=common.positive, help="only the first prompts")
    total = "prefixkv: the share of a prompt that all layers together keep"
    parser.add_argument("--keep", type=common.share, default=0.25, metavar="SHARE", help=total)
    mass = "zipvl: the share of a layer's attention that the tokens it keeps receive"
    parser.add_argument("--mass", type=common.share, default=0.975, metavar="SHARE", help=mass)
    parser.add_argument("--out", required=True, metavar="FILE.json", help="for generate.py's --layer-shares")
    arguments = parser.parse_args(argv)
    inputs = {"--data": arguments.data, "--checkpoint": place_of(arguments.checkpoint)}
    check_outputs({"--out": arguments.out}, inputs)
    return arguments


def calibrate(arguments: argparse.Namespace) -> None:
    prompts = read_file(Path(arguments.data))[: arguments.limit]
    model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.dtype)
    ids = [encode(prompt, tokenizer, arguments.chat, None) for prompt in prompts]
    check_run(model.config, ids, Options(max_new_tokens=1))
    counts = []
    for number, each in enumerate(ids, 1):
        counts.append(measure(model, each, arguments.keep, arguments.mass))
        taken = statistics.mean(counts[-1]["zipvl"]) / len(each)
        note(f"prompt {number} of {len(ids)}: {len(each)} tokens, a mass of {arguments.mass} takes {taken:.0%} of them")
    shares = {name: mean_shares([row[name] for row in counts]) for name in counts[0]}
    report.write_json(arguments.out, {"arguments": vars(arguments), "prompts": len(ids), "shares": shares})
    lines = [{"layer": layer, **{name: shares[name][layer] for name in shares}} for layer in range(len(model.layers))]
    report.show(report.table(lines, {"layer": figure("layer", ".0f")} | {name: figure(name, ".2f") for name in shares}))


def measure(model: Llama, ids: list[int], keep: float, mass: float) -> dict[str, list[int]]:
    """For each compressor that reads shares: the tokens of this prompt that each layer needs."""
    curves = mass_curves(model, ids)
    one_mass = tokens_at_one_mass(curves, round(keep * curves.numel()))
    return {"prefixkv": one_mass.tolist(), "zipvl": tokens_for(mass, curves).tolist()}


@torch.inference_mode()
def mass_curves(model: Llama, ids: list[int]) -> Tensor:
    """[n_layers, S] float64: the share of a layer's attention that its best 1, 2, ... S tokens receive.

    The attention that a token receives is summed over all queries of the prompt; the mean of the KV heads counts.
    """
    block = torch.tensor([ids], device=model.embed.weight.device)
    lengths, received = torch.tensor([len(ids)], device=block.device), []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        received.append(kernels.received_attention(q, k, lengths)[0].mean(0))
        return kernels.causal_attention(q, k, v)

    model(block, torch.arange(len(ids), device=block.device)[None], [attend] * model.config.n_layers)
    mass = torch.stack(received).double().sort(descending=True).values
    return mass.cumsum(1) / mass.sum(1, keepdim=True)


def tokens_for(mass: float, curves: Tensor) -> Tensor:
    """ZipVL (arXiv 2410.08584): the fewest tokens of each layer that receive this share of its attention, [n_layers].

    0.975 of the curve (0.6, 0.9, 0.98, 1) takes 3 tokens.
    """
    return ((curves < mass).sum(1) + 1).clamp(max=curves.shape[1])


def tokens_at_one_mass(curves: Tensor, total: int) -> Tensor:
    """PrefixKV (arXiv 2412.03409): one mass for all layers, the largest that takes at most `total` tokens, [n_layers].

    Curves (0.8, 0.9, 1) and (0.4, 0.7, 1) and 4 tokens: any mass above 0.7 and up to 0.8 takes 1 and 3.
    """
    low, high = 0.0, 1.0
    for _ in range(40):  # the published code repeats until it is near, which never ends where tokens tie
        middle = (low + high) / 2
        if tokens_for(middle, curves).sum() <= total:
            low = middle
        else:
            high = middle
    return tokens_for(low, curves)


def mean_shares(counts: list[list[int]]) -> list[float]:
    """counts: for each prompt, the tokens of each layer -> shares with the mean 1, the mean of the prompts."""
    rows = [[tokens / statistics.mean(row) for tokens in row] for row in counts]
    return [statistics.mean(layer) for layer in zip(*rows, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
