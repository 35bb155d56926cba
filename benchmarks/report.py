"""Figures and tables: accuracy with its spread, what a method cost, and a table with a row for each method."""

import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

from cli.output import replace_file

LABELS = ("source", "method", "prompt_share", "decode_budget")  # rows that agree in these make one line of a table

# ---- figures ----------------------------------------------------------------------------------------------


def grouped(rows: list[dict], *names: str) -> list[list[dict]]:
    """Rows that agree in these fields together, groups in the order of their first row."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(groups.values())


def by_budget(lines: list[dict]) -> list[list[dict]]:
    """The lines of each decode budget, led by those that keep all of the output: these belong to every budget."""
    full = [line for line in lines if line["decode_budget"] == 1]
    budgets = grouped([line for line in lines if line["decode_budget"] != 1], "decode_budget")
    return [full + budget for budget in budgets or [[]]]


@dataclass(frozen=True)
class Scored:
    """The answers to one prompt, in the order of the questions. score: 1 is right, 0 is wrong."""

    seed: int
    scores: list[float]


def accuracy(scored: list[Scored], wanted=lambda prompt, i: True) -> tuple[float, float | None] | None:
    """(percent right, spread) over the answers that are wanted(number of the prompt, number of the answer).

    The spread is the standard deviation over the seeds. With one seed it is the standard error over the prompts; with
    one prompt there is none. Without a single answer that is wanted, the result is None.
    """
    several = len({row.seed for row in scored}) > 1
    units: dict[int, list[float]] = {}
    for number, row in enumerate(scored):
        chosen = [score for i, score in enumerate(row.scores) if wanted(number, i)]
        units.setdefault(row.seed if several else number, []).extend(chosen)
    means = [100 * statistics.mean(scores) for scores in units.values() if scores]
    if len(means) < 2:
        return (means[0], None) if means else None
    return statistics.mean(means), statistics.stdev(means) / (1 if several else math.sqrt(len(means)))


def accuracy_by_part(scored: list[Scored], parts: int) -> list[float | None]:
    """Percent right in each of `parts` equal stretches of the answers; None where a short one has no question."""
    found = []
    for part in range(parts):
        inside = accuracy(scored, lambda prompt, i, part=part: i * parts // len(scored[prompt].scores) == part)
        found.append(inside and inside[0])
    return found


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


# ---- tables: a line is a dict, a column has a title and a function that turns a line into a cell --------------

Columns = dict[str, Callable[[dict], str]]


def table(lines: list[dict], columns: Columns) -> str:
    """A row for each line. Columns that nothing is known for are left out; the first one is flush left."""
    cells = [[title, *(cell(line) for line in lines)] for title, cell in columns.items()]
    padded = []
    for title, *column in (column for column in cells if any(column[1:])):
        width = max(map(len, [title, *column]))
        align = str.rjust if padded else str.ljust
        padded.append([align(text, width) for text in (title, "-" * width, *column)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def figure(name: str, form: str, unit: float = 1) -> Callable[[dict], str]:
    """A column of numbers: the field, how it is written, and the unit that it is divided by."""
    return lambda line: "" if line.get(name) is None else format(line[name] / unit, form)


def percent(name: str) -> Callable[[dict], str]:
    """A column of accuracies with their spread."""

    def cell(line: dict) -> str:
        if line.get(name) is None:
            return ""
        mean, spread = line[name]
        return f"{mean:.1f}" if spread is None else f"{mean:.1f} ±{spread:4.1f}"

    return cell


def percent_at(name: str, i: int) -> Callable[[dict], str]:
    """A column of accuracies without a spread: entry i of a list. Entry 0 of (mean, spread) is the mean."""
    return lambda line: "" if not line[name] or line[name][i] is None else f"{line[name][i]:.1f}"


def share_text(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"


def budget_title(line: dict) -> str:
    """The budgets of a line, to put above a plot. Foreign predictions have none."""
    named = [("decode budget", line["decode_budget"]), ("prompt", line["prompt_share"])]
    return ", ".join(f"{name} {share_text(share)}" for name, share in named if share and (name, share) != ("prompt", 1))


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


def accuracy_table(lines: list[dict], columns: Columns, legend: str = "") -> str:
    """The table with its source above, or in a column where there are several, and what must be said about it."""
    sources = list(dict.fromkeys(line["source"] or "" for line in lines))
    if len(sources) > 1:
        columns = columns | {"source": lambda line: line["source"] or ""}
        sources = []  # each row names its own
    return "\n".join([*filter(None, sources), table(lines, columns), LEGEND + legend])


def show(text: str) -> None:
    """What a terminal lacks, or half a character of a file's name, is replaced."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))


# ---- JSON -------------------------------------------------------------------------------------------------


def write_json(path: str | None, content: dict) -> None:
    if path:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        replace_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
