"""What choosing prompt tokens adds to a prefill: `speed.py --prefill TOKENS`.

Every run has a process of its own, and so a peak of memory of its own.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks import machine, report
from benchmarks.common import Progress
from benchmarks.report import figure
from benchmarks.shapes import SHAPES, random_model, random_prompts
from cache import CacheSize
from generate import Engine, Options
from scope import COMPRESSORS, FULL, WHOLE_PROMPT, PromptPolicy, require

OBS_WINDOW = 32  # last tokens of the prompt that every compressor keeps
WARM_UP = 64  # tokens of a prefill before the one that is timed


def check(arguments: argparse.Namespace) -> None:
    budget = arguments.prompt_budget
    PromptPolicy(WHOLE_PROMPT.compress, budget, OBS_WINDOW)  # refuses what is impossible
    wanted = f"more than --prompt-budget {budget}: else there is nothing to choose"
    for tokens in arguments.prefill or []:
        require(tokens > budget, "--prefill", tokens, wanted)
    if arguments.prefill and arguments.plot:
        raise ValueError("--plot draws decode steps: it does not go with --prefill")


def compare(arguments: argparse.Namespace, device: torch.device, about: dict) -> None:
    runs: dict[tuple[int, str], list[dict]] = {}
    work = list(product(range(arguments.rounds), arguments.prefill, COMPRESSORS))  # A B A B
    bar = Progress(len(work), "prefills")
    for number, (_, tokens, compressor) in enumerate(work, 1):
        runs.setdefault((tokens, compressor), []).append(run_child(arguments, compressor, tokens))
        bar.show(number, f"{tokens} tokens, {compressor}")
    bar.close()
    lines = [line_of(arguments, runs, *key) for key in runs]
    print(report.table(lines, COLUMNS), LEGEND, sep="\n")
    report.write_json(arguments.json, about | {"prefill": lines})


def run_child(arguments: argparse.Namespace, compressor: str, tokens: int) -> dict:
    script = str(Path(__file__).with_name("speed.py"))
    command = [sys.executable, script, *arguments.argv, "--child", compressor, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}: out of memory?"])[-1]
        raise ValueError(f"prefill of {tokens} tokens, {compressor}: {why}")
    return json.loads(done.stdout)


def once(arguments: argparse.Namespace, device: torch.device, compressor: str, tokens: str) -> dict:
    """In the child: seconds of one prompt's prefill, and the most memory that the process ever held."""
    prompt = {"compress": compressor, "prompt_budget": arguments.prompt_budget, "obs_window": OBS_WINDOW}
    options = Options(policy=FULL.name, max_new_tokens=1, compile=False, **prompt)
    model, lengths = random_model(arguments.shape, device, arguments.dtype), [WARM_UP, int(tokens)]
    engine = Engine(model, options, [], CacheSize(1, lengths, options.max_new_tokens))
    for length in lengths:
        engine.prefill(random_prompts(model.config, 1, length), [0])
    return {"prefill_s": engine.prefill_s, "peak_bytes": machine.peak_bytes(device)}


def line_of(arguments: argparse.Namespace, runs: dict, tokens: int, compressor: str) -> dict:
    """Medians of the rounds. A ratio compares two runs of the same round."""
    own, plain = runs[tokens, compressor], runs[tokens, WHOLE_PROMPT.compress]
    return {
        "shape": arguments.shape,
        "prompt": tokens,
        "compressor": compressor,
        "prefill_s": median(run["prefill_s"] for run in own),
        "ratio": median(a["prefill_s"] / b["prefill_s"] for a, b in zip(own, plain, strict=True)),
        "peak_bytes": median(run["peak_bytes"] for run in own),
        "over_plain_bytes": median(a["peak_bytes"] - b["peak_bytes"] for a, b in zip(own, plain, strict=True)),
        "scores_bytes": SHAPES[arguments.shape].n_heads * tokens**2 * torch.float32.itemsize,
    }


COLUMNS = {
    "compressor": lambda line: line["compressor"],
    "prompt": figure("prompt", ".0f"),
    "prefill s": figure("prefill_s", ".2f"),
    "x plain": figure("ratio", ".2f"),
    "peak MB": figure("peak_bytes", ".0f", 1e6),
    "over plain": figure("over_plain_bytes", ".0f", 1e6),
    "S x S": figure("scores_bytes", ".0f", 1e6),
}
LEGEND = """
peak: of the whole process. S x S: what one layer's scores would take if they were stored at once, in MB."""
