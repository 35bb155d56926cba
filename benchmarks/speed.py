"""How fast a decode step is under each policy, against the full static cache and against the memory's speed.

python benchmarks/speed.py --shape cpu --workload 1024+1024 2048+4096 --json speed.json --plot speed.png
python benchmarks/speed.py --shape cpu --eviction                       what eviction adds to the same attention instead
python benchmarks/speed.py --shape cpu --prefill 4096 16384             what choosing prompt tokens costs instead
python benchmarks/speed.py --shape cpu --samples 4                      four answers to a prompt, or four copies of it
python benchmarks/speed.py --shape smollm2 --depths 4 30                how compile time grows with depth instead
python benchmarks/speed.py --checkpoint DIR --peers transformers-static real weights, and other programs that run them

Without --checkpoint the weights are random. Every policy runs in the engine that generate.py runs. Policies and peers
take turns of a few steps in one process, so that whatever else the machine does slows all of them alike.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels
from benchmarks import common, machine, peers, plots, report
from benchmarks.common import parse_method, positive
from benchmarks.machine import SHAPES, random_model, random_prompts
from benchmarks.report import figure
from cache import Cache, CacheSize
from cli.program import note, run_program
from generate import Engine, Options
from hf import load_checkpoint
from hf.checkpoint import find_device, find_dtype
from model import Llama
from scope import COMPRESSORS, FULL, WHOLE_PROMPT, PromptPolicy, require

TURN = 8  # steps: the first finds another policy's data in the CPU's caches (10 % slower), most must not
EVICTION_ROUNDS = 40
OBS_WINDOW = 32  # prefill: last tokens of the prompt that every compressor keeps
WARM_UP = 64  # prefill: tokens of the one before the one that is timed
WINDOWS = 16  # of a run, equally long: a curve has one point in each
QUICK = {"shape": "mini", "workload": ["24+32"], "batch_sizes": [1, 2], "prompt_budget": 40, "rounds": 1}


def main(argv: list[str] | None = None) -> int:
    return run_program("speed.py", lambda: benchmark(parse_arguments(sys.argv[1:] if argv is None else argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    name = next((name for name in ("prefill", "eviction", "depths", "samples") if getattr(arguments, name)), "decode")
    work, columns, legend = MODES[name]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    about = {"command": " ".join(["python benchmarks/speed.py", *arguments.argv])}
    about |= machine.describe(find_device(arguments.device))
    note(f"this machine reads {about['read_bandwidth'] / 1e9:.3g} GB/s")
    lines = []
    for line in work(arguments, about["read_bandwidth"]):
        lines.append(line)
        report.write_json(arguments.json, about | {name: lines})  # a run that is cut short leaves what it has
    if arguments.plot:
        plots.plot(arguments.plot, panels(lines), [])
    report.show(f"{report.table(lines, columns)}\n{legend}")


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser("speed.py", __doc__)
    add_work_flags(parser.add_argument_group("what runs"))
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", default=Options.device, help="cpu, cuda, cuda:1")
    group.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    group.add_argument("--threads", type=positive, default=1, help="of the CPU")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="or run eagerly")
    common.add_result_flags(parser.add_argument_group("results"))
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args(argv, argparse.Namespace(argv=argv))
    arguments.policies = list(dict.fromkeys([FULL.name, *arguments.policies]))  # full first: others are compared to it
    check_arguments(arguments)
    return arguments


def add_work_flags(group) -> None:
    group.add_argument("--shape", choices=SHAPES, default="cpu", help="1b, 8b: Llama-3.2-1B, Llama-3.1-8B")
    group.add_argument("--checkpoint", metavar="DIR_OR_HUB_ID", help="real weights and their shape instead")
    others = "other programs that run the same checkpoint: "
    group.add_argument("--peers", nargs="+", choices=peers.PEERS, default=[], help=others + ", ".join(peers.PEERS))
    pair = {"nargs": "+", "default": ["1024+1024"], "metavar": "PROMPT+NEW"}
    group.add_argument("--workload", **pair, help="tokens of every prompt, and to generate")
    group.add_argument("--batch-sizes", type=positive, nargs="+", default=[1], metavar="ROWS", help="prompts at a time")
    policies = {"nargs": "+", "default": ["slide", "adaptive", "discontinuous"], "metavar": "NAME[:FIELD=VALUE,...]"}
    group.add_argument("--policies", **policies, help="full always runs too; heavy and recent are 1/16 of NEW each")
    mode = group.add_mutually_exclusive_group()
    eviction = "time steps against a full cache of as many slots instead"
    mode.add_argument("--eviction", action="store_true", help=eviction)
    mode.add_argument("--prefill", type=positive, nargs="+", metavar="TOKENS", help="time prompt compressors instead")
    samples = "time steps of so many answers to each prompt, stored once or in each row, instead"
    mode.add_argument("--samples", type=positive, metavar="ANSWERS", help=samples)
    mode.add_argument("--depths", type=positive, nargs="+", metavar="LAYERS", help="time cold compilation instead")
    group.add_argument("--prompt-budget", type=int, default=2048, help="prefill: prompt tokens that they keep")
    group.add_argument("--rounds", type=positive, default=3, help="prefill: runs of each compressor")
    group.add_argument("--quick", action="store_true", help="small defaults: does it run at all?")


def sizes_of(workload: str) -> tuple[int, int]:
    """PROMPT+NEW: tokens of each prompt, and to generate after it."""
    prompt, _, new = workload.partition("+")
    sizes = [int(part) if part.isdecimal() else 0 for part in (prompt, new)]
    holds = sizes[0] >= 1 and sizes[1] >= 2
    require(holds, "--workload", workload, "PROMPT+NEW, say 1024+1024, with NEW at least 2")
    return sizes[0], sizes[1]


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what argparse cannot refuse, before a long run finds out."""
    find_dtype(arguments.dtype, {})
    for policy, workload in product(arguments.policies, arguments.workload):
        options_of(arguments, policy, workload)
    PromptPolicy(WHOLE_PROMPT.compress, arguments.prompt_budget, OBS_WINDOW)  # refuses what is impossible
    for tokens in arguments.prefill or []:
        wanted = f"more than --prompt-budget {arguments.prompt_budget}: else there is nothing to choose"
        require(tokens > arguments.prompt_budget, "--prefill", tokens, wanted)
    if arguments.plot and (arguments.eviction or arguments.prefill or arguments.depths or arguments.samples):
        raise ValueError("--plot draws decode steps: it does not go with --eviction, --prefill, --depths or --samples")
    if arguments.samples:
        require(arguments.samples > 1, "--samples", arguments.samples, "2 or more: one answer shares with nobody")
        for policy, workload in product(arguments.policies, arguments.workload):
            with_samples(options_of(arguments, policy, workload), arguments.samples)
    if arguments.checkpoint and (arguments.prefill or arguments.depths):
        raise ValueError("--checkpoint goes neither with --prefill nor with --depths: name a --shape")
    if arguments.depths and not arguments.compile:
        raise ValueError("--depths times the compiler: leave out --no-compile")
    peers.check_peers(arguments.peers, arguments.checkpoint)
    if arguments.eviction and len(arguments.policies) == 1:
        raise ValueError("--eviction compares policies with full: name another one with --policies")
    common.check_flags(arguments)


