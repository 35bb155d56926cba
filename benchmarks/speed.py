"""How fast a decode step is under each policy, against the full static cache and against the memory's speed.

python benchmarks/speed.py --shape cpu --workload 1024+1024 2048+4096 --json speed.json --plot speed.png
python benchmarks/speed.py --shape cpu --eviction                       what eviction adds to the same attention instead
python benchmarks/speed.py --shape cpu --prefill 4096 16384             what choosing prompt tokens costs instead

Random weights; every policy runs in the engine that generate.py runs. The policies take turns of a few steps in one
process, so that whatever else the machine does slows all of them alike.
"""

import argparse
import json
import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common, machine, prefill
from benchmarks.common import Method, Progress, figure, parse_method, require
from benchmarks.shapes import SHAPES, random_model, random_rows
from cache import Cache, Shape
from generate import Engine, Options, Parser, Row, find_device, find_dtype, note, one_line
from model import Llama
from scope import FULL

TURN = 8  # steps: the first finds another policy's data in the CPU's caches (10 % slower), most must not
EVICTION_ROUNDS = 40
WINDOWS = 16  # of a run, equally long: a curve has one point in each
QUICK = {"shape": "mini", "workload": ["24+32"], "batch_sizes": [1, 2], "prompt_budget": 40, "rounds": 1}


