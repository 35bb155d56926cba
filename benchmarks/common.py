"""What the benchmarks share: flags, methods as settings, resumable predictions, a progress bar, tables, plots."""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from generate import Options, Result, generate, note, one_line
from scope import FULL, STRATEGIES, WHOLE, require_known

# ---- flags ------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


BUDGETS, SHARES = [0.25, 0.125], [1.0]  # of the output, of the prompt
SHARE_HELP = "below 1: all methods keep this share of the prompt, chosen by compress=h2o or what --set says"


def add_method_flags(group, methods: list[str], budgets=BUDGETS, shares=SHARES, share_help=SHARE_HELP) -> None:
    group.add_argument(
        "--methods", nargs="+", default=methods, metavar="NAME[:FIELD=VALUE,...]", help="lines of the table"
    )
    budget_help = "heavy + recent, as shares of the longest output"
    group.add_argument("--decode-budget", type=float, nargs="+", default=budgets, metavar="SHARE", help=budget_help)
    group.add_argument("--recent", type=int, help="recent tokens of every decode budget (default: half of it)")
    group.add_argument("--prompt-share", type=float, nargs="+", default=shares, metavar="SHARE", help=share_help)
    group.add_argument("--set", default="", metavar="FIELD=VALUE,...", help="settings of all methods")


def add_run_flags(group, batches: bool = True) -> None:
    group.add_argument("--checkpoint", default=Options.checkpoint, metavar="DIR_OR_HUB_ID", help="of the model")
    group.add_argument("--device", default=Options.device, help="cpu, cuda, cuda:1")
    group.add_argument("--dtype", default=Options.dtype, help="of weights and cache")
    if batches:
        group.add_argument("--batch-size", type=int, help="(default: mini: 64; data: 8)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: mini: no; data: yes)")
    where = "predictions are appended here as they come, and a run continues where the file ends "
    where += "(default: mini: none; data: NAME.predictions.jsonl in this directory)"
    group.add_argument("--predictions", metavar="FILE.jsonl", help=where)


def add_result_flags(group) -> None:
    group.add_argument("--json", metavar="FILE", help="the table and more, as JSON")
    group.add_argument("--plot", metavar="FILE.png", help="the figures as curves")


def check_flags(arguments: argparse.Namespace) -> None:
    """What argparse cannot refuse, before a long run finds out."""
    for name in ("decode_budget", "prompt_share"):
        for share in getattr(arguments, name):
            require(0 < share <= 1, name, share, "above 0 and at most 1")
    check_writable(json=arguments.json, plot=arguments.plot, predictions=arguments.predictions)
    check_plot(arguments.plot)


def check_plot(path: str | None) -> None:
    if path:
        require(Path(path).suffix in (".png", ".pdf", ".svg"), "plot", path, ".png, .pdf or .svg")
        if not find_spec("matplotlib"):
            raise ValueError("--plot needs matplotlib: pip install matplotlib")


def require(holds: bool, name: str, value, wanted: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} {value}: it must be {wanted}")


def check_writable(**paths: str | None) -> None:
    given = {"--" + name: Path(path) for name, path in paths.items() if path}
    for flag, path in given.items():
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"{flag} {path}: give a file in a directory that exists")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{flag} {path} cannot be written: no permission")
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ValueError(f"{', '.join(given)}: give each its own file")


# ---- methods: a policy, and whatever else of generate.Options makes it one line of a table -----------------

# Settings with flags of their own, the same for all methods, and those that greedy decoding has no use for.
NOT_OF_A_METHOD = {"checkpoint", "policy", "max_new_tokens", "batch_size", "device", "dtype", "compile"}
NOT_OF_A_METHOD |= {"temperature", "top_k", "top_p", "seed"}


@dataclass(frozen=True)
class Method:
    """`NAME[:FIELD=VALUE,...]`, as the command line and the tables write it."""

    text: str
    settings: dict


def parse_method(text: str) -> Method:
    name, _, rest = text.partition(":")
    require_known("policy", name, STRATEGIES)
    return Method(text, {"policy": name} | parse_settings(rest))


def parse_settings(text: str) -> dict:
    """`heavy=8,score=current` -> {"heavy": 8, "score": "current"}"""
    return dict(parse_setting(part) for part in text.split(",") if part)


