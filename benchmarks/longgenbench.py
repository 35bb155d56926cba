"""LongGenBench (arXiv 2410.04199): one prompt asks many questions, one long answer solves them all, in order.

python benchmarks/longgenbench.py --mini                        the bundled model on fresh problems, no data needed
python benchmarks/longgenbench.py --data gsm8k_30.jsonl --checkpoint DIR_OR_HUB_ID
python benchmarks/longgenbench.py --score-only FILE.jsonl       rows with "answers" and "pred"
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints" / "mini"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from problems import make_problem

from benchmarks import common
from benchmarks.common import Panel, Sizes, require
from generate import Options, Parser, check_run, load
from scope import STRATEGIES

METHODS = [*STRATEGIES, "slide:score=current", "h2o:score=current"]
MARGIN = 16  # tokens that an answer of the mini model may have beyond the longest solution


def main(argv: list[str] | None = None) -> int:
    return common.guarded("longgenbench.py", lambda: benchmark(parse_arguments(argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    predictions = read_predictions(arguments.score_only) if arguments.score_only else run(arguments)
    lines = [line_of(rows, arguments.pairing) for rows in common.grouped(predictions, *common.LABELS)]
    print(common.report(lines, COLUMNS))
    if arguments.json:
        content = {"arguments": vars(arguments), "lines": lines}
        Path(arguments.json).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.plot:
        common.plot(arguments.plot, panels(lines))


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    first, *_ = __doc__.split("\n")
    parser = Parser("longgenbench.py", description=first, formatter_class=common.Help)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--mini", action="store_true", help="make problems of the bundled model's kind")
    source.add_argument("--data", metavar="FILE.jsonl", help="rows with prompt, questions, answers, as published")
    source.add_argument("--score-only", metavar="FILE.jsonl", help="rows with answers and pred; runs nothing")
    add_problem_flags(parser.add_argument_group("problems"))
    common.add_method_flags(parser.add_argument_group("methods"), METHODS)
    common.add_run_flags(parser.add_argument_group("running"))
    results = parser.add_argument_group("results")
    results.add_argument("--pairing", choices=PAIRINGS, default="number", help="official: by order of appearance")
    common.add_result_flags(results)
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    return arguments


def add_problem_flags(group) -> None:
    group.add_argument("--k", type=int, default=16, help="mini: questions per prompt")
    group.add_argument("--prompts", type=int, default=24, help="mini: prompts per seed")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="mini: seeds of the problems")
    group.add_argument("--reference-rate", type=float, default=0.4, help="mini: share of cross-references")
    group.add_argument("--min-distance", type=int, default=1, help="mini: answers that a reference reaches back")
    group.add_argument("--limit", type=int, help="data: only the first rows")
    group.add_argument("--no-chat", action="store_true", help="data: the paper's plain prompt, no chat template")
    longest = "(default: mini: the longest solution + a margin; data: 4096 for up to 40 questions, else 8192)"
    group.add_argument("--max-new-tokens", type=int, help=longest)


def check_arguments(arguments: argparse.Namespace) -> None:
    require(0 <= arguments.reference_rate <= 1, "reference_rate", arguments.reference_rate, "0 to 1")
    for name in ("k", "prompts", "min_distance", "limit"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, name, value, "1 or more")
    require(len(set(arguments.seeds)) == len(arguments.seeds), "seeds", arguments.seeds, "all different")
    if arguments.data and not arguments.predictions:
        arguments.predictions = f"{Path(arguments.data).stem}.predictions.jsonl"
    common.check_flags(arguments)


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

    def asked(self) -> dict:
        """What a prediction carries along, so that it can be scored alone."""
        return {name: getattr(self, name) for name in ("answers", "numbers", "references", "seed")}


def mini_examples(arguments: argparse.Namespace) -> list[Example]:
    return [mini_example(arguments, seed, i) for seed in arguments.seeds for i in range(arguments.prompts)]


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


def data_examples(arguments: argparse.Namespace) -> list[Example]:
    examples = common.read_rows(Path(arguments.data), data_example)[: arguments.limit]
    if not examples:
        raise ValueError(f"{arguments.data} has no usable row")
    return examples


def data_example(row: dict) -> Example:
    """A published row -> an Example; ValueError says what is wrong with it."""
    prompt, answers = row.get("prompt"), checked_answers(row)
    if not isinstance(prompt, str):
        raise ValueError("no text in `prompt`")
    numbers = question_numbers(prompt, len(answers))
    if not numbers:
        raise ValueError(f"{len(answers)} answers, but not as many lines `Question_N:` in the prompt")
    task = row.get("task")
    system = SYSTEM + (ABOUT.format(str(task).replace("_", " ")) if task else "")
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


def run(arguments: argparse.Namespace) -> list[dict]:
    """All predictions of all methods, from disk or generated now."""
    examples = mini_examples(arguments) if arguments.mini else data_examples(arguments)
    model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.dtype)
    prompts = [prompt_ids(tokenizer, example, not arguments.no_chat) for example in examples]
    solution = max(len(tokenizer.encode(example.solution)) for example in examples)
    settings = run_settings(arguments, solution, max(len(example.answers) for example in examples))
    output = solution if arguments.mini else settings["max_new_tokens"]
    jobs = common.make_jobs(arguments, settings, Sizes(statistics.mean(map(len, prompts)), output))
    for job in jobs:
        check_run(model.config, prompts, Options(**job.settings))
    asked = [example.asked() | {"source": source_of(arguments)} for example in examples]
    return common.run_jobs(model, tokenizer, prompts, asked, jobs, common.Predictions(arguments.predictions))


def run_settings(arguments: argparse.Namespace, solution: int, questions: int) -> dict:
    """The settings that no method chooses; solution: tokens of the longest one."""
    if arguments.mini:
        settings = {"max_new_tokens": solution + MARGIN, "batch_size": 64, "compile": False}
    else:
        settings = {"max_new_tokens": 4096 if questions <= 40 else 8192, "batch_size": 8, "compile": True}
    given = {name: getattr(arguments, name) for name in settings}
    return settings | {name: value for name, value in given.items() if value is not None}


def source_of(arguments: argparse.Namespace) -> str:
    """Keeps the runs apart that share a predictions file."""
    mini = f"k={arguments.k} reference-rate={arguments.reference_rate} min-distance={arguments.min_distance}"
    return f"{arguments.checkpoint} {mini if arguments.mini else Path(arguments.data).stem} {arguments.set}".rstrip()


# ---- scoring ----------------------------------------------------------------------------------------------

NUMBER = r"\$?(-?\d[\d,]*(?:\.\d+)?)"
GOLD = re.compile(rf"([A-Z])\Z|(?:.*)#### *{NUMBER}", re.DOTALL)
ANSWER = re.compile(rf"answer is (?:\(([A-Z])\)|{NUMBER})")


def gold(answer: str) -> str | float | None:
    return value(GOLD.match(answer))


def value(match: re.Match | None) -> str | float | None:
    """The letter or the number that a pattern above found."""
    if match is None:
        return None
    letter, number = match.groups()
    return letter or float(number.replace(",", ""))


def by_number(pred: str, answers: list[str], numbers: list[int]) -> list[bool]:
    """Each answer against the text after its own `Answer_N:`; the first counts if there are two."""
    parts = re.split(r"Answer_(\d{1,9}):", pred)
    given = {}
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        if match := ANSWER.search(text):
            given.setdefault(int(number), value(match))
    return [given.get(number) == gold(answer) for number, answer in zip(numbers, answers, strict=True)]


def by_order(pred: str, answers: list[str], numbers: list[int]) -> list[bool]:
    """The official rule: the i-th answer found against the i-th expected, whatever their numbers; digits as text."""
    if all(re.fullmatch("[A-Z]", answer) for answer in answers):
        given, expected = re.findall(r"Answer_\d+:\s*[^\n]*?answer is \(([^)\n]*)\)", pred), answers
    else:
        given = re.findall(r"Answer_\d+:.*?answer is (\d+)", pred, re.DOTALL)
        found = [re.search(r"####\s*(\d+)", answer) for answer in answers]
        expected = [match and match[1] for match in found]
    given += [""] * (len(expected) - len(given))
    return [a == b for a, b in zip(expected, given, strict=False)]


PAIRINGS: dict[str, Callable] = {"number": by_number, "official": by_order}


@dataclass(frozen=True)
class Scored:
    """One example's answers, in the order of the questions."""

    seed: int
    right: list[bool]
    references: list[bool]

    def part(self, i: int, parts: int) -> int:
        """Question i lies in this one of `parts` equal stretches of the answer."""
        return i * parts // len(self.right)


