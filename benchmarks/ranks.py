"""Tensor parallel: the speed of several ranks on this machine, and on paper what a 70B needs in each of them.

The first mode decodes with the same threads in one process and in several, a few steps in turn, so that a machine
which gets slower does so for both. `--paper` runs nothing: it builds Llama-3-70B's shapes on torch's meta device.
"""

import argparse
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks import common, report
from benchmarks.common import positive
from benchmarks.machine import SHAPES, random_model, random_prompts
from benchmarks.speed import sizes_of
from cache import Cache, CacheSize
from cli import ranks
from cli.program import note, run_program
from generate import Engine, Options
from model import Llama, ModelConfig
from scope import require

TURN = 8  # steps: the first few find another program's data in the CPU's caches
PAUSE = 0.02  # seconds between turns: the threads of the one before have stopped looking for work


def main(argv: list[str] | None = None) -> int:
    return run_program("ranks.py", lambda: benchmark(parse_arguments(sys.argv[1:] if argv is None else argv)))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser("ranks.py", __doc__)
    parser.add_argument("--paper", action="store_true", help="only the table of Llama-3-70B")
    parser.add_argument(
        "--ranks", type=positive, default=2, help="processes with a thread each, against as many threads"
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="of a model with random weights")
    parser.add_argument(
        "--workload", default="1024+512", metavar="PROMPT+NEW", help="tokens of the prompt, and new ones"
    )
    parser.add_argument("--policy", default="slide", help="heavy and recent are 1/16 of NEW each")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="or run eagerly")
    arguments = parser.parse_args(argv)
    _, new = sizes_of(arguments.workload)
    require(new > 3 * TURN, "--workload", arguments.workload, f"PROMPT+NEW with NEW above {3 * TURN}")
    SHAPES[arguments.shape].for_rank(0, arguments.ranks)  # refuses what cannot be shared out
    return arguments


def benchmark(arguments: argparse.Namespace) -> None:
    if arguments.paper:
        report.show(report.table(paper(), PAPER_COLUMNS) + "\n" + PAPER_LEGEND)
    else:
        report.show(report.table(compare(arguments), COLUMNS) + "\n" + LEGEND)


# ---- on this machine ----------------------------------------------------------------------------------------


class Setup(NamedTuple):
    ranks: int
    threads: int  # of each


