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

from benchmarks import common
from benchmarks.common import Job, Panel, Progress, Sizes, require
from cache import Cache, Shape
from generate import (
    Conversation,
    Moment,
    Options,
    Parser,
    Result,
    Tokenizer,
    limit_of,
    load,
    note,
    one_line,
    without_stop,
)

METHODS = ["full", "slide", "discontinuous", "h2o", "h2o:score=current", "streaming"]
METHODS += ["full:compress=h2o", "full:compress=snapkv", "full:compress=streaming"]
MARGIN = 4  # tokens that an answer of the mini model may have beyond the longest solution
HUB = "microsoft/SCBench"


def main(argv: list[str] | None = None) -> int:
    return common.guarded("scbench.py", lambda: benchmark(parse_arguments(argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    predictions = run(arguments)
    lines = [line_of(rows) for rows in common.grouped(predictions, *common.LABELS)]
    print(common.report(lines, COLUMNS, LEGEND))
    common.write_json(arguments.json, {"arguments": vars(arguments), "lines": lines})
    if arguments.plot:
        common.plot(arguments.plot, panels(lines))


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    first, *_ = __doc__.split("\n")
    parser = Parser("scbench.py", description=first, formatter_class=common.Help)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--mini", action="store_true", help="make problems of the bundled model's kind")
    source.add_argument("--data", metavar="FILE.jsonl", help="rows with context and multi_turns, as published")
    source.add_argument("--hub", metavar="TASK", help=f"data/TASK.jsonl of {HUB}: {', '.join(TASKS)}")
    add_problem_flags(parser.add_argument_group("queries"))
    shares = "of the methods that name a compressor: the share of the context that it keeps"
    group = parser.add_argument_group("methods")
    common.add_method_flags(group, METHODS, budgets=[0.5], shares=[0.8, 0.6], share_help=shares)
    common.add_run_flags(parser.add_argument_group("running"), batches=False)
    common.add_result_flags(parser.add_argument_group("results"))
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    return arguments


def add_problem_flags(group) -> None:
    group.add_argument("--mode", choices=["multi-request", "multi-turn"], default="multi-request", help="what follows "
                       "the context: requests that do not know of each other, or turns of a conversation")  # fmt: skip
    own = "multi-turn: a later turn sees what the model has answered (default: the reference answers)"
    group.add_argument("--own-answers", action="store_true", help=own)
    group.add_argument("--k", type=int, default=16, help="mini: questions per context, all of them asked")
    group.add_argument("--contexts", type=int, default=24, help="mini: contexts per seed")
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="mini: seeds of the contexts")
    rate = "mini: share of cross-references (default: multi-request: none; multi-turn: 0.4)"
    group.add_argument("--reference-rate", type=float, help=rate)
    group.add_argument("--task", help="data: what the rows are (default: the file's name)")
    group.add_argument("--limit", type=int, help="data: only the first rows")
    group.add_argument("--no-chat", action="store_true", help="data: plain prompts, no chat template")
    longest = "of an answer (default: mini: the longest solution + a margin; data: as the task has it)"
    group.add_argument("--max-new-tokens", type=int, help=longest)


def check_arguments(arguments: argparse.Namespace) -> None:
    check_references(arguments)
    for name in ("k", "contexts", "limit"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, name, value, "1 or more")
    require(len(set(arguments.seeds)) == len(arguments.seeds), "seeds", arguments.seeds, "all different")
    if not arguments.mini:
        name = Path(arguments.data or arguments.hub).stem
        arguments.task = arguments.task or name
        arguments.predictions = arguments.predictions or f"{name}.predictions.jsonl"
        check_task(arguments.task)
    for method in arguments.methods:
        common.parse_method(method)  # refuses what there is not
    common.check_flags(arguments)


def check_references(arguments: argparse.Namespace) -> None:
    """Only turns can refer to each other."""
    turns = arguments.mode == "multi-turn"
    if arguments.own_answers and not turns:
        raise ValueError("--own-answers goes with --mode multi-turn: a request sees no other one's answer")
    if arguments.reference_rate is None:
        arguments.reference_rate = 0.4 if turns else 0.0
    wanted = "0 to 1" if turns else "0: a request cannot refer to another one's answer, --mode multi-turn can"
    require(0 <= arguments.reference_rate <= turns, "reference_rate", arguments.reference_rate, wanted)


def check_task(name: str) -> None:
    if name not in TASKS:
        raise ValueError(f"task {name} has no scorer here: --task must be one of {', '.join(TASKS)}")


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
    """English questions: harmonic mean of precision and recall over words, of the best answer. The published script
    looks for the answer anywhere in the text, so that a long text is more often right."""
    return max(f1(words(pred), words(answer)) for answer in answers)


def character_f1(pred: str, answers: list[str]) -> float:
    """Chinese questions: the same over characters."""
    return max(f1(characters(pred), characters(answer)) for answer in answers)


def f1(given: Counter, wanted: Counter) -> float:
    return 2 * (given & wanted).total() / max(given.total() + wanted.total(), 1)


def words(text: str) -> Counter:
    """Without articles and punctuation, as SQuAD counts them (arXiv 1606.05250)."""
    return Counter(x for x in re.findall(r"\w+", text.lower()) if x not in ("a", "an", "the"))


def characters(text: str) -> Counter:
    return Counter(x for x in text.lower() if x.isalnum())


def solution(pred: str, answers: list[str]) -> float:
    """Mini: the number of "The answer is N" in the first line."""
    found = RESULT.match("Answer_0:" + pred)
    return float(found is not None and found[2] == answers[0])


NUMBER = r"-?\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Task:
    score: Callable[[str, list[str]], float]
    max_new_tokens: int = 0
    start: str = ""  # before the context
    query: str = "{input}"


# Texts and lengths as the benchmark has them. Not here: summaries and code, which need ROUGE and RepoQA's parser.
TASKS = {
    "scbench_kv": Task(
        contains, 150, "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    ),
    "scbench_prefix_suffix": Task(contains, 150),
    "scbench_vt": Task(share_named, 30),
    "scbench_qa_eng": Task(
        word_f1,
        40,
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "Question: {input}\nAnswer:",
    ),
    "scbench_qa_chn": Task(character_f1, 40, "阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案："),
    "scbench_choice_eng": Task(
        letter,
        40,
        "Read the book and answer the question.\n\n",
        "Question: {input}\n{options}\n\nThe letter of the correct answer is",
    ),
    "scbench_many_shot": Task(names_one, 10),
    "scbench_mf": Task(first_number, 5, query="{what}{input}"),
    "scbench_passkey": Task(
        first_number,
        15,
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n",
    ),
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


def mini_examples(arguments: argparse.Namespace) -> list[Example]:
    return [mini_example(arguments, seed, i) for seed in arguments.seeds for i in range(arguments.contexts)]


def mini_example(arguments: argparse.Namespace, seed: int, i: int) -> Example:
    """Every question of a problem, each asked for alone, by the beginning of its answer."""
    problem = make_problem(f"scbench {seed} {i}", arguments.k, arguments.reference_rate)
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


def data_examples(arguments: argparse.Namespace) -> list[Example]:
    path = Path(arguments.data or download(arguments.hub))
    examples = common.read_rows(path, partial(data_example, arguments.task))[: arguments.limit]
    if not examples:
        raise ValueError(f"{path} has no usable row")
    return examples


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
    for i, turn in enumerate(turns):
        check_turn(task, f"turn {i + 1}", turn)
    answers = [answers_of(turn) for turn in turns]
    return Example(
        task=name,
        context=f"{task.start}{context}",  # math find has a list of numbers
        queries=[query_text(task, turn) for turn in turns],
        answers=answers,
        references=[", ".join(each) if task.score is share_named else each[0] for each in answers],
    )


def check_turn(task: Task, name: str, turn) -> None:
    if not isinstance(turn, dict) or not isinstance(turn.get("input"), str):
        raise ValueError(f"{name} has no text in `input`")
    if not isinstance(turn.get("options"), list | None):
        raise ValueError(f"{name} has no list in `options`")
    answers = answers_of(turn)
    if not answers or not all(answers):
        raise ValueError(f"{name} has neither a text nor a number in `answer`")
    if task.score is first_number and not re.fullmatch(NUMBER, answers[0]):
        raise ValueError(f"{name} has {answers[0][:40]!r} for an answer: a number is expected")
    if task.score is letter and (len(turn.get("options") or []) != 4 or answers[0] not in list("ABCD")):
        raise ValueError(f"{name} is no choice of four `options`, one of which is the answer")


def answers_of(turn: dict) -> list[str]:
    """All that is right; of an option its letter."""
    given = turn.get("answer")
    given = given if isinstance(given, list) else [given]
    options = list(turn.get("options") or [])
    letters = ["ABCD"[options.index(x)] if x in options[:4] else x for x in given]
    return [str(x) if isinstance(x, str | int | float) else "" for x in letters]


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


def run(arguments: argparse.Namespace) -> list[dict]:
    """All predictions of all methods, from disk or generated now."""
    examples = mini_examples(arguments) if arguments.mini else data_examples(arguments)
    model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.dtype)
    if arguments.mini:
        tokenizer = stops_at_newline(tokenizer)
    longest = longest_answer(arguments, tokenizer, examples)
    settings = run_settings(arguments, longest)
    pairs = [(example, make_dialogue(arguments, tokenizer, example)) for example in examples]
    pairs = fitting(pairs, limit_of(model.config)[0], settings["max_new_tokens"])
    dialogues = [dialogue for _, dialogue in pairs]
    sizes = Sizes(statistics.mean(len(each.context) for each in dialogues), longest)
    jobs = make_jobs(arguments, settings, sizes)
    asked = [example.asked() | {"source": source_of(arguments)} for example, _ in pairs]
    work = partial(predict, model, tokenizer, dialogues)
    predictions = common.Predictions(arguments.predictions)
    return common.complete(model, list(map(asdict, dialogues)), asked, jobs, predictions, work, "conversations")


def stops_at_newline(tokenizer: Tokenizer) -> Tokenizer:
    """The mini model would go on with the next question's answer."""
    return replace(tokenizer, stop_ids=[*tokenizer.stop_ids, tokenizer.encode("\n", bos=False)[-1]])


def longest_answer(arguments: argparse.Namespace, tokenizer: Tokenizer, examples: list[Example]) -> int:
    """Tokens that an answer may take: what the decode budgets are shares of."""
    if not arguments.mini:
        return arguments.max_new_tokens or TASKS[arguments.task].max_new_tokens
    lines = {reference + "\n" for example in examples for reference in example.references}
    return max(len(tokenizer.encode(line, bos=False)) for line in lines)


def run_settings(arguments: argparse.Namespace, longest: int) -> dict:
    """The settings that no method chooses."""
    settings = {"max_new_tokens": longest + MARGIN * arguments.mini, "compile": not arguments.mini}
    given = {name: getattr(arguments, name) for name in settings}
    return settings | {name: value for name, value in given.items() if value is not None}


def fitting(pairs: list[tuple[Example, Dialogue]], limit: int, T: int) -> list[tuple[Example, Dialogue]]:
    """Without the contexts that are too long for the model, all that follows them included; they are named."""
    totals = [len(dialogue.context) + dialogue.room(T) + T for _, dialogue in pairs]
    for number, total in enumerate(totals, 1):
        if total > limit:
            note(f"context {number}: skipped: it needs {total} positions, the model has {limit}")
    if min(totals) > limit:
        raise ValueError(f"no context fits the model's {limit} positions: give a --checkpoint that reads longer texts")
    return [pair for pair, total in zip(pairs, totals, strict=True) if total <= limit]


def make_jobs(arguments: argparse.Namespace, settings: dict, sizes: Sizes) -> list[Job]:
    """Methods that name a compressor run at every prompt share, the others with the whole context."""
    shared, methods = common.parse_settings(arguments.set), {True: [], False: []}
    for text in arguments.methods:
        methods["compress" in shared | common.parse_method(text).settings].append(text)
    shares = {False: [1.0], True: arguments.prompt_share}
    chosen = [vars(arguments) | {"methods": methods[x], "prompt_share": shares[x]} for x in (False, True)]
    return [job for each in chosen for job in common.make_jobs(argparse.Namespace(**each), settings, sizes)]


def source_of(arguments: argparse.Namespace) -> str:
    """Keeps the runs apart that share a predictions file."""
    what = f"k={arguments.k} reference-rate={arguments.reference_rate}" if arguments.mini else arguments.task
    mode = arguments.mode + " own-answers" * arguments.own_answers
    return f"{arguments.checkpoint} {what} {mode} {arguments.set}".rstrip()


def predict(model, tokenizer, dialogues: list[Dialogue], missing: list[int], job: Job, bar: Progress) -> Iterator:
    """(index, prediction) of each missing dialogue."""
    before, name, slots = bar.done, job.labels["method"], max_context(model, dialogues, job)
    for number, i in enumerate(missing):
        context, reads = dialogues[i].context, dialogues[i].reads
        settings = {"max_context": slots} | job.settings
        conversation = Conversation(model, tokenizer, context, **settings)
        prefill_s, turns = conversation.engine.prefill_s, []
        for turn in converse(conversation, dialogues[i]):
            turns.append(turn)
            bar.show(before + number + len(turns) / len(reads), name)
        restart = restart_of(conversation, conversation.moments[0])
        yield i, prediction_of(prefill_s, turns) | {"restart": restart}


def max_context(model, dialogues: list[Dialogue], job: Job) -> int:
    """Slots for the largest of the dialogues: the graphs that were compiled for one serve them all."""
    options = Options(**job.settings)
    with torch.device("meta"):  # sizes only
        lengths = [len(dialogue.context) for dialogue in dialogues]
        cache = Cache(model.config, *options.rules(), Shape(1, lengths, options.max_new_tokens), torch.float32)
    room = max(dialogue.room(options.max_new_tokens) for dialogue in dialogues)
    return min(max(cache.slots[0]) + room, limit_of(model.config)[0])


@dataclass(frozen=True)
class Turn:
    """One query and its answer, with what they took."""

    asked: Moment  # before the answer
    result: Result
    start_s: float  # from the query to the first token, rewinding included


def converse(conversation: Conversation, dialogue: Dialogue) -> Iterator[Turn]:
    """Ask all queries, as requests or as turns."""
    shared, turn = conversation.mark(), None
    for ids in dialogue.reads:
        if dialogue.own_answers and turn:
            ids = without_stop(conversation.tokenizer, ids, turn.result)
        turn = ask(conversation, back_to(dialogue, shared, turn), ids)
        yield turn


def back_to(dialogue: Dialogue, shared: Moment, before: Turn | None) -> Moment | None:
    """The moment that the next query follows; None: now."""
    if before is None or dialogue.own_answers:
        return None
    return shared if dialogue.requests else before.asked


def ask(conversation: Conversation, back: Moment | None, ids: list[int]) -> Turn:
    clock = Clock(conversation)
    if back:
        conversation.rewind(back)
    conversation.read(ids)
    start_s = clock.lap()
    return Turn(asked=conversation.mark(), result=conversation.answer(), start_s=start_s)


def restart_of(conversation: Conversation, context: Moment) -> float | None:
    """Rewinding and the first decode step after it, over the median decode step."""
    clock, steps = Clock(conversation), []
    conversation.rewind(context)
    rewind_s = clock.lap()
    conversation.answer(on_step=lambda cache: steps.append(clock.lap()))
    return (rewind_s + steps[0]) / statistics.median(steps) if steps else None


class Clock:
    """Seconds of one thing after the other, the device's part included."""

    def __init__(self, conversation: Conversation):
        self.wait, self.last = conversation.engine.wait, 0.0
        self.lap()

    def lap(self) -> float:
        self.wait()
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def prediction_of(prefill_s: float, turns: list[Turn]) -> dict:
    stats = [asdict(turn.result.stats) for turn in turns]
    stats[0] |= {
        "live_peak": max(each["live_peak"] for each in stats),
        "tokens_per_s": statistics.mean(each["tokens_per_s"] for each in stats),
    }
    return {
        "preds": [turn.result.text for turn in turns],
        "finish_reasons": [turn.result.finish_reason for turn in turns],
        "prefill_s": prefill_s,
        "start_s": [turn.start_s for turn in turns],
        "stats": stats[0],
    }


# ---- the report -------------------------------------------------------------------------------------------


def line_of(rows: list[dict]) -> dict:
    """All there is to say about one method at one budget."""
    return {
        **{name: rows[0].get(name) for name in common.LABELS},
        "contexts": len(rows),
        "accuracy": accuracy(rows),
        "first": accuracy(rows, lambda i, n: i == 0),
        "last": accuracy(rows, lambda i, n: i == n - 1),
        "quarters": [accuracy(rows, lambda i, n, part=part: i * 4 // n == part) for part in range(4)],
        "by_turn": by_turn(rows),
        **times(rows),
        **common.costs(rows),
    }


def accuracy(rows: list[dict], wanted=lambda i, n: True) -> tuple[float, float | None] | None:
    """Percent and spread over the wanted ones of a context's n queries."""
    scores = [[x for i, x in enumerate(scores_of(row)) if wanted(i, len(row["preds"]))] for row in rows]
    return common.mean_and_spread(
        [(row["seed"], i, each) for i, (row, each) in enumerate(zip(rows, scores, strict=True))]
    )


def scores_of(row: dict) -> list[float]:
    score = SCORERS[row["task"]]
    return [score(pred, answers) for pred, answers in zip(row["preds"], row["answers"], strict=True)]


def by_turn(rows: list[dict]) -> list[tuple[float, float]]:
    """(turn, percent right), at most 8 points: neighbouring turns together."""
    turns = max(len(row["preds"]) for row in rows)
    parts = min(turns, 8)
    points = []
    for part in range(parts):
        numbers = [i for i in range(turns) if i * parts // turns == part]
        mean, _ = accuracy(rows, lambda i, n, numbers=numbers: i in numbers)
        points.append((statistics.mean(numbers) + 1, mean))
    return points


def times(rows: list[dict]) -> dict:
    """Medians: seconds to the first token of the first query, of later ones, and of each turn."""
    starts = [starts_of(row) for row in rows]
    first, later = [seconds[0] for seconds in starts], [x for seconds in starts for x in seconds[1:]]
    restarts = [row["restart"] for row in rows if row["restart"] is not None]
    prefill_s, first_start_s = statistics.median(row["prefill_s"] for row in rows), statistics.median(first)
    known = {"prefill_s": prefill_s, "first_start_s": first_start_s, "start_by_turn": medians_by_turn(starts)}
    if later:
        saved_s = first_start_s - statistics.median(later)
        known |= {"later_start_s": statistics.median(later)}
        known |= {"saved": saved_s / first_start_s, "saved_prefills": saved_s / prefill_s}
    return known | ({"restart": statistics.median(restarts)} if restarts else {})


def starts_of(row: dict) -> list[float]:
    """Seconds to the first token of each query; the first one waits for the context's prefill."""
    first, *later = row["start_s"]
    return [row["prefill_s"] + first, *later]


def medians_by_turn(rows: list[list[float]]) -> list[tuple[int, float]]:
    turns = [[row[i] for row in rows if i < len(row)] for i in range(max(map(len, rows)))]
    return [(number, statistics.median(each)) for number, each in enumerate(turns, 1)]


COLUMNS: dict[str, Callable[[dict], str]] = {
    **common.LABEL_COLUMNS,
    "contexts": lambda line: str(line["contexts"]),
    "accuracy": lambda line: common.percent(line["accuracy"]),
    **{name: lambda line, name=name: common.percent(line[name] and line[name][0]) for name in ("first", "last")},
    **{f"Q{i + 1}": lambda line, i=i: common.percent(line["quarters"][i] and line["quarters"][i][0]) for i in range(4)},
    **common.COST_COLUMNS,
    "prefill ms": common.figure("prefill_s", ".1f", 1e-3),
    "first start": common.figure("first_start_s", ".1f", 1e-3),
    "later": common.figure("later_start_s", ".1f", 1e-3),
    "saved": common.figure("saved", ".0%"),
    "restart": common.figure("restart", ".2f"),
}
LEGEND = """
first, last: query of each context; Q1 to Q4: quarters of its queries. first start, later: ms to the first token of the
first query, prefill included, and of a later one, medians; saved: 1 - later / first start. restart: rewinding and the
first decode step after it, over the median decode step."""


def panels(lines: list[dict]) -> list[list[Panel]]:
    """Above accuracy by turn, below the time to the first token; a column for every prompt share and decode budget."""
    columns = []
    for group in common.grouped(lines, "source", "prompt_share"):
        budgets = [x for x in common.grouped(group, "decode_budget") if x[0]["decode_budget"] != 1]
        full = [line for line in group if line["decode_budget"] == 1]  # keeps all of the output: in every panel
        columns += [column(full + budget) for budget in budgets or [[]]]
    return [list(row) for row in zip(*columns, strict=True)]


def column(lines: list[dict]) -> tuple[Panel, Panel]:
    shares = [(name, lines[-1][f"{name}_{kind}"]) for name, kind in (("prompt", "share"), ("decode", "budget"))]
    title = ", ".join(f"{name} {common.share_text(share)}" for name, share in shares)
    right = {line["method"]: line["by_turn"] for line in lines}
    start = {line["method"]: line["start_by_turn"] for line in lines}
    return Panel(title, "turn", right), Panel("", "turn", start, y_label="seconds to the first token")


if __name__ == "__main__":
    sys.exit(main())