def parse_setting(text: str) -> tuple[str, object]:
    """The value gets the type of the field's default."""
    name, _, value = text.partition("=")
    kinds = {field.name: type(field.default) for field in fields(Options) if field.name not in NOT_OF_A_METHOD}
    require_known("setting", name, kinds)
    try:
        return name, {"true": True, "false": False}[value] if kinds[name] is bool else kinds[name](value)
    except (ValueError, KeyError):
        raise ValueError(f"setting {name}={value}: a value of type {kinds[name].__name__} is expected") from None


@dataclass(frozen=True)
class Job:
    """One line of a table that has not run yet: what it is called, and the settings to run it with."""

    labels: dict  # source, method, prompt_share, decode_budget
    settings: dict


@dataclass(frozen=True)
class Sizes:
    """What the shares are shares of, in tokens."""

    prompt: float
    output: int


def make_jobs(arguments: argparse.Namespace, run: dict, sizes: Sizes) -> list[Job]:
    """Every method at every budget, all with the same slots: prompt share x prompt + decode budget.

    run: the settings that no method chooses. What --set and a method say goes before what the budgets say.
    """
    shared, jobs = parse_settings(arguments.set), []
    methods = [parse_method(text) for text in arguments.methods]
    for share in arguments.prompt_share:
        for budget in arguments.decode_budget:
            budgets = prompt_settings(share, sizes) | decode_settings(budget, sizes, arguments.recent)
            chosen = [(method, shared | method.settings) for method in methods]
            jobs += [make_job(method, run | budgets, own, share, budget, sizes) for method, own in chosen]
    return without_repeats(jobs)


def prompt_settings(share: float, sizes: Sizes) -> dict:
    return {"compress": "h2o", "prompt_budget": round(share * sizes.prompt)} if share < 1 else {}


def decode_settings(share: float, sizes: Sizes, recent: int | None) -> dict:
    total = round(share * sizes.output)
    recent = total // 2 if recent is None else recent
    require(0 <= recent <= total, "recent", recent, f"0 to {total}, the decode budget")
    return {"heavy": total - recent, "recent": recent}


def make_job(method: Method, settings: dict, own: dict, share: float, budget: float, sizes: Sizes) -> Job:
    settings = {"compress": WHOLE.compress} | settings | own
    options = Options(**settings)  # refuses what is impossible
    labels = {
        "method": method.text,
        "prompt_share": prompt_share(options, own, share, sizes),
        "decode_budget": decode_budget(options, own, budget, sizes),
    }
    unused = ("heavy", "recent") if options.policy == FULL.name else ()
    unused += ("prompt_budget", "obs_window") if options.compress == WHOLE.compress else ()
    return Job(labels, {name: value for name, value in settings.items() if name not in unused})


def prompt_share(options: Options, own: dict, share: float, sizes: Sizes) -> float:
    """The share that was asked for, or what a --set prompt_budget comes to."""
    if options.compress == WHOLE.compress:
        return 1.0
    if share < 1 and "prompt_budget" not in own:
        return share
    return round(min(1.0, options.prompt_budget / sizes.prompt), 3)


def decode_budget(options: Options, own: dict, budget: float, sizes: Sizes) -> float:
    if options.policy == FULL.name:
        return 1.0
    if not own.keys() & {"heavy", "recent"}:
        return budget
    return round(min(1.0, (options.heavy + options.recent) / sizes.output), 3)


def without_repeats(jobs: Iterable[Job]) -> list[Job]:
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(json.dumps(effective(job)), job)
    return list(first.values())


def effective(job: Job) -> dict:
    """All settings, defaults included, but those that change the speed alone."""
    speed = ("checkpoint", "device", "dtype", "batch_size", "compile")
    return {name: value for name, value in asdict(Options(**job.settings)).items() if name not in speed}


# ---- running jobs -----------------------------------------------------------------------------------------


def run_jobs(
    model, tokenizer, prompts: list[list[int]], asked: list[dict], jobs: list[Job], predictions: "Predictions"
) -> list[dict]:
    """A prediction per job and prompt: {"key", **job.labels, **asked[i], "pred", "finish_reason", "stats"}."""
    return complete(model, prompts, asked, jobs, predictions, partial(predict, model, tokenizer, prompts))