def score(row: dict, pairing: str) -> Scored:
    right = PAIRINGS[pairing](row["pred"], row["answers"], row["numbers"])
    return Scored(row["seed"], right, row["references"] or [False] * len(right))


def accuracy(scored: list[Scored], wanted=lambda row, i: True) -> tuple[float, float | None] | None:
    """Percent and spread over the wanted questions."""
    rights = [[right for i, right in enumerate(row.right) if wanted(row, i)] for row in scored]
    return common.mean_and_spread([(row.seed, i, rights[i]) for i, row in enumerate(scored)])


def read_predictions(path: str) -> list[dict]:
    rows = common.read_rows(Path(path), checked_prediction)
    if not rows:
        raise ValueError(f"{path} has no usable row")
    return [{"method": Path(path).stem} | row for row in rows]


def checked_prediction(row: dict) -> dict:
    """A row that this program wrote, or one of the official results."""
    answers, pred = checked_answers(row), row.get("pred")
    if not isinstance(pred, str):
        raise ValueError("no text in `pred`")
    if row.keys() >= {"numbers", "references", "seed", "stats"}:
        return row
    first = 6 if isinstance(gold(answers[0]), str) else 9  # after 5 solved examples, or GSM8K's 8
    numbers = question_numbers(str(row.get("prompt")), len(answers)) or range(first, first + len(answers))
    return {"answers": answers, "pred": pred, "numbers": list(numbers), "references": [], "seed": 0}


