"""LongGenBench (arXiv 2410.04199): one prompt asks many questions, one long answer solves them all, in order.

python benchmarks/longgenbench.py --mini                        the bundled model on fresh problems, no data needed
python benchmarks/longgenbench.py --data gsm8k_30.jsonl --checkpoint DIR_OR_HUB_ID
python benchmarks/longgenbench.py --score-only FILE.jsonl       rows with "answers" and "pred"
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints" / "mini"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import make_problem

from benchmarks import common, report
from benchmarks.common import Sizes, check_fields, list_of, positive
from benchmarks.plots import Panel, position_panel
from benchmarks.report import Scored, accuracy, percent, percent_at
from cli.program import run_program
from generate import Options, check_run, load
from scope import STRATEGIES

METHODS = [*STRATEGIES, "slide:score=current", "h2o:score=current"]
HIGHLIGHTED = ["full", "discontinuous:score=own", "discontinuous", "discontinuous:score=current", "h2o:score=current"]
SCORED = ("answers", "numbers", "references", "seed")  # what a prediction carries along, so that it can be scored alone
MARGIN = 16  # tokens that an answer of the mini model may have beyond the longest solution


def main(argv: list[str] | None = None) -> int:
    return run_program("longgenbench.py", lambda: benchmark(parse_arguments(argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    predictions = read_predictions(arguments.score_only) if arguments.score_only else run(arguments)
    lines = [line_of(rows, arguments.pairing) for rows in report.grouped(predictions, *report.LABELS)]
    common.publish(arguments, lines, COLUMNS, panels, HIGHLIGHTED, LEGEND)


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser("longgenbench.py", __doc__)
    source = common.add_source_flags(parser, "prompt, questions, answers")
    source.add_argument("--score-only", metavar="FILE.jsonl", help="rows with answers and pred; runs nothing")
    problems = parser.add_argument_group("problems")
    common.add_problem_flags(problems, "prompts")
    problems.add_argument("--min-distance", type=positive, default=1, help="mini: answers a reference reaches back")
    longest = "(default: mini: the longest solution + a margin; data: 4096 for up to 40 questions, else 8192)"
    problems.add_argument("--max-new-tokens", type=positive, help=longest)
    common.add_method_flags(parser.add_argument_group("methods"), METHODS, [0.25, 0.125])
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=positive, help="(default: mini: 64; data: 8)")
    common.add_run_flags(running)
    results = parser.add_argument_group("results")
    results.add_argument("--pairing", choices=PAIRINGS, default="number", help="official: by order of appearance")
    common.add_result_flags(results)
    return common.parse_data_flags(parser, argv)


# ---- examples: what is asked, and what the answers are compared with ---------------------------------------


@dataclass(frozen=True)
class Example:
    """One prompt. An answer is a letter, or a text that ends in `#### 18`."""

    prompt: str
    answers: list[str]
    numbers: list[int]  # of the questions, as the prompt has them: after 8 solved examples comes Question_9
    system: str = ""
    references: list[bool] = field(default_factory=list)  # mini: which questions start from an earlier answer
    seed: int = 0
    solution: str = ""  # mini


def mini_example(arguments: argparse.Namespace, seed: int, i: int) -> Example:
    """Problem i of a seed; neither a training sample nor a held-out one of the training run has this seed."""
    k = arguments.k
    problem = make_problem(f"benchmark {seed} {i}", k, arguments.reference_rate, arguments.min_distance)
    return Example(
        prompt=problem.prompt,
        answers=[f"#### {result}" for result in problem.expected],
        numbers=list(range(1, k + 1)),
        references=problem.is_reference,
        seed=seed,
        solution=problem.answer,
    )


# As the benchmark and the paper's appendix print it.
SYSTEM = (
    "Answer each question step by step, adhering to the format shown in the examples provided. Start each response "
    "with 'Answer_' and introduce the final response with 'The answer is'. Do not repeat the question. Ensure that "
    "you respond to all the questions presented, regardless of their number."
)
ABOUT = " The following are multiple choice questions (with answers) about {}."
PLAIN = "<<SYS>>\n {} \n<</SYS>>\n\n{}"  # the form that the paper gave Llama 3.1


def data_example(row: dict) -> Example:
    """A published row -> an Example; ValueError says what is wrong with it."""
    check_fields(row, {"prompt": common.WHOLE_TEXT, "task": common.WHOLE_TEXT | common.NOTHING})
    prompt, answers = row["prompt"], checked_answers(row)
    numbers = question_numbers(prompt, len(answers))
    if not numbers:
        raise ValueError(f"{len(answers)} answers, but not as many lines `Question_N:` in the prompt")
    task = row.get("task")
    system = SYSTEM + (ABOUT.format(task.replace("_", " ")) if task else "")
    return Example(prompt, answers, numbers, system)


def checked_answers(row: dict) -> list[str]:
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers:
        raise ValueError("no list in `answers`")
    for i, answer in enumerate(answers):
        if not isinstance(answer, str) or gold(answer) is None:
            raise ValueError(f"answer {i + 1} is neither a letter nor a text with `#### NUMBER`")
    return answers


def question_numbers(prompt: str, count: int) -> list[int]:
    """The last `count` of the lines `Question_N:`; the first few are those of the solved examples."""
    numbers = [int(n) for n in re.findall(r"^Question_(\d{1,9}):", prompt, re.MULTILINE)]
    return numbers[-count:] if len(numbers) >= count else []


def prompt_ids(tokenizer, example: Example, chat: bool) -> list[int]:
    if not example.system:
        return tokenizer.encode(example.prompt)
    if not chat or tokenizer.template is None:
        return tokenizer.encode(PLAIN.format(example.system, example.prompt))
    user = {"role": "user", "content": example.prompt}
    try:
        return tokenizer.chat([{"role": "system", "content": example.system}, user])
    except ValueError:  # templates without a system role refuse one
        return tokenizer.chat([user | {"content": f"{example.system}\n\n{example.prompt}"}])


# ---- running ----------------------------------------------------------------------------------------------


def examples_of(arguments: argparse.Namespace) -> list[Example]:
    if arguments.data:
        return common.read_some_rows(arguments.data, data_example, arguments.limit)
    return [mini_example(arguments, seed, i) for seed in arguments.seeds for i in range(arguments.prompts)]


def run(arguments: argparse.Namespace) -> list[dict]:
    """All predictions of all methods, from disk or generated now."""
    examples = examples_of(arguments)
    model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.dtype)
    prompts = [prompt_ids(tokenizer, example, not arguments.no_chat) for example in examples]
    solution = max(len(tokenizer.encode(example.solution)) for example in examples)
    settings = settings_of(arguments, solution, max(len(example.answers) for example in examples))
    sizes = Sizes(statistics.mean(map(len, prompts)), solution if arguments.mini else settings["max_new_tokens"])
    jobs = common.make_jobs(arguments, arguments.methods, arguments.prompt_share, settings, sizes)
    for job in jobs:
        check_run(model.config, prompts, Options(**job.settings))
    mini = f"k={arguments.k} reference-rate={arguments.reference_rate} min-distance={arguments.min_distance}"
    source = common.source_of(arguments, arguments.name or mini)
    asked = [{name: getattr(example, name) for name in SCORED} | {"source": source} for example in examples]
    work = partial(common.predict, model, tokenizer, prompts)
    return common.run_jobs(model, prompts, asked, jobs, arguments, work, check_made, "prompts")


def settings_of(arguments: argparse.Namespace, solution: int, questions: int) -> dict:
    """The settings that no method chooses. solution: tokens of the longest one; questions: the most of a prompt."""
    if arguments.mini:
        return common.run_settings(arguments, max_new_tokens=solution + MARGIN, batch_size=64, compile=False)
    longest = 4096 if questions <= 40 else 8192
    return common.run_settings(arguments, max_new_tokens=longest, batch_size=8, compile=True)


# ---- scoring ----------------------------------------------------------------------------------------------

RIGHT, WRONG = "right", "wrong"
UNREAD = "unread"  # there is an answer, but no letter or number was found in it
MISSING = "missing"  # there is none

# Every repetition of a repetition is bounded, so that no text, however long and odd, is read in more than linear time.
DIGITS = r"(?:\d(?:(?:,|\{,\}|\\,)?\d)*(?:\.\d+)?|\.\d+)"  # 1,024.50, and as LaTeX writes it: 1{,}024
NUMBER = rf"((?:[-−]?\\?[$€£]?|\\?[$€£][-−]){DIGITS})"
LETTER = r"(?!A [a-z])([A-Z])(?![\w'’])"  # B in "B." and "B because", but not in "A dog" or "Bob"
LATEX = r"\\(?:boxed|text|textbf|mathbf|mathrm)|\\[$(\[]"
WRAP = rf"(?:[\s:=*_`\"'$€£¥~+(\[{{]|{LATEX}|(?:USD|EUR|GBP|US|option|choice)(?=[ $(])){{0,16}}"  # before a value
UNIT = r"(?:\\?%|[ ~]?(?:\\text\{ ?)?[A-Za-z€£$¥]{1,12})?"
END = r"[\s.,;!*_`\"'$)\]}\\#>-]{0,32}\Z"
LABEL = r"A(?:nswer|NSWER)[\\_ #(]{0,3}(\d{1,9})[*_) ]{0,4}"
HEADER = re.compile(rf"{LABEL}:|^[#*> ]{{0,8}}{LABEL}$", re.MULTILINE)  # Answer_1:  **Answer 1:**  ### Answer 1
GOLD = re.compile(rf"([A-Z])\Z|(?:.*)#### *{NUMBER}", re.DOTALL)


def ways_to_say(value: str, as_asked: str, whole: str) -> list[re.Pattern]:
    """How an answer names its value: as the prompt asks for it, then as models do, the clearest way first."""
    boxed, hashes = rf"\\boxed\{{{WRAP}{value}", rf"#### *{WRAP}{value}"
    loose = [rf"[Aa]nswer[*_]{{0,2}} is\b{WRAP}{value}", boxed, rf"[Aa]nswer[*_]{{0,2}} ?:{WRAP}{value}", hashes]
    return [re.compile(pattern) for pattern in (f"answer is {as_asked}", *loose, rf"\A{WRAP}{whole}{END}")]


SAYS = {float: ways_to_say(NUMBER, NUMBER, NUMBER + UNIT), str: ways_to_say(LETTER, r"\(([A-Z])\)", LETTER)}


def gold(answer: str) -> str | float | None:
    """The letter or the number that is right; None where the text has neither."""
    match = GOLD.match(answer)
    if not match or match[1]:
        return match and match[1]
    number = to_number(match[2])
    return number if math.isfinite(number) else None


def to_number(text: str) -> float:
    return float(re.sub(r"[^\d.-]", "", text.replace("−", "-")))


def read_answer(text: str, kind: type) -> str | float | None:
    """The letter (str) or the number (float) that a text says; None if there is none that can be read."""
    for pattern in SAYS[kind]:
        if match := pattern.search(text):
            return match[1] if kind is str else to_number(match[1])
    return None


def by_number(pred: str, answers: list[str], numbers: list[int]) -> list[str]:
    """Each answer against the text after its own `Answer_N:`; of several, the first that can be read counts."""
    headers = list(HEADER.finditer(pred))
    starts = [header.start() for header in headers] + [len(pred)]
    texts: dict[int, list[str]] = {}
    for header, end in zip(headers, starts[1:], strict=True):
        texts.setdefault(int(header[1] or header[2]), []).append(pred[header.end() : end])
    return [outcome(texts.get(number), gold(answer)) for number, answer in zip(numbers, answers, strict=True)]


def outcome(texts: list[str] | None, wanted: str | float) -> str:
    if texts is None:
        return MISSING
    readings = (read_answer(text, type(wanted)) for text in texts)
    given = next((reading for reading in readings if reading is not None), None)
    if given is None:
        return UNREAD
    return RIGHT if given == wanted else WRONG


def by_order(pred: str, answers: list[str], numbers: list[int]) -> list[str]:
    """The official rule: the i-th answer found against the i-th expected, whatever their numbers; digits as text."""
    if all(re.fullmatch("[A-Z]", answer) for answer in answers):
        given, expected = letters_in_order(pred), answers
    else:
        given = digits_in_order(pred)
        found = [re.search(r"####\s*(\d+)", answer) for answer in answers]
        expected = [match and match[1] for match in found]
    outcomes = [RIGHT if a == b else WRONG for a, b in zip(expected, given, strict=False)]
    return outcomes + [MISSING] * (len(expected) - len(outcomes))


def letters_in_order(pred: str) -> list[str]:
    """All that `Answer_\\d+:\\s*[^\\n]*?answer is \\(([^)\\n]*)\\)` finds, in linear and not in quadratic time."""
    found, is_open, start = [], False, None  # start: of the text in brackets
    for match in re.finditer(r"Answer_\d+:\s*|answer is \(|\)|\n", pred):
        text = match[0]
        if "\n" in text:  # it ends what was open, but a header reaches over it
            is_open, start = text != "\n", None
        elif text == ")":
            if start is not None:
                found.append(pred[start : match.start()])
                is_open, start = False, None
        elif text[0] == "A":
            is_open = True
        elif is_open and start is None:
            start = match.end()
    return found


def digits_in_order(pred: str) -> list[str]:
    """All that `Answer_\\d+:.*?answer is (\\d+)` finds over line ends, in linear and not in quadratic time."""
    found, is_open = [], False
    for match in re.finditer(r"Answer_\d+:|answer is (\d+)", pred):
        if is_open and match[1]:
            found.append(match[1])
        is_open = not match[1]
    return found


PAIRINGS: dict[str, Callable] = {"number": by_number, "official": by_order}


def read_predictions(path: str) -> list[dict]:
    name = Path(path).stem.encode("utf-8", "replace").decode()
    return [{"method": name} | row for row in common.read_some_rows(path, checked_prediction)]


def checked_prediction(row: dict) -> dict:
    """A row that this program wrote, or one of the official results, which have none of these fields."""
    answers = checked_answers(row)
    if row.keys() & {"key", "numbers", "stats"}:
        check_made(row)
        check_asked(row)
        return row
    check_fields(row, {"pred": common.TEXT})
    first = 6 if isinstance(gold(answers[0]), str) else 9  # after 5 solved examples, or GSM8K's 8
    numbers = question_numbers(str(row.get("prompt")), len(answers)) or range(first, first + len(answers))
    return {"answers": answers, "pred": row["pred"], "numbers": list(numbers), "references": [], "seed": 0}


def check_made(row: dict) -> None:
    """What a run has made of a prompt."""
    check_fields(row, {"pred": common.TEXT, "finish_reason": common.TEXT, "stats": common.STATS})


def check_asked(row: dict) -> None:
    """What a prediction carries along, so that it can be scored alone; its answers have been checked."""
    count = len(row["answers"])
    kinds = {"numbers": list_of(common.COUNT, count), "seed": common.INT}
    kinds |= dict.fromkeys(("source", "method"), common.WHOLE_TEXT)
    kinds |= dict.fromkeys(("prompt_share", "decode_budget"), common.AMOUNT)
    check_fields(row, kinds)
    if row.get("references") != []:
        check_fields(row, {"references": list_of(common.BOOL, count)})


# ---- the report -------------------------------------------------------------------------------------------


def line_of(rows: list[dict], pairing: str) -> dict:
    """All there is to say about one method at one budget."""
    outcomes = [PAIRINGS[pairing](row["pred"], row["answers"], row["numbers"]) for row in rows]
    scored = [Scored(row["seed"], [x == RIGHT for x in each]) for row, each in zip(rows, outcomes, strict=True)]
    references = [row["references"] or [False] * len(row["answers"]) for row in rows]
    cross = accuracy(scored, lambda prompt, i: references[prompt][i])
    return {
        **{name: rows[0].get(name) for name in report.LABELS},
        "accuracy": accuracy(scored),
        "plain": accuracy(scored, lambda prompt, i: not references[prompt][i]) if cross else None,
        "cross_reference": cross,
        "quartiles": report.accuracy_by_part(scored, 4),
        "eighths": report.accuracy_by_part(scored, 8),
        "prompts": len(rows),
        **{name: sum(each.count(name) for each in outcomes) for name in (MISSING, UNREAD)},
        "examples": [100 * statistics.mean(row.scores) for row in scored],
        **report.costs(rows),
    }


COLUMNS: report.Columns = {
    **report.LABEL_COLUMNS,
    "prompts": lambda line: str(line["prompts"]),
    "accuracy": percent("accuracy"),
    "plain": percent("plain"),
    "cross-ref": percent("cross_reference"),
    **{f"Q{i + 1}": percent_at("quartiles", i) for i in range(4)},
    **{name: lambda line, name=name: str(line[name] or "") for name in (MISSING, UNREAD)},
    **report.COST_COLUMNS,
}
LEGEND = """
missing, unread: answers that are not there, and answers in which no letter or number was found."""


def panels(lines: list[dict]) -> list[Panel]:
    """Accuracy by question position, for each prompt share and decode budget."""
    made = []
    for group in report.grouped(lines, "source", "prompt_share"):
        for budget in report.by_budget(group):
            made.append(position_panel(report.budget_title(budget[-1]), "answer", budget))
    return made


if __name__ == "__main__":
    sys.exit(main())