def complete(
    model, inputs: list, asked: list[dict], jobs: list[Job], predictions: "Predictions", predict, unit: str = "prompts"
) -> list[dict]:
    """{"key", **job.labels, **asked[i], **prediction} per job and input, of which only those are made that are not on
    disk yet. predict(missing, job, bar) yields (index, prediction); inputs: all that decides the tokens but the job.
    """
    weights = fingerprint(model)
    keys = [[key_of(job, weights, each) for each in inputs] for job in jobs]
    missing = [[i for i, key in enumerate(row) if key not in predictions.rows] for row in keys]
    total, left = len(jobs) * len(inputs), sum(map(len, missing))
    if left < total:
        note(f"{predictions.path}: {total - left} of {total} predictions are there")
    bar = Progress(left, unit)
    for number, job in enumerate(jobs):
        for i, prediction in predict(missing[number], job, bar):
            predictions.add({"key": keys[number][i]} | job.labels | asked[i] | prediction)
    bar.close()
    done = [zip(asked, row, strict=True) for row in keys]
    return [predictions.rows[key] | job.labels | own for job, row in zip(jobs, done, strict=True) for own, key in row]


def fingerprint(model: torch.nn.Module) -> str:
    """Tells two checkpoints apart, whatever they are called: the norms of all weights, and their type."""
    norms = [float(torch.linalg.vector_norm(weight, dtype=torch.float64)) for weight in model.state_dict().values()]
    return f"{sum(norms):.9e} {next(model.parameters()).dtype}"


def key_of(job: Job, weights: str, content: list | dict) -> str:
    """The same for two runs that must give the same tokens."""
    text = json.dumps([effective(job), weights, content])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def predict(model, tokenizer, prompts: list[list[int]], missing: list[int], job: Job, bar: "Progress") -> Iterator:
    """(index, prediction) of each missing prompt, a batch at a time."""
    if not missing:
        return
    rows = min(job.settings["batch_size"], len(missing))
    watch = Watch(bar, job, rows)
    results = generate(model, tokenizer, [prompts[i] for i in missing], on_step=watch, **job.settings)
    for i, result in zip(missing, results, strict=True):
        yield i, prediction_of(result, rows)
        watch.finish(result.index + 1)


def prediction_of(result: Result, rows: int) -> dict:
    stats = asdict(result.stats)
    stats |= {name: stats[name] / rows for name in ("kv_bytes", "kv_bytes_full")}  # of one prompt
    return {"pred": result.text, "finish_reason": result.finish_reason, "stats": stats}


class Watch:
    """Called after prefill and after every step: moves the bar by a batch's share of its steps."""

    def __init__(self, bar: "Progress", job: Job, rows: int):
        self.bar, self.rows, self.job = bar, rows, job
        self.before, self.finished, self.steps = bar.done, 0, 0  # prompts of other jobs, of this one; of this batch

    def __call__(self, cache) -> None:
        self.steps += 1
        running = self.rows * self.steps / self.job.settings["max_new_tokens"]
        self.bar.show(self.before + self.finished + running, self.job.labels["method"])

    def finish(self, prompts: int) -> None:
        self.finished, self.steps = prompts, 0
        self.bar.show(self.before + prompts, self.job.labels["method"])


# ---- predictions on disk ----------------------------------------------------------------------------------


class Predictions:
    """Finished prompts by key, in a .jsonl file that a run reads first and then appends to; None: no file."""

    START = b'{"key": "'  # of every line

    def __init__(self, path: str | None):
        self.path = Path(path) if path else None
        self.rows: dict[str, dict] = {}
        if self.path and self.path.exists():
            repair(self.path, self.START)
            self.rows = {row["key"]: row for row in read_rows(self.path, with_key)}

    def add(self, row: dict) -> None:
        self.rows[row["key"]] = row
        if self.path:
            with open(self.path, "ab") as file:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def with_key(row: dict) -> dict:
    if not isinstance(row.get("key"), str):
        raise ValueError("no `key`: not a prediction of this program")
    return row


def repair(path: Path, start: bytes) -> None:
    """Cut off a last line that a killed run left half written. Anything but the start of a line of ours is refused."""
    with open(path, "r+b") as file:
        last = file.read().rpartition(b"\n")[2]
        if not last.startswith(start[: len(last)]):
            raise ValueError(f"{path} ends in a line that is no prediction: give another --predictions")
        if last:
            note(f"{path}: the last line is half written ({len(last)} bytes): that prompt runs again")
            file.seek(-len(last), os.SEEK_END)
            file.truncate()


