"""How fast a decode step is under each policy, against the full static cache and against the memory's speed.

python benchmarks/speed.py --shape cpu --workload 1024+1024 2048+4096 --json speed.json --plot speed.png
python benchmarks/speed.py --shape cpu --eviction                       what eviction adds to the same attention instead
python benchmarks/speed.py --shape cpu --prefill 4096 16384             what choosing prompt tokens costs instead

The weights are random, and every policy runs in the engine that generate.py runs. The policies take turns of a few
steps in one process, so that whatever else the machine does slows all of them alike.
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

from benchmarks import common, machine, plots, prefill, report
from benchmarks.common import Progress, flag, parse_method
from benchmarks.report import figure
from benchmarks.shapes import SHAPES, random_model, random_prompts
from cache import Cache, CacheSize
from generate import Engine, Options, note, run_program
from hf.checkpoint import find_device, find_dtype
from model import Llama
from scope import FULL, one_line, require

TURN = 8  # steps: the first finds another policy's data in the CPU's caches (10 % slower), most must not
EVICTION_ROUNDS = 40
WINDOWS = 16  # of a run, equally long: a curve has one point in each
QUICK = {"shape": "mini", "workload": ["24+32"], "batch_sizes": [1, 2], "prompt_budget": 40, "rounds": 1}


def main(argv: list[str] | None = None) -> int:
    return run_program("speed.py", lambda: benchmark(parse_arguments(sys.argv[1:] if argv is None else argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    if arguments.from_json:
        return show(arguments, common.saved_lines(arguments.from_json, "decode"))
    device = find_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.child:
        return print(json.dumps(prefill.once(arguments, device, *arguments.child)))
    work = prefill.compare if arguments.prefill else compare_eviction if arguments.eviction else compare_decode
    about = {"command": " ".join(["python benchmarks/speed.py", *arguments.argv])}
    try:
        work(arguments, device, about | machine.describe(device))
    except RuntimeError as error:  # torch's out-of-memory errors are of this kind, on any device
        raise error if "memory" not in str(error) else ValueError(f"out of memory: {one_line(error)[:120]}") from error


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser("speed.py", __doc__)
    add_work_flags(parser.add_argument_group("what runs"))
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", default=Options.device, help="cpu, cuda, cuda:1")
    group.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    group.add_argument("--threads", type=int, default=1, help="of the CPU")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="or run eagerly")
    results = parser.add_argument_group("results")
    common.add_result_flags(results)
    results.add_argument("--from-json", metavar="FILE", help="show or plot what --json has saved; runs nothing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # one prefill: compressor, prompt tokens
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args(argv, argparse.Namespace(argv=argv))
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
    eviction = "time steps against a full cache of as many slots instead"
    group.add_argument("--eviction", action="store_true", help=eviction)
    group.add_argument("--prefill", type=int, nargs="+", metavar="TOKENS", help="time prompt compressors instead")
    group.add_argument("--prompt-budget", type=int, default=2048, help="prefill: prompt tokens that they keep")
    group.add_argument("--rounds", type=int, default=3, help="prefill: runs of each compressor")
    group.add_argument("--quick", action="store_true", help="small defaults: does it run at all?")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what argparse cannot refuse, before a long run finds out."""
    counts = {"batch_sizes": arguments.batch_sizes, "prefill": arguments.prefill or []}
    counts |= {"threads": [arguments.threads], "rounds": [arguments.rounds]}
    for name, value in ((name, value) for name, values in counts.items() for value in values):
        require(value >= 1, flag(name), value, "1 or more")
    find_dtype(arguments.dtype, {})
    for policy, workload in product(policies_of(arguments), arguments.workload):
        options_of(arguments, policy, workload)
    prefill.check(arguments)
    if arguments.eviction and (arguments.plot or arguments.prefill):
        raise ValueError("--eviction makes one table: it goes neither with --plot nor with --prefill")
    if arguments.eviction and len(policies_of(arguments)) == 1:
        raise ValueError("--eviction compares policies with full: name another one with --policies")
    common.check_results(arguments)


def parse_workload(text: str) -> tuple[int, int]:
    """PROMPT+NEW: tokens of each prompt, and to generate after it."""
    prompt, _, new = text.partition("+")
    sizes = [int(part) if part.isdecimal() else 0 for part in (prompt, new)]
    holds = sizes[0] >= 1 and sizes[1] >= 2
    require(holds, "--workload", text, "PROMPT+NEW, say 1024+1024, with NEW at least 2")
    return sizes[0], sizes[1]


def policies_of(arguments: argparse.Namespace) -> list[str]:
    """full first: the others are compared with it."""
    return list(dict.fromkeys([FULL.name, *arguments.policies]))


