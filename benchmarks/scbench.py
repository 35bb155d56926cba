"""SCBench (arXiv 2412.10319): one long context, then several queries: requests over one cache, or turns of one talk.

python benchmarks/scbench.py --mini                             the bundled model on fresh problems, no data needed
python benchmarks/scbench.py --hub scbench_kv --checkpoint DIR_OR_HUB_ID
python benchmarks/scbench.py --data scbench_kv.jsonl --mode multi-turn --checkpoint DIR_OR_HUB_ID

A row: {"context": TEXT, "multi_turns": [{"input": TEXT, "answer": TEXT, ...}, ...]}, as in the files
data/TASK.jsonl of the hub's data set microsoft/SCBench.
"""

import argparse
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints" / "mini"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from problems import RESULT, make_problem

from benchmarks import common, report
from benchmarks.common import Job, Progress, Sizes, flag
from benchmarks.plots import PERCENT, Panel
from benchmarks.report import Scored, accuracy, figure, percent_at, share_text
from cache import Cache
from generate import Conversation, Options, Result, Snapshot, load, note, run_program, size_of
from hf.tokenizer import Tokenizer, without_stop
from scope import one_line, require

METHODS = ["full", "slide", "discontinuous", "h2o", "h2o:score=current", "streaming"]
METHODS += ["full:compress=h2o", "full:compress=snapkv", "full:compress=streaming"]
HIGHLIGHTED = ["full", "discontinuous", "slide", "h2o", "streaming"]
MARGIN = 4  # tokens that an answer of the mini model may have beyond the longest solution
HUB = "microsoft/SCBench"


