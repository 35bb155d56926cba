"""What the benchmarks share: flags, methods as settings, runs that go on after a kill, a progress bar, results."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import cache
import kernels
import model as model_file
import scope
from benchmarks import plots, report
from cli.output import check_outputs
from cli.program import Parser, note
from generate import Options, generate, place_of, size_of
from hf.checkpoint import find_checkpoint
from scope import FORMATS, FULL, STRATEGIES, WHOLE_PROMPT, one_line, require, require_known

# ---- flags ------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def make_parser(name: str, about: str) -> Parser:
    return Parser(name, description=about.split("\n")[0], formatter_class=Help)


def number(kind: type, holds: Callable, wanted: str) -> Callable:
    """An argparse type: numbers of which something holds."""

    def parse(text: str):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


positive = number(int, lambda x: x >= 1, "1 or more")
share = number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
rate = number(float, lambda x: 0 <= x <= 1, "0 to 1")


def add_source_flags(parser: Parser, columns: str):
    """Where the lines of the table come from; the benchmark adds its own sources to the group."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--mini", action="store_true", help="make problems of the bundled model's kind")
    source.add_argument("--data", metavar="FILE.jsonl", help=f"rows with {columns}, as published")
    return source


def add_problem_flags(group, unit: str) -> None:
    group.add_argument("--k", type=positive, default=16, help=f"mini: questions per {unit[:-1]}")
    group.add_argument(f"--{unit}", type=positive, default=24, help=f"mini: {unit} per seed")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help=f"mini: seeds of the {unit}")
    group.add_argument("--reference-rate", type=rate, default=0.4, help="mini: share of cross-references")
    group.add_argument("--limit", type=positive, help="data: only the first rows")
    group.add_argument("--no-chat", action="store_true", help="data: plain prompts, no chat template")


ALL_PROMPTS = "below 1: all methods keep this share of the prompt, chosen by compress=h2o or what --set says"


def add_method_flags(
    group, methods: list[str], budgets: list[float], shares: list[float] | None = None, share_help: str = ALL_PROMPTS
) -> None:
    """budgets: default shares of the output; shares: of the prompt."""
    group.add_argument("--methods", nargs="+", default=methods, metavar="NAME[:FIELD=VALUE,...]", help="table lines")
    several = {"type": share, "nargs": "+", "metavar": "SHARE"}
    budget_help = "heavy + recent, as shares of the longest output"
    group.add_argument("--decode-budget", **several, default=budgets, help=budget_help)
    group.add_argument("--recent", type=int, help="recent tokens of every decode budget (default: half of it)")
    group.add_argument("--prompt-share", **several, default=shares or [1.0], help=share_help)
    group.add_argument("--set", default="", metavar="FIELD=VALUE,...", help="settings of all methods")


def add_model_flags(group) -> None:
    group.add_argument("--checkpoint", default=Options.checkpoint, metavar="DIR_OR_HUB_ID", help="of the model")
    group.add_argument("--device", default=Options.device, help="cpu, cuda, cuda:1")
    group.add_argument("--dtype", default=Options.dtype, help="of weights and cache")


def add_run_flags(group) -> None:
    add_model_flags(group)
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: only with --data)")
    where = "predictions are appended here as they come, and a run continues where the file ends "
    where += "(default: none; data: NAME.predictions.jsonl in this directory)"
    group.add_argument("--predictions", metavar="FILE.jsonl", help=where)