def options_of(arguments: argparse.Namespace, policy: str, workload: str) -> Options:
    """Of one policy. With a heavy and recent sixteenth each, 1024 new tokens give 64 + 64, and 4096 give 256 + 256."""
    _, new = sizes_of(workload)
    shared = {"heavy": new // 16, "recent": new // 16, "max_new_tokens": new, "compile": arguments.compile}
    return Options(**shared | parse_method(policy), ignore_eos=True)


def in_child(what: str, work: Callable, *given):
    """work(*given), run in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        try:
            return child.submit(work, *given).result()
        except (ValueError, RuntimeError) as error:  # BrokenProcessPool too: killed because memory ran out
            raise ValueError(f"{what}: {error}") from error


# ---- runners: policies that take turns ----------------------------------------------------------------------


Group = tuple[int, bool, int]  # window of the run, whether it selects, decode slots read: steps that do the same work


@dataclass
class Runner:
    """One policy or peer of a race, and the seconds of each of its steps."""

    name: str
    engine: Engine  # or a peer, which decodes like one
    counted: Engine  # whose slots and bytes count: its own, of a peer those of the full cache
    seconds: list[float] = field(default_factory=list)

    def step(self, t: int) -> None:
        started = time.perf_counter()
        self.engine.decode(t)
        self.engine.wait()
        self.seconds.append(time.perf_counter() - started)

    def groups(self) -> list[Group]:
        """Of each step, the window of the run that it lies in, and the graph that it runs."""
        steps = len(self.seconds)
        return [(i * WINDOWS // steps, *self.counted.cache.graph_keys[i]) for i in range(steps)]


def make_runner(model: Llama, prompts: list[list[int]], name: str, options: Options) -> Runner:
    """Compiled and with its cache filled. The second prefill counts: the first one also warms up."""
    rows = len(prompts) * options.samples
    size = CacheSize(rows, [len(prompts[0])], options.max_new_tokens, samples=options.samples)
    greedy = kernels.Sampler(Options(temperature=0.0), []).to(model.embed.weight.device)
    engine = Engine(model, options, [], size, greedy)
    for _ in range(2):
        engine.prefill(prompts, list(range(len(prompts))))
    return Runner(name, engine, engine)


def make_peers(arguments: argparse.Namespace, model: Llama, prompts: list[list[int]], new: int) -> dict:
    """Made before the engines: to import transformers changes what torch's guards look at, and graphs compile anew."""
    where = find_dtype(arguments.dtype, {}), model.embed.weight.device
    made = {}
    for name in arguments.peers:
        note(f"{name} ...")
        made[name] = peers.make_peer(name, arguments.checkpoint, prompts, new, *where)
    return made


def take_turns(runners: list[Runner], steps: int) -> None:
    """TURN steps of every policy, again and again; another one goes first every time."""
    bar = common.progress(steps, "steps")
    for number, first in enumerate(range(1, steps + 1, TURN)):
        turn = range(first, min(first + TURN, steps + 1))
        start = number % len(runners)
        for each in runners[start:] + runners[:start]:
            for t in turn:
                each.step(t)
        bar.update(len(turn))
    bar.close()


def work_of(arguments: argparse.Namespace) -> Iterator[tuple[dict, Llama, list[list[int]]]]:
    """For each workload and batch size: the labels of its lines, the model and the prompts. Nothing is left behind."""
    model = model_of(arguments)
    for workload, batch in product(arguments.workload, arguments.batch_sizes):
        note(f"{workload}, batch {batch}")
        labels = {"shape": arguments.checkpoint or arguments.shape, "workload": workload, "batch": batch}
        yield labels, model, random_prompts(model.config, batch, sizes_of(workload)[0])
        machine.release(model.embed.weight.device)


def model_of(arguments: argparse.Namespace) -> Llama:
    if arguments.checkpoint:
        return load_checkpoint(arguments.checkpoint, arguments.device, arguments.dtype)[0]
    return random_model(arguments.shape, find_device(arguments.device), arguments.dtype)


# ---- decoding: every policy against the full cache ------------------------------------------------------------


def compare_decode(arguments: argparse.Namespace, read_speed: float) -> Iterator[dict]:
    for labels, model, prompts in work_of(arguments):
        options = {policy: options_of(arguments, policy, labels["workload"]) for policy in arguments.policies}
        rivals = make_peers(arguments, model, prompts, options[FULL.name].max_new_tokens)
        runners = [make_runner(model, prompts, policy, each) for policy, each in options.items()]
        runners += [Runner(name, peer, runners[0].counted) for name, peer in rivals.items()]
        take_turns(runners, options[FULL.name].max_new_tokens - 1)
        for runner in runners:
            yield labels | line_of(runner, runners[0], read_speed)
        del runner, runners, rivals


def line_of(runner: Runner, full: Runner, read_speed: float) -> dict:
    """One policy: seconds, bytes, and ratios to the full cache and to what the memory's speed allows.

    worst_point: the longest step over full's, of the windows. read_bytes: what a step must read, the mean of the run;
    swept_bytes: the same with dead slots. A ratio compares two steps that ran close together.
    """
    engine, groups = runner.counted, runner.groups()
    own = steadied(runner.seconds, groups)
    over_full = steadied([a / b for a, b in zip(runner.seconds, full.seconds, strict=True)], groups)
    kinds = gathered(own, [selects for _, selects, _ in groups])
    weights, live = weight_bytes(engine.model), live_bytes(engine.cache)
    read, swept = weights + mean(live), weights + mean(swept_bytes(engine.cache))
    return {
        "policy": runner.name,
        "tokens_per_s": engine.size.batch / mean(own),
        "step_s": mean(own),
        "append_s": mean(kinds[False]) if False in kinds else None,
        "select_s": mean(kinds[True]) if True in kinds else None,
        "compile_s": runner.engine.compile_s,
        "floor_s": read / read_speed,
        "step_over_floor": mean(own) * read_speed / read,
        "speed_ratio": 1 / mean(over_full),
        "worst_point": max(by_window(over_full, groups)),
        "bytes_ratio": (weights + mean(swept_bytes(full.engine.cache))) / swept,
        "kv_bytes": engine.cache.nbytes,
        "read_bytes": read,
        "swept_bytes": swept,
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
    return [mean(members) for members in gathered(values, [window for window, *_ in groups]).values()]


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
    """K and V of one token in one layer, with what their storage format adds."""
    layer = cache.layers[0]
    n_bytes = sum(part.nbytes for slots in (layer.k, layer.v) for part in slots.buffers())
    return n_bytes // (layer.pos.shape[0] * layer.pos.shape[2])


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
    "compile s": figure("compile_s", ".1f"),
}
DECODE_LEGEND = """
x full: tokens/s over the full static cache's; x bytes: what the bytes of weights and slots that a step runs over make
of it. worst: the longest step time over full's, of 16 windows of the run. append, select: ms of the two kinds of step.
floor: ms to read the weights and the live K and V ("read") once at the speed of this machine. KV: allocated. Of peers,
bytes and kinds of step are those of the full cache."""


def panels(lines: list[dict]) -> list[plots.Panel]:
    """For each workload and batch size: step time and live bytes along the run."""
    made = []
    for group in report.grouped(lines, "workload", "batch"):
        title = f"{group[0]['workload']}, batch {group[0]['batch']}"
        for label, name, unit in (("step (ms)", "step_s_at_t", 1e-3), ("live K and V (MB)", "live_bytes_at_t", 1e6)):
            curves = {x["policy"]: [(t, y / unit) for t, y in zip(x["t"], x[name], strict=True)] for x in group}
            made.append(plots.Panel(title, "generated tokens", label, curves))
    return made


# ---- eviction: what it adds to a step ---------------------------------------------------------------------------


def compare_eviction(arguments: argparse.Namespace, read_speed: float) -> Iterator[dict]:
    """A full cache of as many slots runs the same attention and does not score, select or keep books."""
    for labels, model, prompts in work_of(arguments):
        for policy in arguments.policies[1:]:
            options = options_of(arguments, policy, labels["workload"])
            own = make_runner(model, prompts, policy, options)
            slots = max(own.engine.cache.slots[1])
            plain = replace(options, policy=FULL.name, max_new_tokens=max(slots, 2))
            times = beside(make_runner(model, prompts, FULL.name, plain), own)
            yield labels | {"policy": policy, "slots": slots} | times
            machine.release(own.engine.device)


def beside(full: Runner, own: Runner) -> dict:
    """Medians of a full cache's last step and of the policy's last selecting step, TURN steps of each in turn."""
    steps = {"full_s": (full, last_step(full, False)), "select_s": (own, last_step(own, True))}
    seconds: dict[str, list[float]] = {name: [] for name, (_, t) in steps.items() if t}
    for _, name in product(range(EVICTION_ROUNDS), seconds):
        runner, t = steps[name]
        for _ in range(TURN):
            runner.step(t)
        seconds[name] += runner.seconds[1:]  # the first finds another policy's data in the CPU's caches
        runner.seconds.clear()
    return {name: median(values) for name, values in seconds.items()}


def last_step(runner: Runner, selects: bool) -> int | None:
    """The last step of this kind that reads all slots; None: there is none."""
    keys = runner.engine.cache.graph_keys[:-1]
    most = max(reads for _, reads in keys)
    return max((t for t, key in enumerate(keys, 1) if key == (selects, most)), default=None)


EVICTION_COLUMNS = WORK_COLUMNS | {
    "slots": figure("slots", ".0f"),
    "full ms": figure("full_s", ".2f", 1e-3),
    "select": figure("select_s", ".2f", 1e-3),
    "select / full": lambda line: f"{line['select_s'] / line['full_s']:.2f}" if "select_s" in line else "",
}
EVICTION_LEGEND = """
slots: for decoding. full: a step of a full cache of as many slots, which does not score, select or keep books."""


# ---- samples: many answers to a prompt that is stored once ------------------------------------------------------


def with_samples(options: Options, samples: int) -> Options:
    return replace(options, samples=samples, temperature=1.0)


def compare_samples(arguments: argparse.Namespace, read_speed: float) -> Iterator[dict]:
    """Each policy's answers share their prompts' slots, beside as many rows with a copy each. Both choose greedily."""
    for labels, model, prompts in work_of(arguments):
        for policy in arguments.policies:
            options = options_of(arguments, policy, labels["workload"])
            shared = make_runner(model, prompts, policy, with_samples(options, arguments.samples))
            copies = make_runner(model, [ids for ids in prompts for _ in range(arguments.samples)], policy, options)
            take_turns([shared, copies], options.max_new_tokens - 1)
            yield labels | {"policy": policy, "samples": arguments.samples} | samples_line(shared, copies)
            del shared, copies
            machine.release(model.embed.weight.device)


def samples_line(shared: Runner, copies: Runner) -> dict:
    """A ratio compares two steps that ran close together."""
    groups, pairs = shared.groups(), zip(shared.seconds, copies.seconds, strict=True)
    times = {"shared_s": shared.seconds, "copies_s": copies.seconds, "ratio": [own / copy for own, copy in pairs]}
    found = {name: mean(steadied(values, groups)) for name, values in times.items()}
    kv_bytes = {"kv_bytes": shared.engine.cache.nbytes, "copies_kv_bytes": copies.engine.cache.nbytes}
    return found | {"speed_ratio": 1 / found["ratio"]} | kv_bytes


SAMPLES_COLUMNS = WORK_COLUMNS | {
    "answers": figure("samples", ".0f"),
    "shared ms": figure("shared_s", ".2f", 1e-3),
    "copies ms": figure("copies_s", ".2f", 1e-3),
    "x copies": figure("speed_ratio", ".2f"),
    "KV MB": figure("kv_bytes", ".1f", 1e6),
    "copies MB": figure("copies_kv_bytes", ".1f", 1e6),
}
SAMPLES_LEGEND = """
A step of all answers, where a prompt is stored once for its answers, and where each row has a copy. batch: prompts."""


# ---- prefill: what choosing prompt tokens adds to it --------------------------------------------------------------


TIMED = [name for name, row in COMPRESSORS.items() if not row.measured]  # nothing was measured for random weights


def compare_prefill(arguments: argparse.Namespace, read_speed: float) -> Iterator[dict]:
    runs: dict[tuple[int, str], list[dict]] = {}
    work = list(product(range(arguments.rounds), arguments.prefill, TIMED))  # A B A B
    bar = common.progress(len(work), "prefills")
    for _, tokens, compressor in work:
        runs.setdefault((tokens, compressor), []).append(run_child(arguments, compressor, tokens))
        bar.update()
    bar.close()
    for tokens, compressor in runs:
        yield prefill_line(arguments, runs, tokens, compressor)


def run_child(arguments: argparse.Namespace, compressor: str, tokens: int) -> dict:
    """A process of its own has a peak of memory of its own."""
    return in_child(f"prefill of {tokens} tokens, {compressor}", prefill_once, arguments, compressor, tokens)


def prefill_once(arguments: argparse.Namespace, compressor: str, tokens: int) -> dict:
    """In the child: seconds of one prompt's prefill, and the most memory that the process ever held."""
    torch.set_num_threads(arguments.threads)
    prompt = {"compress": compressor, "prompt_budget": arguments.prompt_budget, "obs_window": OBS_WINDOW}
    options = Options(policy=FULL.name, max_new_tokens=1, compile=False, **prompt)
    device, lengths = find_device(arguments.device), [WARM_UP, tokens]
    model = random_model(arguments.shape, device, arguments.dtype)
    engine = Engine(model, options, [], CacheSize(1, lengths, options.max_new_tokens))
    for length in lengths:
        engine.prefill(random_prompts(model.config, 1, length), [0])
    return {"prefill_s": engine.prefill_s, "peak_bytes": machine.peak_bytes(device)}


def prefill_line(arguments: argparse.Namespace, runs: dict, tokens: int, compressor: str) -> dict:
    """Medians of the rounds. A ratio compares two runs of the same round."""
    own, plain = runs[tokens, compressor], runs[tokens, WHOLE_PROMPT.compress]
    return {
        "shape": arguments.shape,
        "prompt": tokens,
        "compressor": compressor,
        "prefill_s": median(run["prefill_s"] for run in own),
        "ratio": median(a["prefill_s"] / b["prefill_s"] for a, b in zip(own, plain, strict=True)),
        "peak_bytes": median(run["peak_bytes"] for run in own),
        "scores_bytes": SHAPES[arguments.shape].n_heads * tokens**2 * torch.float32.itemsize,
    }


PREFILL_COLUMNS = {
    "compressor": lambda line: line["compressor"],
    "prompt": figure("prompt", ".0f"),
    "prefill s": figure("prefill_s", ".2f"),
    "x plain": figure("ratio", ".2f"),
    "peak MB": figure("peak_bytes", ".0f", 1e6),
    "S x S": figure("scores_bytes", ".0f", 1e6),
}
PREFILL_LEGEND = """
peak: of the whole process. S x S: what one layer's scores would take if they were stored at once, in MB."""


# ---- compile time: how it grows with depth ------------------------------------------------------------------------


def compare_depths(arguments: argparse.Namespace, read_speed: float) -> Iterator[dict]:
    """All graphs of one policy, compiled in a child with an empty cache of compiled code, for each number of layers."""
    first = None
    for layers in arguments.depths:
        note(f"{arguments.shape} with {layers} layers ...")
        with tempfile.TemporaryDirectory() as empty:
            line = in_child(f"compiling {layers} layers", compile_once, arguments, layers, empty)
        first = first or line
        ratios = {f"{name}_ratio": line[f"{name}_s"] / first[f"{name}_s"] for name in ("compile", "cpu")}
        yield {"shape": arguments.shape, "policy": arguments.policies[-1], "layers": layers} | line | ratios


def compile_once(arguments: argparse.Namespace, layers: int, compiled_code: str) -> dict:
    """In the child. cpu_s counts the C++ compiler's seconds too; a busy machine changes them least."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled_code
    torch.set_num_threads(arguments.threads)
    SHAPES[arguments.shape] = replace(SHAPES[arguments.shape], n_layers=layers)
    model = random_model(arguments.shape, find_device(arguments.device), arguments.dtype)
    workload = arguments.workload[0]
    options = options_of(arguments, arguments.policies[-1], workload)
    prompt, new = sizes_of(workload)
    before = cpu_seconds()
    engine = Engine(model, options, [], CacheSize(arguments.batch_sizes[0], [prompt], new))
    graphs = len(set(engine.cache.graph_keys))
    return {"graphs": graphs, "compile_s": engine.compile_s, "cpu_s": cpu_seconds() - before}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


DEPTH_COLUMNS = {
    "policy": lambda line: line["policy"],
    "layers": figure("layers", ".0f"),
    "graphs": figure("graphs", ".0f"),
    "compile s": figure("compile_s", ".1f"),
    "ratio": figure("compile_ratio", ".2f"),
    "CPU s": figure("cpu_s", ".1f"),
    "CPU ratio": figure("cpu_ratio", ".2f"),
}
DEPTH_LEGEND = """
Cold, of the last policy and the first workload. ratio: to the first line. CPU s: of torch and of the C++ compiler."""


MODES = {
    "decode": (compare_decode, DECODE_COLUMNS, DECODE_LEGEND),
    "eviction": (compare_eviction, EVICTION_COLUMNS, EVICTION_LEGEND),
    "samples": (compare_samples, SAMPLES_COLUMNS, SAMPLES_LEGEND),
    "prefill": (compare_prefill, PREFILL_COLUMNS, PREFILL_LEGEND),
    "depths": (compare_depths, DEPTH_COLUMNS, DEPTH_LEGEND),
}


if __name__ == "__main__":
    sys.exit(main())