def main(argv: list[str] | None = None) -> int:
    return run_program("scbench.py", lambda: benchmark(parse_arguments(argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    if arguments.from_json:
        lines = common.saved_lines(arguments.from_json)
    else:
        lines = [line_of(rows) for rows in report.grouped(run(arguments), *report.LABELS)]
    common.publish(arguments, lines, COLUMNS, panels, HIGHLIGHTED, LEGEND)


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser("scbench.py", __doc__)
    source = common.add_source_flags(parser, "context and multi_turns")
    source.add_argument("--hub", metavar="TASK", help=f"data/TASK.jsonl of {HUB}: {', '.join(TASKS)}")
    queries = parser.add_argument_group("queries")
    common.add_problem_flags(queries, "contexts")
    add_query_flags(queries)
    shares = "of the methods that name a compressor: the share of the context that it keeps"
    common.add_method_flags(parser.add_argument_group("methods"), METHODS, [0.5], [0.8, 0.6], shares)
    common.add_run_flags(parser.add_argument_group("running"))
    common.add_result_flags(parser.add_argument_group("results"))
    arguments = parser.parse_args(argv)
    check_references(arguments)
    if common.data_name(arguments):
        task = task_of(arguments)
        if task not in TASKS:
            raise ValueError(f"task {task} has no scorer here: --task must be one of {', '.join(TASKS)}")
    common.check_flags(arguments, "contexts")
    return arguments


def add_query_flags(group) -> None:
    group.add_argument("--mode", choices=["multi-request", "multi-turn"], default="multi-request", help="what follows "
                       "the context: requests that do not know of each other, or turns of a conversation")  # fmt: skip
    own = "multi-turn: a later turn sees what the model has answered (default: the reference answers)"
    group.add_argument("--own-answers", action="store_true", help=own)
    rate = "mini: share of cross-references (default: multi-request: none; multi-turn: 0.4)"
    group.add_argument("--reference-rate", type=float, help=rate)
    group.add_argument("--task", help="data: what the rows are (default: the file's name)")
    longest = "of an answer (default: mini: the longest solution + a margin; data: as the task has it)"
    group.add_argument("--max-new-tokens", type=int, help=longest)


def check_references(arguments: argparse.Namespace) -> None:
    """Only turns can refer to each other."""
    turns = arguments.mode == "multi-turn"
    if arguments.own_answers and not turns:
        raise ValueError("--own-answers goes with --mode multi-turn: a request sees no other one's answer")
    rate, most = reference_rate(arguments), 1 if turns else 0
    wanted = "0 to 1" if turns else "0: a request cannot refer to another one's answer, --mode multi-turn can"
    require(0 <= rate <= most, flag("reference_rate"), rate, wanted)


def reference_rate(arguments: argparse.Namespace) -> float:
    if arguments.reference_rate is not None:
        return arguments.reference_rate
    return 0.4 if arguments.mode == "multi-turn" else 0.0


def task_of(arguments: argparse.Namespace) -> str:
    """Which of TASKS the rows of a data file are."""
    return arguments.task or common.data_name(arguments)


# ---- tasks: what is said around a context and a query, and how an answer is scored, 0 to 1 -------------------


def contains(pred: str, answers: list[str]) -> float:
    """Retrieval: the value itself is somewhere in the answer."""
    return float(answers[0] in pred)


def names_one(pred: str, answers: list[str]) -> float:
    """Many-shot: any of the answers, as whole words, in any case. The published script compares substrings, and where
    the answer is one text, each of its letters alone."""
    return float(any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", pred, re.IGNORECASE) for answer in answers))


def share_named(pred: str, answers: list[str]) -> float:
    """Variable tracking: the share of the answers that are named."""
    return statistics.mean(float(answer.lower() in pred.lower()) for answer in answers)


def first_number(pred: str, answers: list[str]) -> float:
    """Math find and pass keys: the first number that is said. The published script knows no minus."""
    found = re.search(NUMBER, pred)
    return float(found is not None and float(found[0]) == float(answers[0]))


def letter(pred: str, answers: list[str]) -> float:
    """Multiple choice: the letter after "answer is", else the first that stands alone."""
    found = re.search(r"(?:answer|option) is\W*([A-D])\b", pred) or re.search(r"\b([A-D])\b", pred)
    return float(found is not None and found[1] == answers[0])


def word_f1(pred: str, answers: list[str]) -> float:
    """English questions: the F1 of words, of the best answer, without articles, as in SQuAD (arXiv 1606.05250). The
    published script looks for the answer anywhere in the text, so that a long text is more often right."""
    texts = ([x for x in re.findall(r"\w+", text.lower()) if x not in ("a", "an", "the")] for text in (pred, *answers))
    return best_f1(*map(Counter, texts))


def character_f1(pred: str, answers: list[str]) -> float:
    """Chinese questions: the F1 of letters and digits, of the best answer."""
    return best_f1(*(Counter(x for x in text.lower() if x.isalnum()) for text in (pred, *answers)))


def best_f1(given: Counter, *wanted: Counter) -> float:
    """The harmonic mean of precision and recall, for the answer that fits best."""
    return max(2 * (given & each).total() / max(given.total() + each.total(), 1) for each in wanted)


def solution(pred: str, answers: list[str]) -> float:
    """Mini: the number of "The answer is N" in the first line."""
    found = RESULT.match("Answer_0:" + pred)
    return float(found is not None and found[2] == answers[0])


NUMBER = r"-?\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Task:
    score: Callable[[str, list[str]], float]
    max_new_tokens: int
    start: str = ""  # before the context
    query: str = "{input}"


# Texts and lengths as the benchmark has them. Not here: summaries and code, which need ROUGE and RepoQA's parser.
VALUE = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
PASS_KEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
    "about the important information.\n\n"
)
BOOK = "Read the book and answer the question."
QUESTION = "Question: {input}\nAnswer:"
CHOICE = "Question: {input}\n{options}\n\nThe letter of the correct answer is"
TASKS = {
    "scbench_kv": Task(contains, 150, VALUE),
    "scbench_prefix_suffix": Task(contains, 150),
    "scbench_vt": Task(share_named, 30),
    "scbench_qa_eng": Task(word_f1, 40, f"{BOOK} Be very concise in your answer.\n\n", QUESTION),
    "scbench_qa_chn": Task(character_f1, 40, "阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案："),
    "scbench_choice_eng": Task(letter, 40, f"{BOOK}\n\n", CHOICE),
    "scbench_many_shot": Task(names_one, 10),
    "scbench_mf": Task(first_number, 5, query="{what}{input}"),
    "scbench_passkey": Task(first_number, 15, PASS_KEY),
}
SCORERS = {name: task.score for name, task in TASKS.items()} | {"mini": solution}


# ---- examples: a context, its queries, and what the answers are compared with --------------------------------


@dataclass(frozen=True)
class Example:
    """Queries in the order in which they are asked; answers has for each the texts that are right."""

    task: str
    context: str
    queries: list[str]
    answers: list[list[str]]
    references: list[str]  # what later turns see as the answer
    seed: int = 0

    def asked(self) -> dict:
        """What a prediction carries along, so that it can be scored alone."""
        return {name: getattr(self, name) for name in ("task", "answers", "seed")}


def mini_example(arguments: argparse.Namespace, seed: int, i: int) -> Example:
    """Every question of a problem, each asked for alone, by the beginning of its answer."""
    problem = make_problem(f"scbench {seed} {i}", arguments.k, reference_rate(arguments))
    order = random_order(arguments.k, references_of(problem.prompt), Random(f"order {seed} {i}"))
    solutions = [line.partition(":")[2] for line in problem.answer.splitlines()]
    return Example(
        task="mini",
        context=problem.prompt,
        queries=[f"Answer_{label}:" for label in order],
        answers=[[str(problem.expected[label - 1])] for label in order],
        references=[solutions[label - 1] for label in order],
        seed=seed,
    )


def references_of(prompt: str) -> dict[int, int]:
    """{question: the answer that it starts from}"""
    found = re.findall(r"^Question_(\d+):.* as Answer_(\d+) ", prompt, re.MULTILINE)
    return {int(label): int(reference) for label, reference in found}


def random_order(k: int, references: dict[int, int], rng: Random) -> list[int]:
    """1 to k, shuffled, but an answer that another one starts from comes before it."""
    waiting, order = set(range(1, k + 1)), []
    while waiting:
        order.append(rng.choice([label for label in sorted(waiting) if references.get(label) not in waiting]))
        waiting.remove(order[-1])
    return order


def download(task: str) -> str:
    """The hub's file of a task, in the hub's own cache."""
    from huggingface_hub import hf_hub_download  # here, so that a local file does not wait for it

    try:
        return hf_hub_download(HUB, f"data/{task}.jsonl", repo_type="dataset")
    except Exception as error:  # no network, no login, a full disk: they share no base class
        raise ValueError(f"--hub {task}: {one_line(error)}; or download it and give --data FILE") from error


def data_example(name: str, row: dict) -> Example:
    """A published row -> an Example; ValueError says what is wrong with it."""
    task, turns = TASKS[name], row.get("multi_turns")
    context = row.get("context")
    if not context or not isinstance(context, str | list):
        raise ValueError("no text in `context`")
    if not isinstance(turns, list) or not turns:
        raise ValueError("no list in `multi_turns`")
    answers = [checked_answers(task, f"turn {i + 1}", turn) for i, turn in enumerate(turns)]
    return Example(
        task=name,
        context=f"{task.start}{context}",  # math find has a list of numbers
        queries=[query_text(task, turn) for turn in turns],
        answers=answers,
        references=[", ".join(each) if task.score is share_named else each[0] for each in answers],
    )


def checked_answers(task: Task, name: str, turn) -> list[str]:
    """All that is right, of an option its letter; ValueError says what is wrong with a turn."""
    if not isinstance(turn, dict) or not isinstance(turn.get("input"), str):
        raise ValueError(f"{name} has no text in `input`")
    options, given = turn.get("options") or [], turn.get("answer")
    if not isinstance(options, list):
        raise ValueError(f"{name} has no list in `options`")
    given = given if isinstance(given, list) else [given]
    given = ["ABCD"[options.index(x)] if x in options[:4] else x for x in given]
    answers = [str(x) for x in given if isinstance(x, str | int | float) and str(x)]
    if not answers or len(answers) < len(given):
        raise ValueError(f"{name} has neither a text nor a number in `answer`")
    if task.score is first_number and not re.fullmatch(NUMBER, answers[0]):
        raise ValueError(f"{name} has {answers[0][:40]!r} for an answer: a number is expected")
    if task.score is letter and (len(options) != 4 or answers[0] not in list("ABCD")):
        raise ValueError(f"{name} is no choice of four `options`, one of which is the answer")
    return answers


def query_text(task: Task, turn: dict) -> str:
    options = "\n".join(f"{name}. {text}" for name, text in zip("ABCD", turn.get("options") or [], strict=False))
    what = re.search(r"The (.+) is", turn["input"])
    what = f"What is the {what[1].lower()}?\n\n" if what else ""
    return task.query.format(input=turn["input"], options=options, what=what)


# ---- dialogues: the tokens that are read ------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """What stands around a context, its queries and their answers."""

    start: str  # before the context
    ask: str  # between the context and a query
    end: str  # between a query and its answer
    next: str  # between an answer and the next query


MINI_FRAME = Frame("", "", "", "\n")
PLAIN_FRAME = Frame("", "\n\n", "", "\n\n")


def chat_frame(tokenizer: Tokenizer) -> Frame:
    """Cut out of what the chat template makes of a user, an assistant and a user again."""
    cut = "[CUT]"
    parts = tokenizer.render([{"role": role, "content": cut} for role in ("user", "assistant", "user")]).split(cut)
    if len(parts) != 4:
        raise ValueError("the chat template drops what was said before: run with --no-chat")
    start, _, following, end = parts
    return Frame(start, "\n\n", end, following)


@dataclass(frozen=True)
class Dialogue:
    """An example as token ids: the context, and what is read before each answer."""

    mode: str
    own_answers: bool
    context: list[int]
    reads: list[list[int]]

    @property
    def requests(self) -> bool:
        return self.mode == "multi-request"

    def room(self, max_new_tokens: int) -> int:
        """The most tokens that ever follow the context at a time, without the answer that is being written."""
        lengths = list(map(len, self.reads))
        return max(lengths) if self.requests else sum(lengths) + self.own_answers * len(lengths) * max_new_tokens


def make_dialogue(arguments: argparse.Namespace, tokenizer: Tokenizer, example: Example) -> Dialogue:
    chat = not arguments.mini and not arguments.no_chat and tokenizer.template is not None
    frame = chat_frame(tokenizer) if chat else MINI_FRAME if arguments.mini else PLAIN_FRAME
    context = tokenizer.encode(frame.start + example.context, bos=not chat)  # a template writes its own bos
    reads = []
    for i, query in enumerate(example.queries):
        later = i > 0 and arguments.mode == "multi-turn"
        answered = example.references[i - 1] if later and not arguments.own_answers else ""
        before = frame.next if later else frame.ask
        reads.append(tokenizer.encode_after(f"{answered}{before}{query}{frame.end}"))
    return Dialogue(arguments.mode, arguments.own_answers, context, reads)


# ---- running ----------------------------------------------------------------------------------------------


def examples_of(arguments: argparse.Namespace) -> list[Example]:
    if arguments.mini:
        return [mini_example(arguments, seed, i) for seed in arguments.seeds for i in range(arguments.contexts)]
    path = arguments.data or download(arguments.hub)
    return common.read_some_rows(path, partial(data_example, task_of(arguments)), arguments.limit)


def run(arguments: argparse.Namespace) -> list[dict]:
    """All predictions of all methods, from disk or generated now."""
    examples = examples_of(arguments)
    model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.dtype)
    if arguments.mini:
        tokenizer = stops_at_newline(tokenizer)
    longest = longest_answer(arguments, tokenizer, examples)
    settings = settings_of(arguments, longest)
    pairs = [(example, make_dialogue(arguments, tokenizer, example)) for example in examples]
    pairs = fitting(pairs, model.config.context_limit()[0], settings["max_new_tokens"])
    dialogues = [dialogue for _, dialogue in pairs]
    jobs = jobs_of(arguments, settings, Sizes(statistics.mean(len(each.context) for each in dialogues), longest))
    asked = [example.asked() | {"source": source_of(arguments)} for example, _ in pairs]
    inputs, work = list(map(asdict, dialogues)), partial(predict, model, tokenizer, dialogues)
    return common.run_jobs(model, inputs, asked, jobs, common.predictions_path(arguments), work, "conversations")


def stops_at_newline(tokenizer: Tokenizer) -> Tokenizer:
    """The mini model would go on with the next question's answer."""
    return replace(tokenizer, stop_ids=[*tokenizer.stop_ids, tokenizer.encode("\n", bos=False)[-1]])


def longest_answer(arguments: argparse.Namespace, tokenizer: Tokenizer, examples: list[Example]) -> int:
    """Tokens that an answer may take: what the decode budgets are shares of."""
    if not arguments.mini:
        return arguments.max_new_tokens or TASKS[task_of(arguments)].max_new_tokens
    lines = {reference + "\n" for example in examples for reference in example.references}
    return max(len(tokenizer.encode(line, bos=False)) for line in lines)


def settings_of(arguments: argparse.Namespace, longest: int) -> dict:
    """The settings that no method chooses."""
    margin = MARGIN if arguments.mini else 0
    return common.run_settings(arguments, max_new_tokens=longest + margin, compile=not arguments.mini)


def fitting(pairs: list[tuple[Example, Dialogue]], limit: int, T: int) -> list[tuple[Example, Dialogue]]:
    """Without the contexts that are too long for the model, all that follows them included; they are named."""
    totals = [len(dialogue.context) + dialogue.room(T) + T for _, dialogue in pairs]
    for number, total in enumerate(totals, 1):
        if total > limit:
            note(f"context {number}: skipped: it needs {total} positions, the model has {limit}")
    if min(totals) > limit:
        raise ValueError(f"no context fits the model's {limit} positions: give a --checkpoint that reads longer texts")
    return [pair for pair, total in zip(pairs, totals, strict=True) if total <= limit]


def jobs_of(arguments: argparse.Namespace, settings: dict, sizes: Sizes) -> list[Job]:
    """Methods that name a compressor run at every prompt share, the others with the whole context."""
    shared = common.parse_settings(arguments.set)
    compressing = [m for m in arguments.methods if "compress" in shared | common.parse_method(m)]
    others = [m for m in arguments.methods if m not in compressing]
    jobs = common.make_jobs(arguments, others, [1.0], settings, sizes)
    return jobs + common.make_jobs(arguments, compressing, arguments.prompt_share, settings, sizes)


def source_of(arguments: argparse.Namespace) -> str:
    mini = f"k={arguments.k} reference-rate={reference_rate(arguments)}"
    mode = arguments.mode + (" own-answers" if arguments.own_answers else "")
    return common.source_of(arguments, mini if arguments.mini else task_of(arguments), mode)


def predict(model, tokenizer, dialogues: list[Dialogue], missing: list[int], job: Job, bar: Progress) -> Iterator:
    """(index, prediction) of each missing dialogue."""
    before, slots = bar.done, max_context(model, dialogues, Options(**job.settings))
    for number, i in enumerate(missing):
        conversation = Conversation(model, tokenizer, dialogues[i].context, **{"max_context": slots} | job.settings)
        prefill_s, turns = conversation.engine.prefill_s, []
        for turn in converse(conversation, dialogues[i]):
            turns.append(turn)
            bar.show(before + number + len(turns) / len(dialogues[i].reads), job.labels["method"])
        restart = restart_of(conversation, conversation.snapshots[0])
        yield i, prediction_of(prefill_s, turns) | {"restart": restart}


def max_context(model, dialogues: list[Dialogue], options: Options) -> int:
    """Slots for the largest of the dialogues: the graphs that were compiled for one serve them all."""
    size = size_of([dialogue.context for dialogue in dialogues], replace(options, batch_size=1))
    with torch.device("meta"):  # sizes only
        slots = max(Cache(model.config, *options.rules(), size, torch.float32).slots[0])
    room = max(dialogue.room(options.max_new_tokens) for dialogue in dialogues)
    return min(slots + room, model.config.context_limit()[0])


@dataclass(frozen=True)
class Turn:
    """One query and its answer, with what they took."""

    asked: Snapshot  # before the answer
    result: Result
    start_s: float  # from the query to the first token, rewinding included

    @property
    def stop(self) -> int | None:
        """The token that ended the answer; None: its longest length ended it."""
        return self.result.token_ids[-1] if self.result.finish_reason == "stop" else None


def converse(conversation: Conversation, dialogue: Dialogue) -> Iterator[Turn]:
    """Ask all queries, as requests or as turns."""
    context, clock, turn = conversation.mark(), Clock(conversation), None
    for ids in dialogue.reads:
        clock.lap()
        if turn and dialogue.requests:
            conversation.rewind(context)
        elif turn and dialogue.own_answers:
            ids = without_stop(conversation.tokenizer, ids, turn.stop)
        elif turn:
            conversation.rewind(turn.asked)  # `ids` begin with the reference answer
        conversation.read(ids)
        start_s = clock.lap()
        turn = Turn(conversation.mark(), conversation.answer(), start_s)
        yield turn


def restart_of(conversation: Conversation, context: Snapshot) -> float | None:
    """Rewinding and the first decode step after it, over the median decode step."""
    clock, steps = Clock(conversation), []
    conversation.rewind(context)
    rewind_s = clock.lap()
    conversation.answer(on_step=lambda cache: steps.append(clock.lap()))
    return (rewind_s + steps[0]) / statistics.median(steps) if steps else None


class Clock:
    """Seconds of one thing after the other, the device's part included."""

    def __init__(self, conversation: Conversation):
        self.wait = conversation.engine.wait
        self.last = 0.0
        self.lap()

    def lap(self) -> float:
        self.wait()
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def prediction_of(prefill_s: float, turns: list[Turn]) -> dict:
    stats = [asdict(turn.result.stats) for turn in turns]
    most = {"live_peak": max(each["live_peak"] for each in stats)}
    mean = {"tokens_per_s": statistics.mean(each["tokens_per_s"] for each in stats)}
    return {
        "preds": [turn.result.text for turn in turns],
        "finish_reasons": [turn.result.finish_reason for turn in turns],
        "prefill_s": prefill_s,
        "start_s": [turn.start_s for turn in turns],
        "stats": stats[0] | most | mean,
    }


# ---- the report -------------------------------------------------------------------------------------------


def line_of(rows: list[dict]) -> dict:
    """All there is to say about one method at one budget."""
    scored = list(map(scored_of, rows))
    return {
        **{name: rows[0].get(name) for name in report.LABELS},
        "contexts": len(rows),
        "accuracy": accuracy(scored),
        "first": accuracy(scored, lambda prompt, i: i == 0),
        "last": accuracy(scored, lambda prompt, i: i == len(scored[prompt].scores) - 1),
        "quartiles": report.accuracy_by_part(scored, 4),
        "by_turn": by_turn(scored),
        **times(rows),
        **report.costs(rows),
    }


def scored_of(row: dict) -> Scored:
    score, pairs = SCORERS[row["task"]], zip(row["preds"], row["answers"], strict=True)
    return Scored(row["seed"], [score(pred, answers) for pred, answers in pairs])


def by_turn(scored: list[Scored]) -> list[tuple[float, float]]:
    """(turn, percent right), at most 8 points: neighbouring turns together."""
    turns = max(len(row.scores) for row in scored)
    parts = min(turns, 8)
    points = []
    for part in range(parts):
        numbers = [i for i in range(turns) if i * parts // turns == part]
        mean, _ = accuracy(scored, lambda prompt, i, numbers=numbers: i in numbers)
        points.append((statistics.mean(numbers) + 1, mean))
    return points


def times(rows: list[dict]) -> dict:
    """Medians: seconds to the first token of the first query, of later ones, and of each turn."""
    starts = [[row["prefill_s"] + row["start_s"][0], *row["start_s"][1:]] for row in rows]  # the first one waits
    turns = [[row[i] for row in starts if i < len(row)] for i in range(max(map(len, starts)))]
    by_turn = [(number, statistics.median(seconds)) for number, seconds in enumerate(turns, 1)]
    prefill_s, first_s = statistics.median(row["prefill_s"] for row in rows), by_turn[0][1]
    known = {"prefill_s": prefill_s, "first_start_s": first_s, "start_by_turn": by_turn}
    if later := [seconds for turn in turns[1:] for seconds in turn]:
        later_s = statistics.median(later)
        known |= {"later_start_s": later_s, "saved": 1 - later_s / first_s}
        known |= {"saved_prefills": (first_s - later_s) / prefill_s}
    if restarts := [row["restart"] for row in rows if row["restart"] is not None]:
        known["restart"] = statistics.median(restarts)
    return known


COLUMNS: report.Columns = {
    **report.LABEL_COLUMNS,
    "contexts": lambda line: str(line["contexts"]),
    "accuracy": report.percent("accuracy"),
    "first": percent_at("first", 0),
    "last": percent_at("last", 0),
    **report.QUARTER_COLUMNS,
    **report.COST_COLUMNS,
    "prefill ms": figure("prefill_s", ".1f", 1e-3),
    "first start": figure("first_start_s", ".1f", 1e-3),
    "later": figure("later_start_s", ".1f", 1e-3),
    "saved": figure("saved", ".0%"),
    "restart": figure("restart", ".2f"),
}
LEGEND = """
first, last: query of each context; Q1 to Q4: quarters of its queries. first start, later: ms to the first token of the
first query, prefill included, and of a later one, medians; saved: 1 - later / first start. restart: rewinding and the
first decode step after it, over the median decode step."""


def panels(lines: list[dict]) -> list[Panel]:
    """Accuracy by query: at each decode budget with the whole context, and of all compressed contexts together.

    The last panel has the time to the first token. It is much the same for all methods, so that the first one is shown.
    """
    made = []
    for group in report.grouped(lines, "source"):
        whole = [line for line in group if line["prompt_share"] == 1]
        for budget in report.by_budget(whole) if whole else []:
            curves = {line["method"]: line["by_turn"] for line in budget}
            title = f"whole context, decode budget {share_text(budget[-1]['decode_budget'])}"
            made.append(Panel(title, "query", PERCENT, curves))
        cut = [line for line in group if line["prompt_share"] != 1]
        if cut:
            curves = {f"{line['method']} {share_text(line['prompt_share'])}": line["by_turn"] for line in cut}
            made.append(Panel("compressed context", "query", PERCENT, curves))
        times = [(query, 1e3 * seconds) for query, seconds in group[0]["start_by_turn"]]
        made.append(Panel("time to the first token", "query", "ms", {group[0]["method"]: times}))
    return made


if __name__ == "__main__":
    sys.exit(main())