def main(argv: list[str] | None = None) -> int:
    return common.guarded("speed.py", lambda: benchmark(parse_arguments(sys.argv[1:] if argv is None else argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    device = find_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.child:
        return print(json.dumps(prefill.once(arguments, device, *arguments.child)))
    try:
        report = prefill.report if arguments.prefill else eviction_report if arguments.eviction else decode_report
        about = {"command": " ".join(["python benchmarks/speed.py", *arguments.argv])}
        report(arguments, device, about | machine.describe(device))
    except RuntimeError as error:  # torch's out-of-memory errors are of this kind, on any device
        raise error if "memory" not in str(error) else ValueError(f"out of memory: {one_line(error)[:120]}") from error


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("speed.py", description=__doc__.split("\n")[0], formatter_class=common.Help)
    add_work_flags(parser.add_argument_group("what runs"))
    add_machine_flags(parser.add_argument_group("where it runs"))
    common.add_result_flags(parser.add_argument_group("results"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # one prefill: compressor, prompt tokens
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args(argv)
    arguments.argv = argv
    check_arguments(arguments)
    return arguments


def add_work_flags(group) -> None:
    group.add_argument("--shape", choices=SHAPES, default="cpu", help="1b, 8b: Llama-3.2-1B, Llama-3.1-8B")
    pair = {"nargs": "+", "default": ["1024+1024"], "metavar": "PROMPT+NEW"}
    group.add_argument("--workload", **pair, help="tokens of every prompt, and to generate")
    group.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="ROWS", help="prompts at a time")
    policies = {"nargs": "+", "default": ["slide", "adaptive", "discontinuous"], "metavar": "NAME[:FIELD=VALUE,...]"}
    group.add_argument("--policies", **policies, help="full always runs too")
    group.add_argument("--heavy", type=int, help="heavy hitters per KV head (default: 1/16 of NEW)")
    group.add_argument("--recent", type=int, help="newest tokens always kept (default: 1/16 of NEW)")
    group.add_argument(
        "--eviction", action="store_true", help="time steps against a full cache of as many slots instead"
    )
    group.add_argument("--prefill", type=int, nargs="+", metavar="TOKENS", help="time prompt compressors instead")
    group.add_argument("--prompt-budget", type=int, default=2048, help="prefill: prompt tokens that they keep")
    group.add_argument("--rounds", type=int, default=3, help="prefill: runs of each compressor")
    group.add_argument("--quick", action="store_true", help="small defaults: does it run at all?")


def add_machine_flags(group) -> None:
    group.add_argument("--device", default=Options.device, help="cpu, cuda, cuda:1")
    group.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    group.add_argument("--threads", type=int, default=1, help="of the CPU")
    group.add_argument("--no-compile", action="store_true", help="run eagerly")


def check_arguments(arguments: argparse.Namespace) -> None:
    """What argparse cannot refuse, before a long run finds out."""
    counts = {name: getattr(arguments, name) for name in ("batch_sizes", "prefill", "threads", "rounds")}
    for name, value in counts.items():
        smallest = min(value or [1]) if name in ("batch_sizes", "prefill") else value
        require(smallest >= 1, name, smallest, "1 or more")
    find_dtype(arguments.dtype, {})
    arguments.workload = [parse_workload(text) for text in arguments.workload]
    arguments.policies = [parse_method(text) for text in dict.fromkeys([FULL.name, *arguments.policies])]
    for method, workload in product(arguments.policies, arguments.workload):
        options_of(arguments, method, workload)
    prefill.check(arguments)
    if arguments.eviction and (arguments.plot or arguments.prefill):
        raise ValueError("--eviction makes one table: it goes neither with --plot nor with --prefill")
    if arguments.eviction and len(arguments.policies) == 1:
        raise ValueError("--eviction compares policies with full: name another one with --policies")
    common.check_writable(json=arguments.json, plot=arguments.plot)
    common.check_plot(arguments.plot)


@dataclass(frozen=True)
class Workload:
    """Tokens of each prompt, and to generate after it."""

    prompt: int
    new: int

    def __str__(self):
        return f"{self.prompt}+{self.new}"


def parse_workload(text: str) -> Workload:
    prompt, _, new = text.partition("+")
    sizes = [int(part) if part.isdecimal() else 0 for part in (prompt, new)]
    require(sizes[0] >= 1 and sizes[1] >= 2, "workload", text, "PROMPT+NEW, say 1024+1024, with NEW at least 2")
    return Workload(*sizes)


def options_of(arguments: argparse.Namespace, method: Method, workload: Workload) -> Options:
    """Of one policy. With a heavy and recent sixteenth each, 1024 new tokens give 64 + 64, and 4096 give 256 + 256."""
    budgets = {"heavy": arguments.heavy, "recent": arguments.recent}
    budgets = {name: workload.new // 16 if given is None else given for name, given in budgets.items()}
    shared = {"max_new_tokens": workload.new, "compile": not arguments.no_compile, "ignore_eos": True}
    return Options(**budgets | shared | method.settings)


# ---- decoding: all policies in turn -----------------------------------------------------------


@dataclass
class Runner:
    """One policy of a race. `stamps` holds the start and the end of each of its steps."""

    name: str
    engine: Engine
    peak_bytes: int | None  # of GPU memory, had it run alone; a CPU process has no such figure for one policy
    stamps: list[tuple] = field(default_factory=list)

    def step(self, t: int) -> None:
        start = machine.stamp(self.engine.device)
        self.engine.decode(t)
        self.stamps.append((start, machine.stamp(self.engine.device)))

    def seconds(self) -> list[float]:
        return [machine.seconds(*pair) for pair in self.stamps]

    def groups(self) -> list["Group"]:
        """Of each step, the window of the run that it lies in, and the graph that it runs."""
        steps = len(self.stamps)
        return [Group(i * WINDOWS // steps, *self.engine.cache.graph_at[i]) for i in range(steps)]


class Group(NamedTuple):
    """Steps that do the same work, close together."""

    window: int
    selects: bool
    reads: int  # decode slots


def decode_report(arguments: argparse.Namespace, device: torch.device, about: dict) -> None:
    model, lines = random_model(arguments.shape, device, arguments.dtype), []
    for workload, batch in product(arguments.workload, arguments.batch_sizes):
        lines += race(arguments, model, workload, batch, about["read_bandwidth"])
        common.write_json(arguments.json, about | {"decode": lines})  # what is done is safe
        machine.release(device)
    print(common.known_table(lines, DECODE_COLUMNS), DECODE_LEGEND.format(about["read_bandwidth"] / 1e9), sep="\n")
    if arguments.plot:
        plot(arguments.plot, lines)


def race(arguments: argparse.Namespace, model: Llama, workload: Workload, batch: int, read_speed: float) -> list[dict]:
    """A line of the table for each policy, full first."""
    title = f"{workload}, batch {batch}"
    rows = random_rows(model.config, batch, workload.prompt)
    runners = [runner(model, rows, m.text, options_of(arguments, m, workload), title) for m in arguments.policies]
    take_turns(runners, workload.new - 1, title)
    labels = {"shape": arguments.shape, "workload": str(workload), "batch": batch}
    return [labels | measured(each, runners[0], read_speed) for each in runners]


def runner(model: Llama, rows: list[Row], name: str, options: Options, title: str) -> Runner:
    """Compiled and with its cache filled. The second prefill counts: the first one also warms up."""
    note(f"{title}: {name}: {'compile, ' if options.compile else ''}prefill")
    others = machine.forget_peak(model.embed.weight.device) - sum(weight.nbytes for weight in model.parameters())
    engine = Engine(model, options, [], Shape(len(rows), [len(rows[0].prompt)], options.max_new_tokens))
    engine.prefill(rows)
    engine.prefill(rows)
    return Runner(name, engine, machine.peak_bytes(engine.device) - others if engine.device.type == "cuda" else None)


def take_turns(runners: list[Runner], steps: int, title: str) -> None:
    """TURN steps of every policy, again and again; another one goes first every time."""
    bar = Progress(steps, "steps")
    for number, first in enumerate(range(1, steps + 1, TURN)):
        turn = range(first, min(first + TURN, steps + 1))
        start = number % len(runners)
        for each in runners[start:] + runners[:start]:
            for t in turn:
                each.step(t)
        bar.show(turn[-1], title)
    bar.close()


# ---- figures of a race --------------------------------------------------------------------------------------


def measured(runner: Runner, full: Runner, read_speed: float) -> dict:
    """A policy's line: seconds, bytes, and ratios to the full cache and to what the memory's speed allows."""
    options, times, sizes = runner.engine.options, times_of(runner, full), sizes_of(runner)
    names = {"policy": runner.name, "heavy": options.heavy, "recent": options.recent}
    floor_s = sizes["read_bytes"] / read_speed
    ratios = {
        "floor_s": floor_s,
        "step_over_floor": times["step_s"] / floor_s,
        "bytes_ratio": sizes_of(full)["swept_bytes"] / sizes["swept_bytes"],
    }
    return names | times | sizes | ratios


def times_of(runner: Runner, full: Runner) -> dict:
    """worst_point: the longest step over full's, of the windows. A ratio compares two steps that ran close together."""
    groups = runner.groups()
    own = steadied(runner.seconds(), groups)
    over_full = steadied([a / b for a, b in zip(runner.seconds(), full.seconds(), strict=True)], groups)
    kinds = gathered(own, [group.selects for group in groups])
    return {
        "tokens_per_s": runner.engine.shape.batch / mean(own),
        "step_s": mean(own),
        "append_s": mean(kinds[False]) if False in kinds else None,
        "select_s": mean(kinds[True]) if True in kinds else None,
        "prefill_s": runner.engine.prefill_s,
        "compile_s": runner.engine.compile_s,
        "speed_ratio": 1 / mean(over_full),
        "worst_point": max(by_window(over_full, groups)),
        "t": by_window(range(1, len(groups) + 1), groups),
        "step_s_at_t": by_window(own, groups),
    }


def sizes_of(runner: Runner) -> dict:
    """Bytes of the whole batch. read_bytes: what a step must read, the mean of the run; swept: with dead slots."""
    weights, live = weight_bytes(runner.engine.model), live_bytes(runner.engine.cache)
    return {
        "kv_bytes": runner.engine.cache.nbytes,
        "read_bytes": weights + mean(live),
        "swept_bytes": weights + mean(swept_bytes(runner.engine.cache)),
        "peak_bytes": runner.peak_bytes,
        "live_bytes_at_t": by_window(live, runner.groups()),
    }


def gathered(values: Iterable[float], keys: Iterable[Hashable]) -> dict[Hashable, list[float]]:
    members: dict[Hashable, list[float]] = {}
    for value, key in zip(values, keys, strict=True):
        members.setdefault(key, []).append(value)
    return members


def steadied(values: list[float], groups: list[Group]) -> list[float]:
    """Every value becomes its group's median: hiccups vanish, a few slow select steps among appends do not."""
    medians = {group: median(members) for group, members in gathered(values, groups).items()}
    return [medians[group] for group in groups]


def by_window(values: Iterable[float], groups: list[Group]) -> list[float]:
    """The mean of each window of the run."""
    return [mean(members) for members in gathered(values, [group.window for group in groups]).values()]


def weight_bytes(model: Llama) -> int:
    """What a step reads of the model: all but the table of embeddings, of which it takes a row."""
    return sum(weight.nbytes for name, weight in model.state_dict().items() if name != "embed.weight")


def stored_bytes(model: Llama) -> int:
    """What all weights take; shared ones count once."""
    return sum({weight.data_ptr(): weight.nbytes for weight in model.parameters()}.values())


def live_bytes(cache: Cache) -> list[int]:
    """K and V of the tokens that each step attends to, all layers and rows: what it cannot do without."""
    evict = cache.plan[:-1, :, 2].cpu()  # [steps, n_layers]: prefill gave the first of the T tokens
    held = torch.arange(1, len(evict) + 1)[:, None] - evict.cumsum(0) + evict  # beyond the prompt's, per row
    tokens = (cache.kept.cpu()[None] + held[:, :, None]).sum((1, 2))  # kept [n_layers, B]
    return [n * bytes_per_token(cache) for n in tokens.tolist()]


def swept_bytes(cache: Cache) -> list[int]:
    """K and V of the slots that each step's attention runs over: of a static full cache all, used or not."""
    slots = list(zip(*cache.slots, strict=True))  # of each layer: the prompt's, and those for decoding
    tokens = [sum(prompt + min(reads, decode) for prompt, decode in slots) for _, reads in cache.graph_at[:-1]]
    return [n * len(cache.lengths) * bytes_per_token(cache) for n in tokens]


def bytes_per_token(cache: Cache) -> int:
    """K and V of one token in one layer."""
    k = cache.layers[0].k
    return 2 * k.shape[1] * k.shape[3] * k.element_size()


# ---- what eviction adds ------------------------------------------------------------------------------------


def eviction_report(arguments: argparse.Namespace, device: torch.device, about: dict) -> None:
    """A full cache of as many slots runs the same attention and does not score, select or keep books."""
    model, lines = random_model(arguments.shape, device, arguments.dtype), []
    for workload, batch, method in product(arguments.workload, arguments.batch_sizes, arguments.policies[1:]):
        options, rows = options_of(arguments, method, workload), random_rows(model.config, batch, workload.prompt)
        title = f"{workload}, batch {batch}"
        own = runner(model, rows, method.text, options, title)
        slots = max(own.engine.cache.slots[1])
        full = runner(model, rows, FULL.name, replace(options, policy=FULL.name, max_new_tokens=max(slots, 2)), title)
        labels = {"shape": arguments.shape, "workload": str(workload), "batch": batch, "policy": method.text}
        lines.append(labels | {"slots": slots} | beside(full, own))
        machine.release(device)
    common.write_json(arguments.json, about | {"eviction": lines})
    print(common.known_table(lines, EVICTION_COLUMNS), EVICTION_LEGEND, sep="\n")


def beside(full: Runner, own: Runner) -> dict:
    """Medians of full's last step, and of the policy's last steps of both kinds, TURN steps of each in turn."""
    kinds = {"full_s": (full, last_step(full, False))}
    kinds |= {f"{name}_s": (own, last_step(own, select)) for name, select in (("append", False), ("select", True))}
    seconds: dict[str, list[float]] = {}
    for _ in range(EVICTION_ROUNDS):
        for name, (each, t) in kinds.items():
            for _ in range(TURN if t else 0):
                each.step(t)
            seconds.setdefault(name, []).extend(
                each.seconds()[1:]
            )  # the first finds another's data in the CPU's caches
            each.stamps.clear()
    return {name: median(values) for name, values in seconds.items() if values}


def last_step(runner: Runner, selects: bool) -> int | None:
    """The last step of this kind that reads all slots; None: there is none."""
    graphs = runner.engine.cache.graph_at[:-1]
    most = max(reads for _, reads in graphs)
    return max((t for t, graph in enumerate(graphs, 1) if graph == (selects, most)), default=None)


# ---- table and plot ------------------------------------------------------------------------------------------------

DECODE_COLUMNS = {
    "policy": lambda line: line["policy"],
    "workload": lambda line: line["workload"],
    "batch": figure("batch", ".0f"),
    "tokens/s": figure("tokens_per_s", ".1f"),
    "x full": figure("speed_ratio", ".2f"),
    "x bytes": figure("bytes_ratio", ".2f"),
    "worst": figure("worst_point", ".2f"),
    "step ms": figure("step_s", ".2f", 1e-3),
    "append": figure("append_s", ".2f", 1e-3),
    "select": figure("select_s", ".2f", 1e-3),
    "floor": figure("floor_s", ".2f", 1e-3),
    "x floor": figure("step_over_floor", ".2f"),
    "read MB": figure("read_bytes", ".1f", 1e6),
    "KV MB": figure("kv_bytes", ".1f", 1e6),
    "peak MB": figure("peak_bytes", ".0f", 1e6),
    "prefill s": figure("prefill_s", ".2f"),
    "compile s": figure("compile_s", ".1f"),
}
DECODE_LEGEND = """
x full: tokens/s over the full static cache's; x bytes: what the bytes of weights and slots that a step runs over make
of it. worst: the longest step time over full's, of 16 windows of the run. append, select: ms of the two kinds of step.
floor: ms to read the weights and the live K and V ("read") at this machine's {:.3g} GB/s. KV: allocated."""


EVICTION_COLUMNS = {
    "policy": lambda line: line["policy"],
    "workload": lambda line: line["workload"],
    "batch": figure("batch", ".0f"),
    "slots": figure("slots", ".0f"),
    "full ms": figure("full_s", ".2f", 1e-3),
    "append": figure("append_s", ".2f", 1e-3),
    "select": figure("select_s", ".2f", 1e-3),
    "select / full": lambda line: f"{line['select_s'] / line['full_s']:.2f}" if "select_s" in line else "",
}
EVICTION_LEGEND = """
slots: for decoding. full: a step of a full cache of as many slots, which does not score, select or keep books."""


def plot(path: str, lines: list[dict]) -> None:
    """A row of three panels per workload. Curves over generated tokens are those of the smallest batch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    workloads = common.grouped(lines, "workload")
    picture, axes = plt.subplots(len(workloads), 3, figsize=(13, 3.6 * len(workloads)), squeeze=False)
    for row, of_workload in zip(axes, workloads, strict=True):
        for policy in common.grouped(of_workload, "policy"):
            draw(row, policy)
        label(row, of_workload[0])
    axes[0, 2].legend(frameon=False)
    picture.tight_layout()
    picture.savefig(path, dpi=150)
    plt.close(picture)


def draw(row, of_policy: list[dict]) -> None:
    """One policy at all batch sizes, into the three axes."""
    first = min(of_policy, key=lambda line: line["batch"])
    name = first["policy"]
    row[0].plot(first["t"], [s * 1e3 for s in first["step_s_at_t"]], label=name)
    row[1].plot(*zip(*sorted((line["batch"], line["tokens_per_s"]) for line in of_policy), strict=True), "o-")
    row[1].set_xticks(sorted(line["batch"] for line in of_policy))
    row[2].plot(first["t"], [n / 1e6 for n in first["live_bytes_at_t"]], label=name)


def label(row, line: dict) -> None:
    """line: any one of the workload, of the smallest batch."""
    where = f"{line['shape']}, {line['workload']}, batch {line['batch']}"
    row[0].set(title=where, xlabel="generated tokens", ylabel="step (ms)")
    row[1].set(title=f"{line['shape']}, {line['workload']}", xlabel="batch", ylabel="tokens/s")
    row[2].set(title=where, xlabel="generated tokens", ylabel="live K and V (MB)")
    for ax in row:
        ax.margins(y=0.1)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
