"""What the benchmarks share: flags, methods as settings, runs that go on after a kill, a progress bar, results."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks import plots, report
from generate import Options, Parser, Result, check_outputs, generate, note
from hf.checkpoint import read_json
from scope import FULL, STRATEGIES, WHOLE_PROMPT, one_line, require, require_known

# ---- flags ------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def make_parser(name: str, about: str) -> Parser:
    return Parser(name, description=about.split("\n")[0], formatter_class=Help)


def add_source_flags(parser: Parser, columns: str):
    """Where the lines of the table come from; the benchmark adds its own sources to the group."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--mini", action="store_true", help="make problems of the bundled model's kind")
    source.add_argument("--data", metavar="FILE.jsonl", help=f"rows with {columns}, as published")
    source.add_argument("--from-json", metavar="FILE", help="show or plot what --json has saved; runs nothing")
    return source


def add_problem_flags(group, unit: str) -> None:
    group.add_argument("--k", type=int, default=16, help=f"mini: questions per {unit[:-1]}")
    group.add_argument(f"--{unit}", type=int, default=24, help=f"mini: {unit} per seed")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help=f"mini: seeds of the {unit}")
    group.add_argument("--limit", type=int, help="data: only the first rows")
    group.add_argument("--no-chat", action="store_true", help="data: plain prompts, no chat template")


def add_method_flags(group, methods: list[str], budgets: list[float], shares: list[float], share_help: str) -> None:
    """budgets: default shares of the output; shares: of the prompt."""
    group.add_argument(
        "--methods", nargs="+", default=methods, metavar="NAME[:FIELD=VALUE,...]", help="lines of the table"
    )
    budget_help = "heavy + recent, as shares of the longest output"
    group.add_argument("--decode-budget", type=float, nargs="+", default=budgets, metavar="SHARE", help=budget_help)
    group.add_argument("--recent", type=int, help="recent tokens of every decode budget (default: half of it)")
    group.add_argument("--prompt-share", type=float, nargs="+", default=shares, metavar="SHARE", help=share_help)
    group.add_argument("--set", default="", metavar="FIELD=VALUE,...", help="settings of all methods")


def add_run_flags(group) -> None:
    group.add_argument("--checkpoint", default=Options.checkpoint, metavar="DIR_OR_HUB_ID", help="of the model")
    group.add_argument("--device", default=Options.device, help="cpu, cuda, cuda:1")
    group.add_argument("--dtype", default=Options.dtype, help="of weights and cache")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: mini: no; data: yes)")
    where = "predictions are appended here as they come, and a run continues where the file ends "
    where += "(default: mini: none; data: NAME.predictions.jsonl in this directory)"
    group.add_argument("--predictions", metavar="FILE.jsonl", help=where)


def add_result_flags(group) -> None:
    group.add_argument("--json", metavar="FILE", help="the table and more, as JSON")
    group.add_argument("--plot", metavar="FILE.png", help="the figures as curves")


def check_flags(arguments: argparse.Namespace, *counts: str) -> None:
    """Refuse what argparse cannot refuse, before a long run finds out. counts: flags that need 1 or more."""
    for name in (*counts, "k", "limit"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, flag(name), value, "1 or more")
    for name in ("decode_budget", "prompt_share"):
        for share in getattr(arguments, name):
            require(0 < share <= 1, flag(name), share, "above 0 and at most 1")
    require(len(set(arguments.seeds)) == len(arguments.seeds), "--seeds", arguments.seeds, "all different")
    for method in arguments.methods:
        parse_method(method)  # refuses what there is not
    check_results(arguments, predictions_path(arguments))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_results(arguments: argparse.Namespace, predictions: str | None = None) -> None:
    inputs = {flag(name): getattr(arguments, name, None) for name in ("data", "score_only", "from_json")}
    check_outputs({"--json": arguments.json, "--plot": arguments.plot, "--predictions": predictions}, inputs)
    plots.check_plot(arguments.plot)


def data_name(arguments: argparse.Namespace) -> str:
    """What the data file is called, without its ending; "" where there is none."""
    return Path(arguments.data or getattr(arguments, "hub", None) or "").stem


def predictions_path(arguments: argparse.Namespace) -> str | None:
    name = data_name(arguments)
    return arguments.predictions or (f"{name}.predictions.jsonl" if name else None)


def run_settings(arguments: argparse.Namespace, **defaults) -> dict:
    """The settings that no method chooses: what the flags say, or else the defaults."""
    given = {name: getattr(arguments, name) for name in defaults}
    return defaults | {name: value for name, value in given.items() if value is not None}