class Team:
    """The processes of one setup. They decode when they are told to."""

    def __init__(self, setup: Setup, arguments: argparse.Namespace):
        # torchrun's part: a store at which the ranks meet.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(setup.ranks):
            ours, theirs = spawn.Pipe()
            given = (theirs, rank, setup, self.store.port, arguments)
            self.processes.append(spawn.Process(target=serve, args=given, daemon=True))
            self.pipes.append(ours)
            self.processes[-1].start()
            theirs.close()  # so that a child which ends is noticed
        self.hear()  # all have compiled

    def hear(self) -> list:
        """What each rank says next."""
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise ValueError("a rank has ended: it says above why") from None

    def decode(self, first: int, steps: int) -> float:
        """Seconds that the slowest rank takes for steps from `first` on."""
        for pipe in self.pipes:
            pipe.send((first, steps))
        return max(self.hear())

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def serve(pipe, rank: int, setup: Setup, port: int, arguments: argparse.Namespace) -> None:
    """In a child: one rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"WORLD_SIZE": str(setup.ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)  # the embeddings, which each rank has, are then the same
    SHAPES[arguments.shape] = SHAPES[arguments.shape].for_rank(*ranks.join())
    model = random_model(arguments.shape, torch.device("cpu"), arguments.dtype)
    prompt, new = sizes_of(arguments.workload)
    budget = {"heavy": new // 16, "recent": new // 16}
    options = Options(policy=arguments.policy, max_new_tokens=new, compile=arguments.compile, **budget)
    engine = Engine(model, options, [], CacheSize(1, [prompt], new))
    engine.prefill(random_prompts(model.config, 1, prompt), [0])
    pipe.send("ready")
    while turn := pipe.recv():
        first, steps = turn
        started = time.perf_counter()
        for t in range(first, first + steps):
            engine.decode(t)
        pipe.send(time.perf_counter() - started)


def compare(arguments: argparse.Namespace) -> list[dict]:
    """One rank with one thread, with as many threads as there are ranks, and the ranks."""
    n = arguments.ranks
    setups = [Setup(1, 1), Setup(1, n), Setup(n, 1)]
    teams = []
    for setup in setups:
        note(f"{setup.ranks} ranks x {setup.threads} threads: compiling ...")
        teams.append(Team(setup, arguments))
    _, new = sizes_of(arguments.workload)
    turns = []
    for first in range(1, new - TURN, TURN):
        turns.append([])
        for team in teams:
            turns[-1].append(team.decode(first, TURN) / TURN)
            time.sleep(PAUSE)
    for team in teams:
        team.end()
    return [line_of(setup, i, turns) for i, setup in enumerate(setups)]


def line_of(setup: Setup, i: int, turns: list[list[float]]) -> dict:
    """A ratio compares two turns that ran one after the other; above 1, this setup is the faster one."""
    over_threads = [times[1] / times[i] for times in turns]
    line = setup._asdict() | {"step_s": median(times[i] for times in turns)}
    line |= {"over_one": median(times[0] / times[i] for times in turns), "over_threads": median(over_threads)}
    return line | {"quartiles": quantiles(over_threads, n=4)[::2]}


COLUMNS = {
    "ranks": lambda line: str(line["ranks"]),
    "threads of each": lambda line: str(line["threads"]),
    "ms a step": lambda line: f"{1000 * line['step_s']:.2f}",
    "speed over one thread": lambda line: f"{line['over_one']:.2f}",
    "speed over one rank with all threads": lambda line: f"{line['over_threads']:.2f}",
    "its quartiles": lambda line: " to ".join(f"{quartile:.2f}" for quartile in line["quartiles"]),
}
LEGEND = "Medians of turns of 8 steps, taken one after the other."


# ---- on paper -----------------------------------------------------------------------------------------------

LLAMA_70B = ModelConfig(128256, 8192, 28672, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128)
PROMPT, NEW = 8192, 8192
CACHES = {
    "full": Options(policy="full", max_new_tokens=NEW),
    "scope": Options(policy="discontinuous", heavy=768, recent=256, max_new_tokens=NEW),
    "scope_prompt": Options(
        policy="discontinuous", heavy=768, recent=256, max_new_tokens=NEW, compress="snapkv", prompt_budget=2048
    ),
}


def paper() -> list[dict]:
    return [paper_line(n_ranks) for n_ranks in (1, 2, 4, 8)]


def paper_line(n_ranks: int) -> dict:
    """What one rank holds and sends. All layers are alike, so one of them is built."""
    config = LLAMA_70B.for_rank(0, n_ranks)
    layers = config.n_layers
    line = {"ranks": n_ranks, "weights": weight_bytes(config)}
    one_layer = replace(config, n_layers=1)
    for name, options in CACHES.items():
        with torch.device("meta"):
            cache = Cache(one_layer, *options.rules(), CacheSize(1, [PROMPT], NEW), torch.bfloat16)
        line[name] = layers * sum(buffer.nbytes for buffer in cache.layers.buffers())
    hidden, vocab = 2 * config.hidden_size, 2 * config.vocab_size  # bytes of a bf16 row
    messages = 2 * layers + 1 if n_ranks > 1 else 0
    # A ring: each rank sends all but its own share of the vector, twice to sum it and once to gather it.
    sent = (n_ranks - 1) / n_ranks * (2 * layers * 2 * hidden + vocab)
    return line | {"messages": messages, "sent": sent}


def weight_bytes(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Llama(replace(config, n_layers=1))
    whole = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.layers.parameters())
    return 2 * (whole + (config.n_layers - 1) * layer)


def gigabytes(name: str):
    return lambda line: f"{line[name] / 1e9:.2f}"


PAPER_COLUMNS = {
    "ranks": lambda line: str(line["ranks"]),
    "weights, GB": gigabytes("weights"),
    "`full`, GB": gigabytes("full"),
    "`discontinuous`, GB": gigabytes("scope"),
    "with `snapkv`, GB": gigabytes("scope_prompt"),
    "messages a step": lambda line: str(line["messages"]),
    "MB sent a step": lambda line: f"{line['sent'] / 1e6:.2f}",
}
PAPER_LEGEND = f"""
Of one rank, in bf16; caches of one row with a prompt of {PROMPT:,} and {NEW:,} new tokens, heavy 768 + recent 256."""


if __name__ == "__main__":
    sys.exit(main())
