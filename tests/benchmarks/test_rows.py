"""Rows of data and of predictions with one field spoiled: each is used or named, and no other row is lost."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks import common, fidelity, longgenbench, plots, report, scbench
from benchmarks.common import read_rows

README = str(Path(__file__).parents[2] / "checkpoints" / "mini" / "README.md")
SPOILED = [None, {}, [], "x", "", -1, 0, 10**400, 1e308, float("nan"), float("inf"), True, "\ud800", ["\ud800"], [[]]]
GONE = object()
QUESTIONS = "Examples: \nQuestion_1: How?\n\nAnswer_1: So.\n\nFollowing Question: \nQuestion_2: Why?\nQuestion_3: X?\n"


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """Where something can be spoiled: every key of an object, the first item of a list, and all of it."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def spoil(row: dict, path: tuple, value):
    """The row with something else at this place, or with nothing there."""
    if not path:
        return None if value is GONE else value
    spoiled = deepcopy(row)
    inner = spoiled
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return spoiled


def spoiled_rows(row: dict) -> list:
    return [spoil(row, path, value) for path in places(row) for value in (*SPOILED, GONE)]


def write_rows(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- each kind of file: rows that are right, how they are read, and all that is done with a row afterwards


class KindOfFile(NamedTuple):
    rows: list[dict]
    parse: Callable[[dict], object]
    use: Callable[[object], object]


def longgenbench_data(made, tiny) -> KindOfFile:
    number = {"prompt": QUESTIONS, "answers": ["it\n#### 7", "#### 1,000"]}
    letter = {"task": "high_school_physics", "prompt": QUESTIONS, "answers": ["A", "D"]}

    def use(example: longgenbench.Example) -> None:
        longgenbench.prompt_ids(tiny[1], example, chat=True)
        for pairing in longgenbench.PAIRINGS.values():
            pairing("Answer_2: The answer is 7.", example.answers, example.numbers)

    return KindOfFile([number, letter], longgenbench.data_example, use)


def scbench_data(task: str, turn: dict, made, tiny) -> KindOfFile:
    argument_lists = [["--data", "x", "--task", task, "--mode", mode] for mode in ("multi-request", "multi-turn")]
    parsed = [scbench.parse_arguments(each) for each in argument_lists]

    def use(example: scbench.Example) -> None:
        for arguments in parsed:
            scbench.make_dialogue(arguments, tiny[1], example)
        preds = ["A 7 x"] * len(example.answers)
        scbench.scored_of({"task": task, "seed": 0, "preds": preds, "answers": example.answers})

    row = {"id": 0, "context": "the cat sat", "multi_turns": [turn, turn]}
    rows = [row, row | {"context": [3, 1, 2]}]
    return KindOfFile(rows, partial(scbench.data_example, scbench.TASKS[task]), use)


def report_of(line: dict, columns: report.Columns, panels: Callable) -> None:
    json.dumps(line)
    assert report.accuracy_table([line], columns).startswith(line["source"] or "method")
    for panel in panels([line]):
        assert all(isinstance(y, int | float) for points in panel.lines.values() for _, y in points)


def score_longgenbench(row: dict) -> None:
    for pairing in longgenbench.PAIRINGS:
        report_of(longgenbench.line_of([row], pairing), longgenbench.COLUMNS, longgenbench.panels)


def longgenbench_results(made, tiny) -> KindOfFile:
    """--score-only: our own rows, and one of the official results."""
    official = {"prompt": QUESTIONS, "answers": ["A", "B"], "pred": "Answer_2: The answer is (A)."}
    use = lambda row: score_longgenbench({"method": "H2O"} | row)  # noqa: E731
    return KindOfFile([made["longgenbench"], official], longgenbench.checked_prediction, use)


def finished(module, use: Callable, made, tiny) -> KindOfFile:
    """A file of predictions: what the run that reads it knows by itself is not taken from the file."""
    row = made[module.__name__.split(".")[-1]]
    results = ("pred", "preds", "finish_reason", "stats", "nll", "kl", "same", "needles")
    own = {name: value for name, value in row.items() if name not in (*results, "start_s", "prefill_s", "restart")}
    parse = partial(common.with_key, lambda read: module.check_made(read | own))
    return KindOfFile([row], parse, lambda read: use(read | own))


def score_scbench(row: dict) -> None:
    report_of(scbench.line_of([row]), scbench.COLUMNS, scbench.panels)


def score_fidelity(row: dict) -> None:
    [line] = fidelity.lines_of([row])
    report_of(line, fidelity.COLUMNS | fidelity.needle_columns([line]), fidelity.panels)


TURNS = {
    "scbench_kv": {"input": "Where?", "answer": "x"},
    "scbench_vt": {"input": "Which?", "answer": ["VAR A", "VAR B"]},
    "scbench_qa_eng": {"input": "Who?", "answer": ["Bob", "Robert"]},
    "scbench_choice_eng": {"input": "Which {x}?", "answer": "cat", "options": ["cat", "dog", "cow", "hen"]},
    "scbench_many_shot": {"input": "Which?", "answer": "(A)"},
    "scbench_mf": {"input": "The Largest Number is: ", "answer": 42},
}
KINDS = {
    "longgenbench data": longgenbench_data,
    **{f"{task} data": partial(scbench_data, task, turn) for task, turn in TURNS.items()},
    "longgenbench results": longgenbench_results,
    "longgenbench predictions": partial(finished, longgenbench, score_longgenbench),
    "scbench predictions": partial(finished, scbench, score_scbench),
    "fidelity predictions": partial(finished, fidelity, score_fidelity),
}
RUNS = {
    longgenbench: ["--mini", "--k", "2", "--prompts", "2", "--seeds", "0", "--max-new-tokens", "12"],
    scbench: ["--mini", "--k", "2", "--contexts", "2", "--seeds", "0", "--max-new-tokens", "12"],
    fidelity: ["--text", README, "--pieces", "2", "--prompt-tokens", "120", "--output-tokens", "260", "--needles",
               "--distances", "50"],
}  # fmt: skip


def run(module, folder: Path, *flags: str) -> list[dict]:
    """A small run with its predictions in `folder`; the lines of its table."""
    file, table = folder / f"{module.__name__}.jsonl", folder / "table.json"
    command = [*RUNS[module], "--methods", "full", "slide", "--predictions", str(file), "--json", str(table)]
    assert module.main([*command, *flags]) == 0
    return json.loads(table.read_text())["lines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each program has run once."""
    folder = tmp_path_factory.mktemp("runs")
    for module in RUNS:
        run(module, folder)
    return folder


@pytest.fixture(scope="module")
def made(folder) -> dict[str, dict]:
    """The first row of each program's predictions."""
    files = {module.__name__.split(".")[-1]: folder / f"{module.__name__}.jsonl" for module in RUNS}
    return {name: json.loads(file.read_text().splitlines()[0]) for name, file in files.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_spoiled_row_is_used_or_named_and_nothing_else_is_lost(name, made, tiny, tmp_path, capsys):
    kind = KINDS[name](made, tiny)
    bad = [spoiled for row in kind.rows for spoiled in spoiled_rows(row)]
    file = write_rows(tmp_path / "rows.jsonl", kind.rows[0], *bad, kind.rows[-1])
    used = read_rows(file, kind.parse)
    notes = capsys.readouterr().err.splitlines()
    assert len(used) + len(notes) == len(bad) + 2, "one note for each row that is skipped"
    assert used[0] == kind.parse(kind.rows[0]) and used[-1] == kind.parse(kind.rows[-1])
    assert all(note.startswith(f"{file}:") and ": skipped: " in note and len(note) < 600 for note in notes)
    lines = [int(note.removeprefix(f"{file}:").split(":")[0]) for note in notes]
    assert lines == sorted(set(lines)) and not {1, len(bad) + 2} & set(lines)
    for row in used:
        kind.use(row)


@pytest.mark.parametrize("module", RUNS)
def test_a_run_over_spoiled_predictions_makes_them_again(module, folder, tmp_path, capsys):
    file = folder / f"{module.__name__}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["stats"]["kv_bytes"] = None
    rows[2] |= {name: {} for name in ("pred", "preds", "nll") if name in rows[2]}
    copy = tmp_path / file.name
    write_rows(copy, *rows)
    before = copy.read_text()
    capsys.readouterr()
    lines = run(module, tmp_path)
    said = capsys.readouterr().err
    assert f"{copy}:2: skipped: `stats` is" in said and f"{copy}:3: skipped: `" in said
    assert copy.read_text().startswith(before) and copy.read_text().count("\n") == len(rows) + 2
    wanted = run(module, folder)
    assert [line["kv_bytes"] for line in lines] == [line["kv_bytes"] for line in wanted]
    assert [line.get("accuracy") for line in lines] == [line.get("accuracy") for line in wanted]


@pytest.mark.parametrize("module", [longgenbench, scbench])
def test_a_file_without_a_usable_row_is_refused_in_one_line(module, tmp_path, capsys):
    file = write_rows(tmp_path / "scbench_kv.jsonl", [], 5, None, {"prompt": None}, {"context": {}})
    assert module.main(["--data", file, "--predictions", str(tmp_path / "p.jsonl")]) == 2
    *notes, said = capsys.readouterr().err.splitlines()
    assert len(notes) == 5 and said.endswith(f"error: {file} has no usable row")
    assert not (tmp_path / "p.jsonl").exists()


def test_a_message_names_the_field_and_what_it_must_be():
    with pytest.raises(ValueError, match="`stats` is missing: it must be an object with prompt_slots"):
        longgenbench.check_made({"pred": "x", "finish_reason": "stop"})
    with pytest.raises(ValueError, match="`pred` is 5: it must be a text"):
        longgenbench.check_made({"pred": 5})
    with pytest.raises(ValueError, match="a list of 2, each a text"):
        scbench.check_made({"answers": [["a"], ["b"]], "preds": ["a"]})


def test_a_name_that_no_terminal_can_show_costs_no_table(tmp_path, capsysbinary):
    report.show("a\ud800b ±")
    assert capsysbinary.readouterr().out == "a?b ±\n".encode()
    panel = plots.Panel("$x", "x", "y", {"$\\frac$": [(1, 2.0)], "b": [(1, 3.0)]})
    plots.plot(str(tmp_path / "o.png"), [panel], [])
    assert (tmp_path / "o.png").stat().st_size > 1000


@pytest.mark.parametrize("module", RUNS)
def test_the_default_checkpoint_is_no_output_wherever_the_program_runs(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bundled = Path(README).parent / "config.json"
    before = bundled.read_bytes()
    for flag in ("--json", "--predictions"):
        assert module.main([*RUNS[module], flag, str(bundled)]) == 2
        assert "lies in --checkpoint" in capsys.readouterr().err
    assert bundled.read_bytes() == before