# ---- the report -------------------------------------------------------------------------------------------


def line_of(rows: list[dict], pairing: str) -> dict:
    """All there is to say about one method at one budget."""
    scored = [score(row, pairing) for row in rows]
    cross = accuracy(scored, lambda row, i: row.references[i])
    return {
        **{name: rows[0].get(name) for name in common.LABELS},
        "accuracy": accuracy(scored),
        "plain": accuracy(scored, lambda row, i: not row.references[i]) if cross else None,
        "cross_reference": cross,
        "quartiles": by_part(scored, 4),
        "eighths": by_part(scored, 8),
        "prompts": len(rows),
        "examples": [100 * statistics.mean(row.right) for row in scored],
        **common.costs(rows),
    }


def by_part(scored: list[Scored], parts: int) -> list[float | None]:
    """Accuracy in each of `parts` equal stretches of the answer; None where a short answer has no question."""
    found = [accuracy(scored, lambda row, i, part=part: row.part(i, parts) == part) for part in range(parts)]
    return [each and each[0] for each in found]


COLUMNS: dict[str, Callable[[dict], str]] = {
    **common.LABEL_COLUMNS,
    "prompts": lambda line: str(line["prompts"]),
    "accuracy": lambda line: common.percent(line["accuracy"]),
    "plain": lambda line: common.percent(line["plain"]),
    "cross-ref": lambda line: common.percent(line["cross_reference"]),
    **{f"Q{i + 1}": lambda line, i=i: common.percent(line["quartiles"][i]) for i in range(4)},
    **common.COST_COLUMNS,
}


def panels(lines: list[dict]) -> list[list[Panel]]:
    """A row for every prompt share: accuracy by question position at each decode budget, then by decode budget."""
    made = []
    for group in common.grouped(lines, "source", "prompt_share"):
        budgets = [x for x in common.grouped(group, "decode_budget") if x[0]["decode_budget"] != 1]
        full = [line for line in group if line["decode_budget"] == 1]  # keeps all of the output: in every panel
        by_position = [position_panel(full + budget) for budget in budgets or [[]]]
        made.append(by_position + [budget_panel(full, budgets)] * (len(budgets) > 1))
    return made


def position_panel(lines: list[dict]) -> Panel:
    curves = {line["method"]: [(i + 1, y) for i, y in enumerate(line["eighths"]) if y is not None] for line in lines}
    return Panel(title(lines[-1], "decode_budget"), "question position (eighths of the answer)", curves)


def budget_panel(full: list[dict], budgets: list[list[dict]]) -> Panel:
    curves: dict[str, list] = {}
    for budget in budgets:
        for line in full + budget:
            curves.setdefault(line["method"], []).append((100 * budget[0]["decode_budget"], line["accuracy"][0]))
    return Panel(title(budgets[0][0]), "decode budget (% of the output)", curves, log_x=True)


def title(line: dict, *more: str) -> str:
    shares = [(name, line[name]) for name in ("prompt_share", *more) if line[name] is not None]
    return ", ".join(f"{name.split('_')[0]} {common.share_text(share)}" for name, share in shares)


if __name__ == "__main__":
    sys.exit(main())