def read_rows(path: Path, parse: Callable[[dict], object]) -> list:
    """`parse(JSON object)` of every line of a .jsonl file. A malformed line is named and skipped."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    rows.append(parse(json_object(line)))
            except ValueError as error:
                note(f"{path}:{number}: skipped: {one_line(error)}")
    return rows


def json_object(line: bytes) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, not {type(value).__name__}")
    return value


# ---- figures ----------------------------------------------------------------------------------------------


def mean_and_spread(values: list[tuple[int, int, list[bool]]]) -> tuple[float, float | None] | None:
    """(seed, example, right or wrong per question) -> percent right, and the standard deviation over the seeds, or
    with one seed the standard error over the examples. None: there is no question at all."""
    several = len({seed for seed, _, _ in values}) > 1
    units: dict[int, list[bool]] = {}
    for seed, example, rights in values:
        units.setdefault(seed if several else example, []).extend(rights)
    means = [100 * statistics.mean(rights) for rights in units.values() if rights]
    if len(means) < 2:
        return (means[0], None) if means else None
    return statistics.mean(means), statistics.stdev(means) / (1 if several else math.sqrt(len(means)))


LABELS = ("source", "method", "prompt_share", "decode_budget")


def grouped(rows: list[dict], *names: str) -> list[list[dict]]:
    """Rows that agree in these fields together, groups in the order of their first row."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(groups.values())


def costs(predictions: list[dict]) -> dict:
    """slots, live_peak: tokens per KV head; kv_bytes: of one prompt, all layers. Empty for foreign predictions."""
    stats = [row["stats"] for row in predictions if "stats" in row]
    if not stats:
        return {}
    return {
        "slots": max(s["prompt_slots"] + s["decode_slots"] for s in stats),
        "live_peak": max(s["live_peak"] for s in stats),
        "kv_bytes": max(s["kv_bytes"] for s in stats),
        "tokens_per_s": statistics.mean(s["tokens_per_s"] for s in stats),
    }


# ---- tables: a line is a dict, a column a title and a function of the line ----------------------------------


def report(lines: list[dict], columns: dict[str, Callable[[dict], str]], more: str = "") -> str:
    """The table, without the columns that nothing is known for, and what must be said about it."""
    sources = list(dict.fromkeys(line["source"] or "" for line in lines))
    if len(sources) > 1:
        columns = columns | {"source": lambda line: line["source"] or ""}
    cells = {title: [cell(line) for line in lines] for title, cell in columns.items()}
    shown = {title: column for title, column in cells.items() if any(column)}
    rows = [list(row) for row in zip(*shown.values(), strict=True)]
    return "\n".join([*sources[len(sources) > 1 :][:1], table(list(shown), rows), LEGEND + more, *odd_slots(lines)])


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they must be; the first is flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in (header, rule, *rows)
    )