def source_of(arguments: argparse.Namespace, *what: str) -> str:
    """The title of a run, which keeps runs apart that share a predictions file."""
    return " ".join([arguments.checkpoint, *what, arguments.set]).rstrip()


# ---- rows of .jsonl files -----------------------------------------------------------------------------------


def read_rows(path: Path | str, parse: Callable[[dict], object]) -> list:
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


def read_some_rows(path: Path | str, parse: Callable[[dict], object], limit: int | None = None) -> list:
    rows = read_rows(path, parse)[:limit]
    if not rows:
        raise ValueError(f"{path} has no usable row")
    return rows


def json_object(line: bytes) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, not {type(value).__name__}")
    return value


# ---- methods: a policy, and whatever else of generate.Options makes it one line of a table -----------------

# Settings with flags of their own, the same for all methods, and those that greedy decoding has no use for.
NOT_OF_A_METHOD = {"checkpoint", "policy", "max_new_tokens", "batch_size", "device", "dtype", "compile"}
NOT_OF_A_METHOD |= {"temperature", "top_k", "top_p", "seed"}
ONLY_SPEED = ("checkpoint", "device", "dtype", "batch_size", "compile")  # settings that change no token


def parse_method(text: str) -> dict:
    """`NAME[:FIELD=VALUE,...]`, as the command line and the tables write a method -> its settings."""
    name, _, rest = text.partition(":")
    require_known("policy", name, STRATEGIES)
    return {"policy": name} | parse_settings(rest)


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

    def effective(self) -> dict:
        """All settings, defaults included, but those that change the speed alone."""
        settings = asdict(Options(**self.settings))
        return {name: value for name, value in settings.items() if name not in ONLY_SPEED}


@dataclass(frozen=True)
class Sizes:
    """What the shares are shares of, in tokens."""

    prompt: float
    output: int


def make_jobs(arguments: argparse.Namespace, methods: list[str], shares: list[float], run: dict, sizes: Sizes):
    """A Job for every method at every budget, all with the same slots: prompt share x prompt + decode budget.

    run: the settings that no method chooses. What --set and a method say goes before what the budgets say.
    """
    common, jobs = parse_settings(arguments.set), {}
    for share in shares:
        for budget in arguments.decode_budget:
            budgets = budget_settings(share, budget, arguments.recent, sizes)
            for method in methods:
                own = common | parse_method(method)
                job = make_job(method, run | budgets, own, share, budget, sizes)
                jobs.setdefault(json.dumps(job.effective()), job)  # two jobs with the same settings are one
    return list(jobs.values())


def budget_settings(share: float, budget: float, recent: int | None, sizes: Sizes) -> dict:
    """The settings that a prompt share and a decode budget stand for."""
    total = round(budget * sizes.output)
    recent = total // 2 if recent is None else recent
    require(0 <= recent <= total, "--recent", recent, f"0 to {total}, the decode budget")
    prompt = {"compress": "h2o", "prompt_budget": round(share * sizes.prompt)} if share < 1 else {}
    return {"compress": WHOLE_PROMPT.compress, "heavy": total - recent, "recent": recent} | prompt


def make_job(method: str, settings: dict, own: dict, share: float, budget: float, sizes: Sizes) -> Job:
    """own: settings that --set or the method chose. They replace others, and the labels say what they come to."""
    settings = settings | own
    options = Options(**settings)  # refuses what is impossible
    unused = set()
    if options.policy == FULL.name:
        unused, budget = {"heavy", "recent"}, 1.0
    elif own.keys() & {"heavy", "recent"}:
        budget = round(min(1.0, (options.heavy + options.recent) / sizes.output), 3)
    if options.compress == WHOLE_PROMPT.compress:
        unused, share = unused | {"prompt_budget", "obs_window"}, 1.0
    elif share == 1 or "prompt_budget" in own:
        share = round(min(1.0, options.prompt_budget / sizes.prompt), 3)
    labels = {"method": method, "prompt_share": share, "decode_budget": budget}
    return Job(labels, {name: value for name, value in settings.items() if name not in unused})


# ---- running jobs -----------------------------------------------------------------------------------------