def add_result_flags(group) -> None:
    group.add_argument("--json", metavar="FILE", help="the table and more, as JSON")
    group.add_argument("--plot", metavar="FILE.png", help="the figures as curves")


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse what argparse cannot refuse, before a long run finds out. Flags that a benchmark lacks do not count."""
    given = vars(arguments)
    for method in given.get("methods", []):
        parse_method(method)
    inputs = {flag: given.get(name) for flag, name in (("--data", "data"), ("--score-only", "score_only"))}
    inputs |= {f"--text {path}": path for path in given.get("text") or []}
    for flag in (flag for flag, path in inputs.items() if path == ""):  # a shell variable that is not set
        raise ValueError(f"{flag.strip()} is '': give a file name")
    if given.get("checkpoint") is not None:
        inputs["--checkpoint"] = place_of(arguments.checkpoint)
    outputs = {"--json": "json", "--plot": "plot", "--predictions": "predictions"}
    check_outputs({flag: given.get(name) for flag, name in outputs.items()}, inputs)
    plots.check_plot(arguments.plot)


def parse_data_flags(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Arguments with `name`: what the data are called ("" for --mini). It names the file of predictions too."""
    arguments = parser.parse_args(argv)
    arguments.name = Path(arguments.data or getattr(arguments, "hub", None) or "").stem
    if arguments.name and arguments.predictions is None:
        arguments.predictions = f"{arguments.name}.predictions.jsonl"
    check_flags(arguments)
    return arguments


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
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
                rows.append(parse(row))
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError) as error:
                note(f"{path}:{number}: skipped: {one_line(error)}")
    return rows


class Kind(NamedTuple):
    """What a field of a row must be, in words and as a test."""

    words: str
    holds: Callable[[object], bool]

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.words} or {other.words}", lambda x: self.holds(x) or other.holds(x))


def is_whole(x) -> bool:
    """JSON can name half a character (a lone surrogate), which no tokenizer, plot or terminal takes."""
    return isinstance(x, str) and x == x.encode("utf-8", "replace").decode()