def known_table(lines: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """A row per line, without the columns that nothing is known for."""
    known = [{name: value for name, value in line.items() if value is not None} for line in lines]
    cells = {title: [cell(line) for line in known] for title, cell in columns.items()}
    shown = {title: column for title, column in cells.items() if any(column)}
    return table(list(shown), list(zip(*shown.values(), strict=True)))


def percent(value: float | tuple | None) -> str:
    """A mean, or a mean and its spread."""
    mean, spread = value if isinstance(value, tuple) else (value, None)
    return "" if mean is None else f"{mean:.1f}" if spread is None else f"{mean:.1f} ±{spread:4.1f}"


def share_text(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"


def figure(name: str, form: str, unit: float = 1) -> Callable[[dict], str]:
    return lambda line: format(line[name] / unit, form) if name in line else ""


def write_json(path: str | None, content: dict) -> None:
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


LABEL_COLUMNS = {
    "method": lambda line: line["method"],
    "prompt": lambda line: share_text(line["prompt_share"]),
    "decode": lambda line: share_text(line["decode_budget"]),
}
COST_COLUMNS = {
    "slots": figure("slots", ".0f"),
    "live peak": figure("live_peak", ".0f"),
    "KV MB": figure("kv_bytes", ".3g", 1e6),
    "tokens/s": figure("tokens_per_s", ".0f"),
}
LEGEND = """
prompt, decode: the shares that a method may keep. slots, live peak: tokens per KV head. KV MB: of one prompt.
Accuracy in %; ±: standard deviation over the seeds, with one seed the standard error over the prompts."""


def odd_slots(lines: list[dict]) -> list[str]:
    """Names the methods that have another number of slots than most have at the same budgets."""
    said = []
    for group in grouped([line for line in lines if "slots" in line], "source", "prompt_share", "decode_budget"):
        prompt, decode = group[0]["prompt_share"], group[0]["decode_budget"]
        [(usual, _)] = Counter(line["slots"] for line in group).most_common(1)
        names = [f"{line['method']} {line['slots']}" for line in group if line["slots"] != usual or decode == 1]
        most = "" if decode == 1 else f" (the others {usual})"
        where = f"prompt {share_text(prompt)}, decode {share_text(decode)}"
        said += [f"Other slots at {where}: {', '.join(names)}{most}"] if names else []
    return said


# ---- plots ------------------------------------------------------------------------------------------------


PERCENT = "accuracy (%)"


@dataclass
class Panel:
    """One pair of axes: percent right over x, or something else on a logarithmic axis; a line for each method."""

    title: str
    x_label: str
    lines: dict[str, list[tuple[float, float]]]
    log_x: bool = False
    y_label: str = PERCENT


def plot(path: str, panels: list[list[Panel]]) -> None:
    """Rows of panels, each with one kind of y. A method has the same colour and marker in all of them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shape = len(panels), max(map(len, panels))
    figure, axes = plt.subplots(*shape, figsize=(4.2 * shape[1], 3.6 * shape[0]), squeeze=False, sharey="row")
    names = list(dict.fromkeys(name for row in panels for panel in row for name in panel.lines))
    handles = {}
    for row, row_axes in zip(panels, axes, strict=True):
        row_axes[0].set_ylabel(row[0].y_label)
        for panel, ax in zip(row, row_axes, strict=False):
            handles |= draw(ax, panel, names)
        for ax in row_axes[len(row) :]:
            ax.set_visible(False)
    figure.legend([handles[name] for name in names], names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw(ax, panel: Panel, names: list[str]) -> dict:
    handles = {}
    for name, points in panel.lines.items():
        number = names.index(name)
        style = {"color": f"C{number % 10}", "marker": "osD^v"[number % 5], "linestyle": ("-", "--")[number // 10 % 2]}
        [handles[name]] = ax.plot(*zip(*points, strict=True), markersize=4, linewidth=1.3, **style)
    scale = {"ylim": (-2, 102)} if panel.y_label == PERCENT else {"yscale": "log"}
    ax.set(title=panel.title, xlabel=panel.x_label, **scale)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    if panel.log_x:
        ticks = sorted({x for points in panel.lines.values() for x, _ in points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
    return handles


# ---- progress and the outside of a command ------------------------------------------------------------------


class Progress:
    """A bar on standard error, redrawn in place; where that is no terminal, a line whenever the name changes."""

    WIDTH, SECONDS = 30, 0.1

    def __init__(self, total: int, unit: str = "prompts"):
        self.total, self.unit, self.done, self.name = total, unit, 0.0, ""
        self.began, self.drawn = time.perf_counter(), 0.0
        self.terminal = sys.stderr.isatty()

    def show(self, done: float, name: str) -> None:
        self.done = done
        now = time.perf_counter()
        if now - self.drawn >= self.SECONDS if self.terminal else name != self.name:
            self.drawn, self.name = now, name
            print(self.line(now - self.began), end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        share = self.done / self.total
        bar = "#" * round(share * self.WIDTH)
        start, left = ("\r\x1b[K", f"{seconds / share - seconds:.0f} s left") if self.terminal else ("", "")
        return f"{start}[{bar:.<{self.WIDTH}}] {self.done:.0f}/{self.total} {self.unit}  {self.name}  {left}".rstrip()

    def close(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def guarded(program: str, work: Callable[[], None]) -> int:
    """Exit status 0: done; 2: a mistake, said in one line; 130: interrupted."""
    try:
        work()
        return 0
    except BrokenPipeError:  # whoever read our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        note(f"{program}: error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        note(f"\n{program}: interrupted")
        return 130