def run_jobs(
    model, inputs: list, asked: list[dict], jobs: list[Job], path: str | None, predict: Callable, unit: str
) -> list[dict]:
    """Rows {"key", **job.labels, **asked[i], **prediction}, one for each job and input.

    Only those are made that are not in the file of predictions yet. predict(missing, job, bar) yields (i, prediction)
    of the missing inputs; inputs: for each prompt, everything but the job that decides the tokens.
    """
    predictions, weights = Predictions(path), fingerprint(model)
    keys = [[key_of(job, weights, each) for each in inputs] for job in jobs]
    missing = [[i for i, key in enumerate(row) if key not in predictions.rows] for row in keys]
    total, left = len(jobs) * len(inputs), sum(map(len, missing))
    if left < total:
        note(f"{path}: {total - left} of {total} predictions are there")
    bar = Progress(left, unit)
    for number, job in enumerate(jobs):
        for i, prediction in predict(missing[number], job, bar):
            predictions.add({"key": keys[number][i]} | job.labels | asked[i] | prediction)
    bar.close()
    pairs = [(job, own, key) for job, row in zip(jobs, keys, strict=True) for own, key in zip(asked, row, strict=True)]
    return [predictions.rows[key] | job.labels | own for job, own, key in pairs]


def fingerprint(model: torch.nn.Module) -> str:
    """Tells two checkpoints apart, whatever they are called: the norms of all weights, and their type."""
    norms = [float(torch.linalg.vector_norm(weight, dtype=torch.float64)) for weight in model.state_dict().values()]
    return f"{sum(norms):.9e} {next(model.parameters()).dtype}"


def key_of(job: Job, weights: str, content: list | dict) -> str:
    """The same for two runs that must give the same tokens."""
    text = json.dumps([job.effective(), weights, content])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def predict(model, tokenizer, prompts: list, missing: list[int], job: Job, bar: "Progress") -> Iterator:
    """(index, prediction) of each missing prompt, a batch at a time."""
    if not missing:
        return
    before, name = bar.done, job.labels["method"]
    rows = min(job.settings["batch_size"], len(missing))
    step = rows / job.settings["max_new_tokens"]  # of a batch; stopping early makes the bar jump
    results = generate(
        model,
        tokenizer,
        [prompts[i] for i in missing],
        on_step=lambda cache: bar.show(bar.done + step, name),
        **job.settings,
    )
    for i, result in zip(missing, results, strict=True):
        yield i, prediction_of(result, rows)
        bar.show(before + result.index + 1, name)


def prediction_of(result: Result, rows: int) -> dict:
    stats = asdict(result.stats)
    stats |= {name: stats[name] / rows for name in ("kv_bytes", "kv_bytes_full")}  # of one prompt
    return {"pred": result.text, "finish_reason": result.finish_reason, "stats": stats}


class Predictions:
    """Finished prompts by key, in a .jsonl file that a run reads first and then appends to; None: no file."""

    START = b'{"key": "'  # of every line

    def __init__(self, path: str | None):
        self.path = Path(path) if path else None
        self.rows: dict[str, dict] = {}
        if self.path and self.path.exists():
            cut_half_line(self.path, self.START)
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


def cut_half_line(path: Path, start: bytes) -> None:
    """Cut off a last line that a killed run left half written. Anything but the start of a line of ours is refused."""
    with open(path, "r+b") as file:
        last = file.read().rpartition(b"\n")[2]
        if not last.startswith(start[: len(last)]):
            raise ValueError(f"{path} ends in a line that is no prediction: give another --predictions")
        if last:
            note(f"{path}: the last line is half written ({len(last)} bytes): that prompt runs again")
            file.seek(-len(last), os.SEEK_END)
            file.truncate()


class Progress:
    """A bar on standard error, redrawn in place; where that is no terminal, a line whenever the name changes."""

    WIDTH = 30
    SECONDS = 0.1  # between two drawings

    def __init__(self, total: int, unit: str = "prompts"):
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.name = ""
        self.began = time.perf_counter()
        self.drawn = 0.0
        self.terminal = sys.stderr.isatty()

    def show(self, done: float, name: str) -> None:
        self.done = min(done, self.total)
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


# ---- results ----------------------------------------------------------------------------------------------


def saved_lines(path: str, name: str = "lines") -> list[dict]:
    """The lines of a table that --json has saved."""
    lines = read_json(Path(path)).get(name)
    if not isinstance(lines, list):
        raise ValueError(f"{path} has no list in `{name}`: give a file that --json of this benchmark has written")
    return lines


def publish(
    arguments: argparse.Namespace, lines: list[dict], columns: report.Columns, panels, highlighted, legend=""
) -> None:
    """Print the table, and write the JSON and the plot that the flags ask for. panels(lines) -> what is plotted."""
    print(report.accuracy_table(lines, columns, legend))
    report.write_json(arguments.json, {"arguments": vars(arguments), "lines": lines})
    if arguments.plot:
        plots.plot(arguments.plot, panels(lines), highlighted)