NOTHING = Kind("null", lambda x: x is None)
TEXT = Kind("a text", lambda x: isinstance(x, str))
WHOLE_TEXT = Kind("a text without half a character (a lone surrogate)", is_whole)
COUNT = Kind("a whole number of 0 or more", lambda x: type(x) is int and 0 <= x < 2**63)
AMOUNT = Kind("a number of 0 or more", lambda x: type(x) in (int, float) and 0 <= x < 1e100)  # no NaN, no infinity
POSITIVE = Kind("a number above 0", lambda x: AMOUNT.holds(x) and x > 0)
NUMBER = Kind("a number", lambda x: type(x) in (int, float) and abs(x) < 1e100)
INT = Kind("a whole number", lambda x: type(x) is int and abs(x) < 2**63)
BOOL = Kind("true or false", lambda x: isinstance(x, bool))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list, of one or more items or of just so many."""

    def holds(x) -> bool:
        return isinstance(x, list) and len(x) == (length or max(1, len(x))) and all(map(kind.holds, x))

    return Kind(f"a list of {length or 'one or more'}, each {kind.words}", holds)


def record(kinds: dict[str, Kind]) -> Kind:
    """A JSON object that has at least these fields."""

    def holds(x) -> bool:
        return isinstance(x, dict) and all(name in x and kind.holds(x[name]) for name, kind in kinds.items())

    return Kind("an object with " + ", ".join(f"{name} ({kind.words})" for name, kind in kinds.items()), holds)


STATS = record(dict.fromkeys(("prompt_slots", "decode_slots", "live_peak", "kv_bytes", "tokens_per_s"), AMOUNT))


def check_fields(row: dict, kinds: dict[str, Kind]) -> None:
    """ValueError names the first field that is not what it must be."""
    for name, kind in kinds.items():
        if not kind.holds(row.get(name)):
            found = shortened(json.dumps(row[name])) if name in row else "missing"
            raise ValueError(f"`{name}` is {found}: it must be {kind.words}")


def shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]} ..."


def read_some_rows(path: Path | str, parse: Callable[[dict], object], limit: int | None = None) -> list:
    rows = read_rows(path, parse)[:limit]
    if not rows:
        raise ValueError(f"{path} has no usable row")
    return rows


# ---- methods: a policy, and whatever else of generate.Options makes it one line of a table -----------------

# Settings with flags of their own, the same for all methods, and those that greedy decoding has no use for.
NOT_OF_A_METHOD = {"checkpoint", "policy", "max_new_tokens", "batch_size", "device", "dtype", "compile"}
NOT_OF_A_METHOD |= {"temperature", "top_k", "top_p", "seed", "samples"}
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
        options = Options(**self.settings)
        settings = asdict(options) | {"layer_shares": options.rules()[1].shares}  # not the name of their file
        return {name: value for name, value in settings.items() if name not in ONLY_SPEED}


class Sizes(NamedTuple):
    """What the shares are shares of, in tokens."""

    prompt: float
    output: int


def make_jobs(arguments: argparse.Namespace, methods: list[str], shares: list[float], run: dict, sizes: Sizes):
    """A Job for every method at every budget, all with the same slots: prompt share x prompt + decode budget.

    run: the settings that no method chooses. What --set and a method say goes before what the budgets say.
    """
    common, jobs = parse_settings(arguments.set), {}
    for share, budget, method in product(shares, arguments.decode_budget, methods):
        total = round(budget * sizes.output)
        recent = total // 2 if arguments.recent is None else arguments.recent
        require(0 <= recent <= total, "--recent", recent, f"0 to {total}, the decode budget")
        budgets = {"compress": WHOLE_PROMPT.compress, "heavy": total - recent, "recent": recent}
        if share < 1:
            budgets |= {"compress": "h2o", "prompt_budget": round(share * sizes.prompt)}
        job = make_job(method, run | budgets, common | parse_method(method), share, budget, sizes)
        jobs.setdefault(json.dumps(job.effective()), job)  # two jobs with the same settings are one
    return list(jobs.values())


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


def progress(total: int, unit: str) -> tqdm:
    """A bar on a terminal, and nothing elsewhere."""
    form = "{desc} {percentage:3.0f}% |{bar:30}| {n:.0f}/{total} " + unit + ", {remaining} left"
    return tqdm(total=total, bar_format=form, leave=False, disable=None)


def run_jobs(
    model,
    inputs: list,
    asked: list[dict],
    jobs: list[Job],
    arguments: argparse.Namespace,
    predict: Callable,
    check: Callable[[dict], None],
    unit: str,
) -> list[dict]:
    """Rows {"key", **job.labels, **asked[i], **prediction}, one for each job and input.

    Only those are made that are not in the file of predictions yet. predict(missing, job, bar) yields (i, prediction)
    of the missing inputs; inputs: for each prompt, everything but the job that decides the tokens. In between it may
    move the bar by parts of an input. check(row) raises ValueError for a row of the file that cannot be used.
    """
    path, weights = arguments.predictions, fingerprint(model, arguments.checkpoint)
    texts = [[json.dumps([job.effective(), weights, each]) for each in inputs] for job in jobs]
    keys = [[hashlib.sha256(text.encode()).hexdigest()[:20] for text in row] for row in texts]
    of_key = {key: own for row in keys for key, own in zip(row, asked, strict=True)}
    predictions = Predictions(path, lambda row: check(row | of_key[row["key"]]) if row["key"] in of_key else None)
    missing = [[i for i, key in enumerate(row) if key not in predictions.rows] for row in keys]
    total, left = len(jobs) * len(inputs), sum(map(len, missing))
    if left < total:
        note(f"{path}: {total - left} of {total} predictions are there")
    bar, done = progress(left, unit), 0
    for job, row, lacking in zip(jobs, keys, missing, strict=True):
        if lacking:
            tqdm.write(f"{job.labels['method']}: {len(lacking)} {unit}", file=sys.stderr)
        for i, prediction in predict(lacking, job, bar) if lacking else ():
            predictions.add({"key": row[i]} | job.labels | asked[i] | prediction)
            done += 1
            bar.update(done - bar.n)
    bar.close()
    pairs = [(job, own, key) for job, row in zip(jobs, keys, strict=True) for own, key in zip(asked, row, strict=True)]
    return [predictions.rows[key] | job.labels | own for job, own, key in pairs]


def fingerprint(model: torch.nn.Module, checkpoint: str) -> str:
    """A digest of what decides the tokens beside the settings: weights, tokenizer, stop tokens and the cache's code."""
    digest = hashlib.blake2b(str(next(model.parameters()).dtype).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    folder = find_checkpoint(place_of(checkpoint))
    texts = [path for path in folder.iterdir() if path.suffix in (".json", ".model", ".jinja")]
    code = [Path(module.__file__) for module in (cache, kernels, model_file, scope)]
    for path in sorted(texts) + code:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def predict(model, tokenizer, prompts: list, missing: list[int], job: Job, bar: tqdm) -> Iterator:
    """(index, prediction) of each missing prompt, a batch at a time."""
    rows = min(job.settings["batch_size"], len(missing))
    step = rows / job.settings["max_new_tokens"]
    chosen = [prompts[i] for i in missing]
    alone = cache_of_one(model, prompts, Options(**job.settings))
    caches: list[cache.Cache] = []

    def on_step(running: cache.Cache) -> None:
        caches[:] = [running]
        bar.update(step)

    for n, result in enumerate(generate(model, tokenizer, chosen, on_step=on_step, **job.settings)):
        stats = asdict(result.stats) | alone | {"live_peak": live_peak(caches[0], n % rows, len(result.token_ids) - 1)}
        yield missing[n], {"pred": result.text, "finish_reason": result.finish_reason, "stats": stats}


def cache_of_one(model, prompts: list[list[int]], options: Options) -> dict:
    """What one prompt needs, whichever prompts ran together: a run that was resumed has the same figures."""
    with torch.device("meta"):  # shapes only
        size = size_of(prompts, replace(options, batch_size=1))
        dtype = next(model.parameters()).dtype
        own = cache.Cache(model.config, *options.rules(), size, dtype, FORMATS[options.kv_format])
        longest = max(map(len, prompts))
        full = cache.Cache(model.config, FULL, WHOLE_PROMPT, size._replace(lengths=[longest]), dtype)
    slots = zip(("prompt_slots", "decode_slots"), own.slots, strict=True)
    means = {name: round(sum(each) / len(each)) for name, each in slots}
    return means | {"kv_bytes": own.nbytes, "kv_bytes_full": full.nbytes}


def live_peak(running: cache.Cache, row: int, steps: int) -> float:
    """The most tokens that this row of a batch held at a time per KV head, the mean of the layers."""
    prompt = running.kept[:, row].float().mean().item()
    return prompt + (running.held_of_output(steps).amax(0).float().mean().item() if steps else 0.0)


class Predictions:
    """Finished prompts by key, in a .jsonl file that a run reads first and then appends to; None: no file.

    check(row) raises ValueError for a row that this run cannot use. It is named and left in the file.
    """

    START = b'{"key": "'  # of every line

    def __init__(self, path: str | None, check: Callable[[dict], None] = lambda row: None):
        self.path = Path(path) if path else None
        self.rows: dict[str, dict] = {}
        if self.path and self.path.exists():
            cut_half_line(self.path, self.START)
            self.rows = {row["key"]: row for row in read_rows(self.path, partial(with_key, check))}

    def add(self, row: dict) -> None:
        self.rows[row["key"]] = row
        if self.path:
            with open(self.path, "ab") as file:
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def with_key(check: Callable[[dict], None], row: dict) -> dict:
    if not isinstance(row.get("key"), str):
        raise ValueError("no `key`: not a prediction of this program")
    check(row)
    return row


def cut_half_line(path: Path, start: bytes) -> None:
    """Cut off a last line that a killed run left half written. A file that begins or ends otherwise is refused."""
    content = path.read_bytes()
    last = content.rpartition(b"\n")[2]
    if not all(line.startswith(start[: len(line)]) for line in (content, last)):
        raise ValueError(f"{path} has lines that are no predictions: give another --predictions")
    if last:
        note(f"{path}: the last line is half written ({len(last)} bytes): that prompt runs again")
        os.truncate(path, len(content) - len(last))


# ---- results ----------------------------------------------------------------------------------------------


def publish(
    arguments: argparse.Namespace, lines: list[dict], columns: report.Columns, panels, highlighted, legend=""
) -> None:
    """Write the JSON and the plot that the flags ask for, and print the table. panels(lines) -> what is plotted."""
    report.write_json(arguments.json, {"arguments": vars(arguments), "lines": lines})  # first: printing may fail
    if arguments.plot:
        plots.plot(arguments.plot, panels(lines), highlighted)
    report.show(report.accuracy_table(lines, columns, legend))
