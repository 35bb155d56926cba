"""benchmarks/longgenbench.py: what the scorer counts, what a killed run keeps, and the command end to end."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scope
from benchmarks import common, longgenbench, plots
from benchmarks.common import Predictions, Sizes
from benchmarks.longgenbench import MISSING, RIGHT, UNREAD, WRONG, gold, main, prompt_ids
from benchmarks.report import Scored, accuracy
from checkpoints import make_checkpoint, write_json
from generate import Options, generate, load
from scope import STRATEGIES

ROOT = Path(__file__).parents[2]
LETTERS, NUMBERS = list("ABCDABCDAB"), list(range(6, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a"))


def write_rows(path: Path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def answer_text(numbers, answers) -> str:
    return "\n\n".join(f"Answer_{n}:\nLet's think. The answer is ({a})." for n, a in zip(numbers, answers, strict=True))


# ---- the scorer


def by_number(*given) -> list[bool]:
    return [outcome == RIGHT for outcome in longgenbench.by_number(*given)]


def by_order(*given) -> list[bool]:
    return [outcome == RIGHT for outcome in longgenbench.by_order(*given)]


@given(st.sets(st.sampled_from(range(10))))
def test_a_skipped_answer_shifts_nothing_by_number_and_all_later_ones_officially(skipped):
    kept = [i for i in range(10) if i not in skipped]
    pred = answer_text([NUMBERS[i] for i in kept], [LETTERS[i] for i in kept])
    assert by_number(pred, LETTERS, NUMBERS) == [i in kept for i in range(10)]
    in_order = [LETTERS[i] for i in kept] + [None] * len(skipped)
    assert by_order(pred, LETTERS, NUMBERS) == [a == b for a, b in zip(in_order, LETTERS, strict=True)]


@pytest.mark.parametrize(
    "said, number, official",
    [
        ("The answer is 43333.", True, True),
        ("The answer is $43,333.", True, False),
        ("The answer is 43,333 dollars", True, False),
        ("The answer is 43333.00", True, True),
        ("The answer is 43334", False, False),
        ("The answer is 4333", False, False),
        ("the total: 43333", False, False),
    ],
)
def test_a_number_is_read_as_a_number_and_officially_as_the_digits_that_follow(said, number, official):
    assert by_number(f"Answer_9: So, {said}\n", ["#### 43333"], [9]) == [number]
    assert by_order(f"Answer_9: So, {said}\n", ["#### 43333"], [9]) == [official]


def test_official_gold_numbers_are_digits_up_to_a_comma_and_never_negative():
    assert [gold("x\n#### 2,125"), gold("#### -10"), gold("B"), gold("Bob")] == [2125, -10, "B", None]
    assert by_order("Answer_1: The answer is 2,125.", ["#### 2,125"], [1]) == [True]
    assert by_order("Answer_1: The answer is -10.", ["#### -10"], [1]) == [False]
    assert by_number("Answer_1: The answer is -10.", ["#### -10"], [1]) == [True]


def test_an_official_answer_without_digits_takes_those_of_the_next_one():
    pred = "Answer_9: The answer is $5.\nAnswer_10: The answer is 5.\n"
    assert by_order(pred, ["#### 5", "#### 5"], [9, 10]) == [True, False]
    assert by_number(pred, ["#### 5", "#### 5"], [9, 10]) == [True, True]


def test_the_first_answer_of_a_number_counts_and_other_numbers_do_not():
    pred = (
        "The answer is 7. Answer_2: The answer is 3. Answer_1: unsure Answer_1: the answer is 4. Answer_2: answer is 9."
    )
    assert by_number(pred, ["#### 4", "#### 3", "#### 7"], [1, 2, 3]) == [True, True, False]
    assert by_number(f"Answer_{'9' * 5000}: The answer is {'9' * 5000}.", ["#### 1"], [1]) == [False]


NUMBERS_SAID = [
    ("72", 72),
    ("**72**", 72),
    ("**72**.", 72),
    ("*72*", 72),
    ("__72__", 72),
    ("`72`", 72),
    ('"72"', 72),
    ("(72)", 72),
    ("= 72", 72),
    ("72 EUR", 72),
    ("72 dollars.", 72),
    ("72%", 72),
    (r"72\%", 72),
    ("EUR 72", 72),
    ("USD 72", 72),
    ("€72", 72),
    ("£72", 72),
    ("$72", 72),
    ("$ 72", 72),
    ("US$72", 72),
    (r"\$72", 72),
    ("$72$", 72),
    (r"\(72\)", 72),
    (r"\boxed{72}", 72),
    (r"$\boxed{72}$.", 72),
    (r"\[\boxed{\$72}\]", 72),
    (r"\boxed{\text{72}}", 72),
    (r"\boxed{\textbf{72}}", 72),
    (r"\boxed{72\text{ EUR}}", 72),
    (r"**$\boxed{\mathbf{72}}$**", 72),
    ("1,024", 1024),
    ("**$1,024.50**", 1024.5),
    (r"1{,}024", 1024),
    (r"1\,024", 1024),
    ("1,234,567.", 1234567),
    ("-3", -3),
    ("\u22123", -3),
    ("-$3", -3),
    ("$-3", -3),
    ("**-3.25**", -3.25),
    (".5", 0.5),
    ("0.5", 0.5),
    ("72.00", 72),
]
LETTERS_SAID = [
    "B",
    "(B)",
    "B.",
    "**B**",
    "**(B)**",
    "B)",
    "[B]",
    r"\boxed{B}",
    r"\boxed{\text{(B)}}",
    "option B",
    "`B`.",
]


@pytest.mark.parametrize("said, number", NUMBERS_SAID)
def test_a_number_is_read_as_models_write_it(said, number):
    for before in ("The answer is ", "The answer is: ", "So the **answer** is\n", "Final answer: ", ""):
        pred = f"Answer_1: {before}{said}\n\nAnswer_2:\n{before}{said}"
        wanted = [f"#### {number}", f"#### {number + 1}"]
        assert longgenbench.by_number(pred, wanted, [1, 2]) == [RIGHT, WRONG], before


@pytest.mark.parametrize("said", LETTERS_SAID)
def test_a_letter_is_read_as_models_write_it(said):
    for before in ("The answer is ", "The answer is: ", "The answer is:\n\n", "**Final Answer:** ", ""):
        pred = f"Answer_6: {before}{said}\n\nAnswer_7:\n{before}{said}"
        assert longgenbench.by_number(pred, ["B", "A"], [6, 7]) == [RIGHT, WRONG], before


@pytest.mark.parametrize(
    "header",
    ["Answer_1:", "Answer 1:", "**Answer 1:**", "**Answer_1**:", "**Answer 1**", "### Answer 1:", "### Answer 1",
     r"Answer\_1:", "Answer #1:", "ANSWER 1:", "Answer1:", "Answer (1):", "> Answer 1 :"],
)  # fmt: skip
def test_an_answer_is_found_under_any_header(header):
    pred = f"Some words.\n{header}\nWe add. The answer is 72.\n\n{header.replace('1', '12')}\nThe answer is 5.\n"
    assert longgenbench.by_number(pred, ["#### 72", "#### 6", "#### 5"], [1, 2, 12]) == [RIGHT, MISSING, RIGHT]
    assert by_order(pred, ["#### 72"], [1]) == [header == "Answer_1:"], "as published"


@pytest.mark.parametrize(
    "said, kind",
    [
        ("", float),
        ("I do not know.", float),
        ("the total: 43333", float),
        ("The answer is unclear: 3 or 4", float),
        ("We add 3 and 4.", float),
        ("The answer is (B).", float),
        (r"The answer is \frac{1}{2}", float),
        ("The answer is not 5.", float),
        ("The answer is A dog.", str),
        ("The answer is Bob.", str),
        ("The answer is 72.", str),
        ("I'd say a cat.", str),
    ],
)
def test_what_cannot_be_read_is_told_from_a_wrong_answer(said, kind):
    wanted = "#### 7" if kind is float else "B"
    assert longgenbench.read_answer(said, kind) is None
    assert longgenbench.by_number(f"Answer_1: {said}", [wanted, wanted], [1, 2]) == [UNREAD, MISSING]


def test_the_clearest_statement_counts_first():
    pred = r"Answer_1: The first answer: 3. With \boxed{4} and so on the answer is 5. #### 6"
    assert by_number(pred, ["#### 5"], [1]) == [True]
    assert longgenbench.read_answer(r"Answer: 3, but \boxed{4}", float) == 4
    assert longgenbench.read_answer("so\n#### 1,000", float) == 1000


OLD_ANSWER = re.compile(r"answer is (?:\(([A-Z])\)|\$?(-?\d[\d,]*(?:\.\d+)?))")
PIECES = ["answer is ", "answer: ", "(", ")", "$", "-", "7", "12", ",", ".", "B", " ", "\n", "**", r"\boxed{", "#### "]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_what_follows_the_words_of_the_prompt_is_read_as_it_always_was(text):
    match = OLD_ANSWER.search(text) if text.count("answer is ") == 1 else None
    if match and match[1]:
        assert longgenbench.read_answer(text, str) == match[1]
    elif match and re.fullmatch(r"-?\d+(,\d+)*(\.\d+)?", match[2]):
        assert longgenbench.read_answer(text, float) == float(match[2].replace(",", ""))


@given(st.lists(st.sampled_from([*PIECES, "-", "\u2212", "$", "\u0663", "\u00b2", "{,}", "Answer_1:"])).map("".join))
@hypothesis.example("--7")
@hypothesis.example("-$-7")
def test_any_text_is_scored(text):
    for answer in ("B", "#### 7", "#### " + text):
        if gold(answer) is not None:
            [outcome] = longgenbench.by_number("Answer_1: answer is " + text, [answer], [1])
            assert outcome in (RIGHT, WRONG, UNREAD)


def test_a_report_tells_wrong_answers_from_those_that_are_missing_or_cannot_be_read(tmp_path, capsys):
    pred = "Answer_1: The answer is 1.\nAnswer_2: The answer is 3.\nAnswer_3: Who knows?\n**Answer 5:** **5**"
    row = {"prompt": "\n".join(f"Question_{n}: x" for n in range(1, 6)), "pred": pred}
    file = write_rows(tmp_path / "H2O.jsonl", row | {"answers": [f"#### {n}" for n in range(1, 6)]})
    assert main(["--score-only", file, "--json", str(tmp_path / "o.json")]) == 0
    [line] = json.loads((tmp_path / "o.json").read_text())["lines"]
    assert (line["accuracy"][0], line["missing"], line["unread"]) == (40, 1, 1)
    header, _, cells = capsys.readouterr().out.splitlines()[:3]
    assert header.split()[-2:] == ["missing", "unread"] and cells.split()[-2:] == ["1", "1"]
    assert main(["--score-only", file, "--pairing", "official", "--json", str(tmp_path / "o.json")]) == 0
    [line] = json.loads((tmp_path / "o.json").read_text())["lines"]
    assert (line["accuracy"][0], line["missing"], line["unread"]) == (20, 3, 0), "two were found, the second is wrong"
    assert "unread " not in capsys.readouterr().out.splitlines()[0]


ODD_PARTS = ["Answer_1: ", "Answer 1: ", "answer is (", "answer is ", "Answer_1: answer is (", "Answer_1: the ", "The ",
             "answer is (a\n", "**", "#", "#### ", "1,", "1{,}", "1.", "-", "$", r"\boxed{", r"\text{", "answer: ", " ",
             "\n", "Answer_", "A", "_", "EUR ", "answer is:" + " " * 20]  # fmt: skip


@pytest.mark.parametrize("part", ODD_PARTS)
def test_long_and_odd_answers_are_scored_in_linear_time(part):
    text = part * 20_000
    started = time.monotonic()
    for answer in ("A", "#### 5"):
        for pred in (text, "Answer_1: " + text, "Answer_1: answer is " + text, "Answer_1: " + text + "!"):
            longgenbench.by_order(pred, [answer] * 3, [1, 2, 3])
            longgenbench.by_number(pred, [answer] * 3, [1, 2, 3])
        gold(text)
        longgenbench.question_numbers(text, 3)
    assert (time.monotonic() - started) / 8 < 0.5, "seconds for one text"


WORDS = ["Answer_1:", "Answer_22:", " ", "\n", "answer is ", "(A)", "(B", ")", "5", "72", "x"]


@given(st.lists(st.sampled_from(WORDS), max_size=30).map("".join))
@settings(max_examples=300)
def test_by_order_finds_what_the_official_expressions_find(pred):
    letters = re.findall(r"Answer_\d+:\s*[^\n]*?answer is \(([^)\n]*)\)", pred)
    digits = re.findall(r"Answer_\d+:.*?answer is (\d+)", pred, re.DOTALL)
    assert longgenbench.letters_in_order(pred) == letters
    assert longgenbench.digits_in_order(pred) == digits


def test_official_letters_where_a_header_stands_in_an_open_bracket():
    for pred in ("answer is (x Answer_2: answer is (B)", "Answer_1: answer is (B Answer_2:\n the answer is (C)"):
        official = re.findall(r"Answer_\d+:\s*[^\n]*?answer is \(([^)\n]*)\)", pred)
        assert longgenbench.letters_in_order(pred) == official and len(official) == 1


def test_an_accuracy_has_the_spread_of_its_seeds_or_else_of_its_prompts():
    right, wrong, half = [True] * 4, [False] * 4, [True, False]
    assert accuracy([Scored(0, right), Scored(1, half)]) == (75.0, pytest.approx(25 * math.sqrt(2)))
    one_seed = accuracy([Scored(0, right), Scored(0, wrong)])
    assert one_seed == (50.0, pytest.approx(50.0)), "standard error: 70.7 / sqrt(2)"
    assert accuracy([Scored(0, right), Scored(0, [])]) == (100.0, None)
    assert accuracy([Scored(0, [])]) is None
    assert accuracy([Scored(0, half)], lambda prompt, i: i == 1) == (0, None)


def test_a_line_splits_by_quarter_and_by_reference():
    row = {"seed": 0, "answers": [f"#### {i}" for i in range(8)], "numbers": list(range(8))}
    row |= {"references": [False] * 6 + [True] * 2, "method": "slide"}
    row["pred"] = "".join(f"Answer_{i}: The answer is {i}.\n" for i in range(7))
    line = longgenbench.line_of([row], "number")
    assert line["accuracy"] == (87.5, None) and line["plain"] == (100, None) and line["cross_reference"] == (50, None)
    assert (
        line["quartiles"] == [100, 100, 100, 50] and line["eighths"] == [100] * 7 + [0] and line["examples"] == [87.5]
    )


def test_a_mini_problem_is_solved_by_its_solution_and_references_keep_their_distance():
    arguments = longgenbench.parse_arguments(["--mini", "--min-distance", "6", "--reference-rate", "1"])
    examples = longgenbench.examples_of(arguments)
    assert len(examples) == 48 and len({example.prompt for example in examples}) == 48
    for example in examples:
        assert all(by_number(example.solution, example.answers, example.numbers))
        assert all(by_order(example.solution, example.answers, example.numbers))
        assert example.references[:6] == [False] * 6 and any(example.references)


# ---- score-only


OFFICIAL = {"prompt": "no numbers here", "questions": [], "answers": ["A", "B"], "length": 3}


def test_score_only_reads_the_official_results_format(tmp_path, capsys):
    numbers = {"answers": ["so\n#### 3", "#### 4"], "pred": "Answer_9: The answer is 3.\nAnswer_10: The answer is 5."}
    file = write_rows(tmp_path / "H2O.jsonl", OFFICIAL | {"pred": answer_text([7], "B")}, numbers)
    assert main(["--score-only", file, "--json", str(tmp_path / "out.json")]) == 0
    [line] = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert line["method"] == "H2O" and line["examples"] == [50, 50]
    table = capsys.readouterr().out
    assert "50.0 ± 0.0" in table and "slots" not in table.split("\n")[0] and "cross-ref" not in table
    assert main(["--score-only", file, "--json", str(tmp_path / "out.json"), "--pairing", "official"]) == 0
    [line] = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert line["examples"] == [0, 50]


def test_question_numbers_come_from_the_prompt_where_it_has_them(tmp_path):
    row = OFFICIAL | {"prompt": "Question_1: \nQuestion_2: \nQuestion_3:\n", "pred": answer_text([2, 3], "AB")}
    assert longgenbench.checked_prediction(row)["numbers"] == [2, 3]


def test_a_malformed_row_is_named_and_nothing_else_is_lost(tmp_path, capsys):
    good = OFFICIAL | {"pred": answer_text([6, 7], "AB")}
    bad = ["{half", "[1]", {"answers": []}, OFFICIAL, good | {"answers": ["A", "Bob"]}, "[" * 100_000]
    file = write_rows(tmp_path / "p.jsonl", good, *bad, "", good)
    assert main(["--score-only", file, "--json", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().err.strip().split("\n")
    assert [line.split(" ")[0] for line in said] == [f"{file}:{n}:" for n in range(2, 8)]
    assert "answer 2 is neither a letter" in said[4]
    assert json.loads((tmp_path / "out.json").read_text())["lines"][0]["examples"] == [100, 100]


# ---- prompts of the real files


QUESTIONS = (
    "Examples: \nQuestion_1: \nHow?\n\nAnswer_1:\nSo.\n\nFollowing Question: \nQuestion_2:\nWhy?\nQuestion_3:\nX?\n\n"
)
ROWS = {
    "gsm8k": {"prompt": QUESTIONS, "questions": ["Why?", "X?"], "answers": ["it\n#### 7", "#### 1,000"]},
    "mmlu": {"task": "high_school_physics", "prompt": QUESTIONS, "questions": ["Why?", "X?"], "answers": ["A", "D"]},
    "csqa": {"prompt": QUESTIONS + "\n", "questions": ["Why?", "X?"], "answers": ["E", "B"]},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_plain_prompt_has_the_papers_form(tiny, name):
    _, tokenizer = tiny
    example = longgenbench.data_example(ROWS[name])
    assert example.numbers == [2, 3] and example.answers == ROWS[name]["answers"]
    assert ("about high school physics." in example.system) is (name == "mmlu")
    text = tokenizer.decode(prompt_ids(tokenizer, example, chat=True))
    assert text.startswith("<<SYS>>\n Answer each question step by step") and text.endswith(
        f"<</SYS>>\n\n{ROWS[name]['prompt']}"
    )


@pytest.mark.parametrize(
    "template", [None, "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"]
)
def test_a_chat_template_gets_the_system_text_even_if_it_refuses_the_role(tmp_path, template):
    _, tokenizer = load(str(make_checkpoint(tmp_path / "a", tokenizer="tokenizers")))
    tokenizer.template = (template or "") + tokenizer.template
    example = longgenbench.data_example(ROWS["csqa"])
    text = tokenizer.backend.backend.decode(prompt_ids(tokenizer, example, chat=True), skip_special_tokens=False)
    assert text.count("Answer each question") == 1 and text.count("<|user|>") == 1 and "<<SYS>>" not in text
    assert "<<SYS>>" in tokenizer.decode(prompt_ids(tokenizer, example, chat=False))


def test_a_data_run_end_to_end(folder, tmp_path, capsys):
    file = write_rows(
        tmp_path / "two.jsonl", ROWS["gsm8k"], {"prompt": "x"}, ROWS["csqa"], ROWS["mmlu"] | {"prompt": "y"}
    )
    command = ["--data", file, "--checkpoint", folder, "--max-new-tokens", "12", "--no-compile", "--no-chat"]
    predictions = tmp_path / "p.jsonl"
    command += ["--methods", "full", "slide", "--predictions", str(predictions)]
    assert main([*command, "--limit", "1", "--json", str(tmp_path / "o.json")]) == 0
    captured = capsys.readouterr()
    assert (
        f"{file}:2: skipped: no list in `answers`" in captured.err and f"{file}:4: skipped: 2 answers" in captured.err
    )
    lines = json.loads((tmp_path / "o.json").read_text())["lines"]
    assert [(line["method"], line["decode_budget"], line["prompts"]) for line in lines] == [
        ("full", 1, 1),
        ("slide", 0.25, 1),
        ("slide", 0.125, 1),
    ]
    assert lines[0]["slots"] > lines[1]["slots"] and f"{folder} two" in captured.out
    assert main(command) == 0
    assert "3 of 6 predictions are there" in capsys.readouterr().err
    assert len(predictions.read_text().splitlines()) == 6


def test_the_length_of_a_data_run_follows_its_questions():
    data = longgenbench.parse_arguments(["--data", "gsm8k_60.jsonl", "--batch-size", "3"])
    assert data.predictions == "gsm8k_60.predictions.jsonl"
    assert longgenbench.settings_of(data, 1, 40) == {"max_new_tokens": 4096, "batch_size": 3, "compile": True}
    assert longgenbench.settings_of(data, 1, 60)["max_new_tokens"] == 8192
    mini = longgenbench.parse_arguments(["--mini", "--compile"])
    assert longgenbench.settings_of(mini, 300, 16) == {"max_new_tokens": 316, "batch_size": 64, "compile": True}


# ---- methods and budgets


def jobs_of(*flags: str) -> list[common.Job]:
    arguments = longgenbench.parse_arguments(["--mini", *flags])
    settings, sizes = {"max_new_tokens": 200}, Sizes(prompt=100, output=160)
    return common.make_jobs(arguments, arguments.methods, arguments.prompt_share, settings, sizes)


def test_every_policy_is_a_method_and_the_full_cache_runs_once():
    jobs = jobs_of()
    methods = [job.labels["method"] for job in jobs]
    assert set(STRATEGIES) <= set(methods) and methods.count("full") == 1 and methods.count("slide") == 2
    budgets = {job.labels["decode_budget"]: (job.settings["heavy"], job.settings["recent"]) for job in jobs[1:]}
    assert budgets == {0.25: (20, 20), 0.125: (10, 10)} and jobs[0].labels["decode_budget"] == 1


def test_a_method_says_more_than_the_flags_and_its_budget_is_labelled_as_it_is():
    [job] = jobs_of(
        "--methods", "slide:score=current,heavy=8", "--recent", "8", "--decode-budget", "0.5", "--set", "heavy=9"
    )
    assert (job.settings["policy"], job.settings["score"]) == ("slide", "current")
    assert (job.settings["heavy"], job.settings["recent"]) == (8, 8)
    assert job.labels == {"method": "slide:score=current,heavy=8", "prompt_share": 1, "decode_budget": 0.1}


def test_a_prompt_share_compresses_for_everyone():
    flags = [
        "--methods",
        "slide",
        "h2o",
        "full",
        "full:compress=full",
        "--decode-budget",
        "0.25",
        "--prompt-share",
        "1",
        "0.6",
    ]
    jobs = jobs_of(*flags)
    assert [job.labels["prompt_share"] for job in jobs] == [1, 1, 1, 0.6, 0.6, 0.6]
    assert [job.settings["compress"] for job in jobs] == ["full"] * 3 + ["h2o"] * 3
    assert [job.settings.get("prompt_budget") for job in jobs] == [None] * 3 + [60] * 3
    [job] = jobs_of("--methods", "full", "--set", "compress=snapkv,prompt_budget=80,obs_window=5")
    assert job.labels["prompt_share"] == 0.8 and job.settings["obs_window"] == 5


def test_a_method_that_only_spells_out_a_default_is_no_second_line():
    assert len(jobs_of("--methods", "slide", "slide:score=cumulative", "--decode-budget", "0.25")) == 1


@pytest.mark.parametrize("text, kind", [("ignore_eos=true", True), ("heavy=3", 3), ("score=current", "current")])
def test_a_setting_has_the_type_of_its_field(text, kind):
    assert common.parse_method(f"slide:{text}") == {"policy": "slide", text.split("=")[0]: kind}


# ---- running, being killed, running on


SMALL = ["--mini", "--k", "2", "--prompts", "3", "--methods", "slide", "recent", "--decode-budget", "0.05"]
SMALL += ["--max-new-tokens", "20"]


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """A small run as a function of more flags -> exit status; `.ran` has the prompts of every generate() call."""
    command = [*SMALL, "--batch-size", "4", "--checkpoint", folder, "--json", str(tmp_path / "o.json")]
    real = common.generate

    def small(*flags: str) -> int:
        return main([*command, *flags])

    def generate(model, tokenizer, prompts, **settings):
        small.ran.append(len(prompts))
        yield from real(model, tokenizer, prompts, **settings)

    small.ran = []
    small.lines = lambda: json.loads((tmp_path / "o.json").read_text())["lines"]
    monkeypatch.setattr(common, "generate", generate)
    return small


def figures(lines: list[dict]) -> list[dict]:
    """Without seconds. Memory is that of each prompt alone, whichever prompts ran together."""
    return [{name: x for name, x in line.items() if name != "tokens_per_s"} for line in lines]


@pytest.mark.parametrize("kept, runs", [(0, [6, 6]), (1, [5, 6]), (8, [4]), (12, [])])
@pytest.mark.parametrize("cut", [1, 9, 300])
def test_a_run_killed_in_the_middle_of_a_line_continues_there(small, tmp_path, capsys, kept, runs, cut):
    file = tmp_path / "p.jsonl"
    assert small("--predictions", str(file)) == 0
    whole, lines = file.read_bytes().splitlines(keepends=True), small.lines()
    assert small.ran == [6, 6] and len(whole) == 12
    small.ran.clear()
    file.write_bytes(b"".join(whole[:kept]) + (whole[kept][:cut] if kept < 12 else b""))
    assert small("--predictions", str(file)) == 0
    assert small.ran == runs and figures(small.lines()) == figures(lines)
    assert sorted(row["key"] for row in map(json.loads, file.read_text().splitlines())) == sorted(
        json.loads(line)["key"] for line in whole
    )
    assert ("half written" in capsys.readouterr().err) is (kept < 12)


def test_an_interrupted_run_keeps_what_was_complete(small, tmp_path, monkeypatch, capsys):
    file, counting = tmp_path / "p.jsonl", common.generate

    def interrupted(*arguments, **settings):
        results = counting(*arguments, **settings)
        yield next(results)
        yield next(results)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "generate", interrupted)
    assert small("--predictions", str(file)) == 130
    assert len(file.read_text().splitlines()) == 2 and "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(common, "generate", counting)
    small.ran.clear()
    assert small("--predictions", str(file)) == 0 and small.ran == [4, 6]


def test_predictions_of_other_settings_or_weights_are_not_taken(small, tmp_path):
    flags = ["--predictions", str(tmp_path / "p.jsonl")]
    other = str(make_checkpoint(tmp_path / "other", seed=1))
    for more, runs in (
        ((), 2),
        ((), 0),
        (("--decode-budget", "0.1"), 2),
        (("--seeds", "0", "7"), 2),
        (("--dtype", "bfloat16"), 2),
    ):
        small.ran.clear()
        assert small(*flags, *more) == 0 and len(small.ran) == runs, more
    small.ran.clear()
    assert small(*flags, "--checkpoint", other, "--device", "cpu") == 0 and len(small.ran) == 2
    assert small(*flags, "--batch-size", "1") == 0 and len(small.ran) == 2, "batching changes no token"


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_predictions_of_another_tokenizer_or_of_other_stop_tokens_are_not_taken(small, folder, tmp_path, name):
    other = shutil.copytree(folder, tmp_path / "other")
    file, argv = tmp_path / "p.jsonl", ["--predictions", str(tmp_path / "p.jsonl"), "--checkpoint", str(other)]
    assert small("--predictions", str(file)) == 0 and small(*argv) == 0
    assert small.ran == [6, 6], "a copy of the checkpoint elsewhere is the same checkpoint"
    content = json.loads((other / name).read_text()) if (other / name).exists() else {}
    write_json(other / name, content | {"something": "else"})
    assert small(*argv) == 0 and small.ran == [6, 6] * 2


def test_predictions_of_another_score_function_are_not_taken(small, tmp_path, monkeypatch):
    assert small("--predictions", str(tmp_path / "p.jsonl")) == 0
    changed = tmp_path / "scope.py"
    changed.write_text(Path(scope.__file__).read_text() + "# another rule")
    monkeypatch.setattr(scope, "__file__", str(changed))
    assert small("--predictions", str(tmp_path / "p.jsonl")) == 0 and small.ran == [6, 6] * 2


def test_two_weights_of_the_same_norm_are_told_apart():
    a, b = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[3.0, 4.0]]))
        b.weight.copy_(torch.tensor([[4.0, 3.0]]))
    one, other = (common.fingerprint(model, "checkpoints/mini") for model in (a, b))
    assert one != other and one == common.fingerprint(a, "checkpoints/mini")


def test_results_are_saved_before_anything_is_printed(small, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(common.report, "accuracy_table", fail)
    assert small("--plot", str(tmp_path / "o.png")) == 1
    assert small.lines() and (tmp_path / "o.png").stat().st_size > 1000


def test_an_input_is_never_overwritten(folder, tmp_path, capsys):
    file = write_rows(tmp_path / "d.jsonl", {"prompt": "Question_1: x", "answers": ["A"]})
    before = Path(file).read_bytes()
    for flag in ("--json", "--predictions"):
        assert main(["--data", file, "--checkpoint", folder, flag, file]) == 2
        assert f"--data, {flag} name the same file" in capsys.readouterr().err
    assert main(["--data", file, "--checkpoint", folder, "--json", f"{folder}/config.json"]) == 2
    assert "lies in --checkpoint" in capsys.readouterr().err and Path(file).read_bytes() == before


@pytest.mark.parametrize("wrong", [{"stats": {"slots": None}}, {"stats": []}, {"pred": 5}, {"finish_reason": None}])
def test_predictions_of_the_wrong_type_are_named_and_run_again(small, tmp_path, capsys, wrong):
    file = tmp_path / "p.jsonl"
    assert small("--predictions", str(file)) == 0
    lines = file.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | wrong)
    file.write_text("\n".join(lines) + "\n")
    assert small("--predictions", str(file)) == 0 and sum(small.ran) == 13
    assert f"{file}:4: skipped" in capsys.readouterr().err


def test_half_a_character_in_an_answer_is_saved(tmp_path):
    Predictions(str(tmp_path / "p.jsonl")).add({"key": "a", "pred": "x\ud800"})
    assert Predictions(str(tmp_path / "p.jsonl")).rows["a"]["pred"] == "x\ud800"


def test_malformed_predictions_are_named_and_run_again(small, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    assert small("--predictions", str(file)) == 0
    lines = file.read_text().splitlines()
    write_rows(file, *lines[:5], "broken", *lines[6:], '{"pred": "x"}')
    small.ran.clear()
    assert small("--predictions", str(file)) == 0 and small.ran == [1]
    said = capsys.readouterr().err
    assert f"{file}:6: skipped: Expecting value" in said and f"{file}:13: skipped: no `key`" in said


@pytest.mark.parametrize("content", ["my notes\nno newline here", "my notes\n", '{"pred": "A"}\n', '{"key": "1"}\nx'])
def test_a_file_that_is_not_ours_is_left_alone(small, tmp_path, capsys, content):
    file = tmp_path / "notes.txt"
    file.write_text(content)
    assert small("--predictions", str(file)) == 2
    assert "has lines that are no predictions" in capsys.readouterr().err
    assert file.read_text() == content


def test_our_predictions_can_be_scored_alone(small, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    assert small("--predictions", str(file)) == 0
    first = capsys.readouterr().out
    assert main(["--score-only", str(file)]) == 0
    assert capsys.readouterr().out == first
    assert small("--predictions", str(file), "--k", "3") == 0 and main(["--score-only", str(file)]) == 0
    assert "source" in capsys.readouterr().out, "two runs in one file are told apart"


def test_prompt_shares_and_plots(small, tmp_path):
    plot, flags = (
        tmp_path / "o.png",
        ["--decode-budget", "0.1", "0.05", "--prompt-share", "1", "0.5", "--methods", "full", "h2o"],
    )
    assert small(*flags, "--plot", str(plot)) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = small.lines()
    assert [(line["prompt_share"], line["decode_budget"]) for line in lines] == [
        (1, 1), (1, 0.1), (1, 0.05), (0.5, 1), (0.5, 0.1), (0.5, 0.05)]  # fmt: skip
    assert lines[4]["slots"] < lines[1]["slots"] and lines[4]["live_peak"] < lines[1]["live_peak"]
    titles = [panel.title for panel in longgenbench.panels(lines)]
    assert titles == [f"decode budget {y}%{x}" for x in ("", ", prompt 50%") for y in (10, 5)]
    assert set(longgenbench.panels(lines)[0].lines) == {"full", "h2o"}


def test_names_that_would_overlap_are_moved_apart():
    assert plots.moved_apart([0.9, 0.5, 0.5, 0.05, 0.0], 0.1) == pytest.approx([0.9, 0.5, 0.4, 0.1, 0.0])


# ---- the command line


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "one of the arguments --mini --data --score-only is required"),
        (["--mini", "--score-only", "x"], "not allowed with argument"),
        (["--mini", "--methods", "slid"], "unknown policy 'slid': choose from full"),
        (["--mini", "--methods", "slide:beta=3"], "unknown setting 'beta'"),
        (["--mini", "--methods", "slide:heavy=many"], "setting heavy=many: a value of type int"),
        (["--mini", "--methods", "slide:ignore_eos=yes"], "setting ignore_eos=yes: a value of type bool"),
        (["--mini", "--methods", "slide:score=none"], "unknown score 'none'"),
        (["--mini", "--set", "temperature=1"], "unknown setting 'temperature'"),
        (["--mini", "--methods", "slide:samples=4"], "unknown setting 'samples'"),
        (["--mini", "--decode-budget", "2"], "--decode-budget: 2 is not above 0 and at most 1"),
        (["--mini", "--prompt-share", "0"], "--prompt-share: 0 is not above 0"),
        (["--mini", "--recent", "900"], "--recent is 900: it must be 0 to"),
        (["--mini", "--k", "0"], "--k: 0 is not 1 or more"),
        (["--mini", "--k", "41"], "do not fit labels 1 to 40"),
        (["--mini", "--reference-rate", "2"], "--reference-rate: 2 is not 0 to 1"),
        (["--mini", "--k", "40"], "the model has 512 positions: lower --max-new-tokens"),
        (["--mini", "--plot", "x.txt"], "--plot is x.txt: it must be .png, .pdf or .svg"),
        (["--mini", "--json", "no/such/x"], "--json no/such/x: there is no directory no/such"),
        (
            ["--mini", "--json", "x", "--predictions", "x"],
            "--json, --predictions name the same file",
        ),
        (["--data", "no.jsonl"], "No such file or directory: 'no.jsonl'"),
        (["--score-only", "/dev/null"], "/dev/null has no usable row"),
        (["--data", "/dev/null"], "/dev/null has no usable row"),
        (["--data", ""], "--data is '': give a file name"),
        (["--score-only", ""], "--score-only is '': give a file name"),
        (["--mini", "--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--checkpoint", folder]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.startswith("longgenbench.py: error: ") and captured.out == ""
    assert captured.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_progress_is_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with common.progress(8, "prompts") as bar:
            bar.update(2.2)
            bar.refresh()
        assert ("2/8 prompts" in capsys.readouterr().err) is terminal


def test_no_predictions_file_is_no_memory():
    assert Predictions(None).rows == {}


def test_the_script_runs_from_anywhere(folder, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "longgenbench.py"), *SMALL, "--checkpoint", folder]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == f"{folder} k=2 reference-rate=0.4 min-distance=1"
    assert done.stderr.endswith("slide: 6 prompts\nrecent: 6 prompts\n")
    assert list(tmp_path.iterdir()) == []


def test_8_bits_change_hardly_an_answer_of_the_bundled_model():
    model, tokenizer = load("checkpoints/mini", dtype="float32")
    arguments = longgenbench.parse_arguments(["--mini", "--k", "8", "--prompts", "24"])
    prompts = [tokenizer.encode(example.prompt) for example in longgenbench.examples_of(arguments)]
    settings = {"max_new_tokens": 130, "batch_size": len(prompts), "compile": False}
    exact, int8 = (
        [result.token_ids for result in generate(model, tokenizer, prompts, "full", kv_format=kv_format, **settings)]
        for kv_format in ("model", "int8")
    )
    assert sum(a == b for a, b in zip(exact, int8, strict=True)) >= 0.95 * len(prompts)


def test_the_bytes_of_a_method_are_those_of_its_storage_format():
    model, _ = load("checkpoints/mini")
    whole, packed = (
        common.cache_of_one(model, [[1] * 100], Options(policy="full", kv_format=kv_format))
        for kv_format in ("model", "int8")
    )
    assert packed["kv_bytes"] < 0.6 * packed["kv_bytes_full"] == 0.6 * whole["kv_bytes"]