def options_of(arguments: argparse.Namespace, policy: str, workload: str) -> Options:
    """Of one policy. With a heavy and recent sixteenth each, 1024 new tokens give 64 + 64, and 4096 give 256 + 256."""
    _, new = parse_workload(workload)
    budgets = {"heavy": arguments.heavy, "recent": arguments.recent}
    budgets = {name: new // 16 if given is None else given for name, given in budgets.items()}
    shared = {"max_new_tokens": new, "compile": arguments.compile, "ignore_eos": True}
    return Options(**budgets | shared | parse_method(policy))


# ---- runners: policies that take turns ----------------------------------------------------------------------


class Group(NamedTuple):
    """Steps that do the same work, close together."""

    window: int
    selects: bool
    reads: int  # decode slots


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

    def groups(self) -> list[Group]:
        """Of each step, the window of the run that it lies in, and the graph that it runs."""
        steps = len(self.stamps)
        return [Group(i * WINDOWS // steps, *self.engine.cache.graph_keys[i]) for i in range(steps)]


def make_runner(model: Llama, prompts: list[list[int]], name: str, options: Options, title: str) -> Runner:
    """Compiled and with its cache filled. The second prefill counts: the first one also warms up."""
    note(f"{title}: {name}: {'compile, ' if options.compile else ''}prefill")
    others = machine.forget_peak(model.embed.weight.device) - sum(weight.nbytes for weight in model.parameters())
    engine = Engine(model, options, [], CacheSize(len(prompts), [len(prompts[0])], options.max_new_tokens))
    for _ in range(2):
        engine.prefill(prompts, list(range(len(prompts))))
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


# ---- decoding: every policy against the full cache ------------------------------------------------------------


def compare_decode(arguments: argparse.Namespace, device: torch.device, about: dict) -> None:
    model, lines = random_model(arguments.shape, device, arguments.dtype), []
    for workload, batch in product(arguments.workload, arguments.batch_sizes):
        prompt, new = parse_workload(workload)
        title, prompts = f"{workload}, batch {batch}", random_prompts(model.config, batch, prompt)
        labels = {"shape": arguments.shape, "workload": workload, "batch": batch}
        options = {policy: options_of(arguments, policy, workload) for policy in policies_of(arguments)}
        runners = [make_runner(model, prompts, name, each, title) for name, each in options.items()]
        take_turns(runners, new - 1, title)
        lines += [labels | line_of(runner, runners[0], about["read_bandwidth"]) for runner in runners]
        report.write_json(arguments.json, about | {"decode": lines})  # what is done is safe
        del runners
        machine.release(device)
    show(arguments, lines)


def line_of(runner: Runner, full: Runner, read_speed: float) -> dict:
    """One policy: seconds, bytes, and ratios to the full cache and to what the memory's speed allows.

    worst_point: the longest step over full's, of the windows. read_bytes: what a step must read, the mean of the run;
    swept_bytes: the same with dead slots. A ratio compares two steps that ran close together.
    """
    engine, groups = runner.engine, runner.groups()
    own = steadied(runner.seconds(), groups)
    over_full = steadied([a / b for a, b in zip(runner.seconds(), full.seconds(), strict=True)], groups)
    kinds = gathered(own, [group.selects for group in groups])
    weights, live = weight_bytes(engine.model), live_bytes(engine.cache)
    read, swept = weights + mean(live), weights + mean(swept_bytes(engine.cache))
    return {
        "policy": runner.name,
        "heavy": engine.options.heavy,
        "recent": engine.options.recent,
        "tokens_per_s": engine.size.batch / mean(own),
        "step_s": mean(own),
        "append_s": mean(kinds[False]) if False in kinds else None,
        "select_s": mean(kinds[True]) if True in kinds else None,
        "prefill_s": engine.prefill_s,
        "compile_s": engine.compile_s,
        "floor_s": read / read_speed,
        "step_over_floor": mean(own) * read_speed / read,
        "speed_ratio": 1 / mean(over_full),
        "worst_point": max(by_window(over_full, groups)),
        "bytes_ratio": (weights + mean(swept_bytes(full.engine.cache))) / swept,
        "kv_bytes": engine.cache.nbytes,
        "read_bytes": read,
        "swept_bytes": swept,
        "peak_bytes": runner.peak_bytes,
        "t": by_window(range(1, len(groups) + 1), groups),
        "step_s_at_t": by_window(own, groups),
        "live_bytes_at_t": by_window(live, groups),
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


def live_bytes(cache: Cache) -> list[int]:
    """K and V of the tokens that each step attends to, all layers and rows: what it cannot do without."""
    held = cache.held_of_output(len(cache.plan) - 1)  # [steps, n_layers]; prefill gave the first of the T tokens
    tokens = (cache.kept.cpu() + held[:, :, None]).sum((1, 2))  # kept [n_layers, B]
    return [n * bytes_per_token(cache) for n in tokens.tolist()]


def swept_bytes(cache: Cache) -> list[int]:
    """K and V of the slots that each step's attention runs over: of a static full cache all, used or not."""
    slots = list(zip(*cache.slots, strict=True))  # of each layer: the prompt's, and those for decoding
    tokens = [sum(prompt + min(reads, decode) for prompt, decode in slots) for _, reads in cache.graph_keys[:-1]]
    return [n * len(cache.lengths) * bytes_per_token(cache) for n in tokens]


def bytes_per_token(cache: Cache) -> int:
    """K and V of one token in one layer."""
    k = cache.layers[0].k
    return 2 * k.shape[1] * k.shape[3] * k.element_size()


WORK_COLUMNS = {
    "policy": lambda line: line["policy"],
    "workload": lambda line: line["workload"],
    "batch": figure("batch", ".0f"),
}
DECODE_COLUMNS = WORK_COLUMNS | {
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


def show(arguments: argparse.Namespace, lines: list[dict]) -> None:
    """The table, and the plot if there is to be one."""
    read_speed = lines[0]["read_bytes"] / lines[0]["floor_s"]
    print(report.table(lines, DECODE_COLUMNS), DECODE_LEGEND.format(read_speed / 1e9), sep="\n")
    if arguments.plot:
        plots.plot(arguments.plot, panels(lines), [])


def panels(lines: list[dict]) -> list[plots.Panel]:
    """For each workload: step time and live bytes of the smallest batch; tokens/s where there are several batches."""
    made = []
    for of_workload in report.grouped(lines, "workload"):
        sizes = sorted({line["batch"] for line in of_workload})
        smallest = [line for line in of_workload if line["batch"] == sizes[0]]
        title = f"{of_workload[0]['workload']}, batch {sizes[0]}"
        made += [curves(title, "step (ms)", smallest, "step_s_at_t", 1e-3)]
        made += [curves(title, "live K and V (MB)", smallest, "live_bytes_at_t", 1e6)]
        if len(sizes) > 1:
            policies = report.grouped(of_workload, "policy")
            points = {each[0]["policy"]: [(line["batch"], line["tokens_per_s"]) for line in each] for each in policies}
            made.append(plots.Panel(of_workload[0]["workload"], "batch", "tokens/s", points, sizes))
    return made


def curves(title: str, y_label: str, lines: list[dict], name: str, unit: float) -> plots.Panel:
    points = {line["policy"]: [(t, y / unit) for t, y in zip(line["t"], line[name], strict=True)] for line in lines}
    return plots.Panel(title, "generated tokens", y_label, points)


# ---- eviction: what it adds to a step ---------------------------------------------------------------------------


def compare_eviction(arguments: argparse.Namespace, device: torch.device, about: dict) -> None:
    """A full cache of as many slots runs the same attention and does not score, select or keep books."""
    model, lines = random_model(arguments.shape, device, arguments.dtype), []
    for workload, batch, policy in product(arguments.workload, arguments.batch_sizes, policies_of(arguments)[1:]):
        options = options_of(arguments, policy, workload)
        prompts = random_prompts(model.config, batch, parse_workload(workload)[0])
        title = f"{workload}, batch {batch}"
        own = make_runner(model, prompts, policy, options, title)
        slots = max(own.engine.cache.slots[1])
        plain = replace(options, policy=FULL.name, max_new_tokens=max(slots, 2))
        labels = {"shape": arguments.shape, "workload": workload, "batch": batch, "policy": policy}
        times = beside(make_runner(model, prompts, FULL.name, plain, title), own)
        lines.append(labels | {"slots": slots} | times)
        machine.release(device)
    report.write_json(arguments.json, about | {"eviction": lines})
    print(report.table(lines, EVICTION_COLUMNS), EVICTION_LEGEND, sep="\n")


def beside(full: Runner, own: Runner) -> dict:
    """Medians of full's last step, and of the policy's last steps of both kinds, TURN steps of each in turn."""
    last = {"full_s": (full, last_step(full, False))}
    last |= {"append_s": (own, last_step(own, False)), "select_s": (own, last_step(own, True))}
    seconds: dict[str, list[float]] = {name: [] for name, (_, t) in last.items() if t}
    for _, name in product(range(EVICTION_ROUNDS), seconds):
        runner, t = last[name]
        for _ in range(TURN):
            runner.step(t)
        seconds[name] += runner.seconds()[1:]  # the first finds another policy's data in the CPU's caches
        runner.stamps.clear()
    return {name: median(values) for name, values in seconds.items()}


def last_step(runner: Runner, selects: bool) -> int | None:
    """The last step of this kind that reads all slots; None: there is none."""
    keys = runner.engine.cache.graph_keys[:-1]
    most = max(reads for _, reads in keys)
    return max((t for t, key in enumerate(keys, 1) if key == (selects, most)), default=None)


EVICTION_COLUMNS = WORK_COLUMNS | {
    "slots": figure("slots", ".0f"),
    "full ms": figure("full_s", ".2f", 1e-3),
    "append": figure("append_s", ".2f", 1e-3),
    "select": figure("select_s", ".2f", 1e-3),
    "select / full": lambda line: f"{line['select_s'] / line['full_s']:.2f}" if "select_s" in line else "",
}
EVICTION_LEGEND = """
slots: for decoding. full: a step of a full cache of as many slots, which does not score, select or keep books."""


if __name__ == "__main__":
    sys.exit(main())
