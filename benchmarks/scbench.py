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
from itertools import pairwise
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints" / "mini"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from huggingface_hub import hf_hub_download
from problems import RESULT, make_problem
from tqdm import tqdm

from benchmarks import common, report
from benchmarks.common import Job, Sizes, check_fields, list_of, positive
from benchmarks.plots import Panel, position_panel
from benchmarks.report import Scored, accuracy, figure, percent_at, share_text
from cache import Cache
from cli.program import note, run_program
from generate import Conversation, Options, Result, load, size_of
from hf.tokenizer import Tokenizer, without_stop
from scope import require_known

METHODS = ["full", "slide", "discontinuous", "h2o", "h2o:score=current", "streaming"]
METHODS += ["full:compress=h2o", "full:compress=snapkv", "full:compress=streaming"]
HIGHLIGHTED = ["full", "discontinuous", "slide", "h2o", "streaming"]
MARGIN = 4  # tokens that an answer of the mini model may have beyond the longest solution
HUB = "microsoft/SCBench"


def main(argv: list[str] | None = None) -> int:
    return run_program("scbench.py", lambda: benchmark(parse_arguments(argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    lines = [line_of(rows) for rows in report.grouped(run(arguments), *report.LABELS)]
    common.publish(arguments, lines, COLUMNS, panels, HIGHLIGHTED, LEGEND)


# ---- the command line -------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser("scbench.py", __doc__)
    source = common.add_source_flags(parser, "context and multi_turns")
    source.add_argument("--hub", metavar="TASK", help=f"data/TASK.jsonl of {HUB}: {', '.join(TASKS)}")
    queries = parser.add_argument_group("queries")
    common.add_problem_flags(queries, "contexts")
    queries.add_argument("--mode", choices=["multi-request", "multi-turn"], default="multi-request", help="what "
                         "follows the context: requests that do not know of each other (and have no cross-references), "
                         "or turns of a conversation")  # fmt: skip
    own = "multi-turn: a later turn sees what the model has answered (default: the reference answers)"
    queries.add_argument("--own-answers", action="store_true", help=own)
    queries.add_argument("--task", help="data: what the rows are (default: the file's name)")
    longest = "of an answer (default: mini: the longest solution + a margin; data: as the task has it)"
    queries.add_argument("--max-new-tokens", type=positive, help=longest)
    shares = "of the methods that name a compressor: the share of the context that it keeps"
    common.add_method_flags(parser.add_argument_group("methods"), METHODS, [0.5], [0.8, 0.6], shares)
    common.add_run_flags(parser.add_argument_group("running"))
    common.add_result_flags(parser.add_argument_group("results"))
    arguments = common.parse_data_flags(parser, argv)
    arguments.task = arguments.task or arguments.name or "mini"
    require_known("task", arguments.task, SCORERS if arguments.mini else TASKS)
    if arguments.mode == "multi-request":
        arguments.reference_rate = 0.0
        if arguments.own_answers:
            parser.error("--own-answers goes with --mode multi-turn: a request sees no other one's answer")
    return arguments


# ---- tasks: what is said around a context and a query, and how an answer is scored, 0 to 1 -------------------

NUMBER = r"-?\d+(?:\.\d+)?"


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
    """Math find: the first number that is said. The published script knows no minus."""
    found = re.search(NUMBER, pred)
    return float(found is not None and float(found[0]) == float(answers[0]))


def letter(pred: str, answers: list[str]) -> float:
    """Multiple choice: the letter after "answer is", else the first that stands alone."""
    found = re.search(r"(?:answer|option) is\W*([A-D])\b", pred) or re.search(r"\b([A-D])\b", pred)
    return float(found is not None and found[1] == answers[0])


def word_f1(pred: str, answers: list[str]) -> float:
    """English questions: the F1 of words, of the best answer, without articles, as in SQuAD (arXiv 1606.05250). The
    published script looks for the answer anywhere in the text, so that a long text is more often right."""
    given, *wanted = (words_of(text) for text in (pred, *answers))
    return max(2 * (given & each).total() / max(given.total() + each.total(), 1) for each in wanted)


def words_of(text: str) -> Counter:
    return Counter(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))


def solution(pred: str, answers: list[str]) -> float:
    """Mini: the number of "The answer is N" in the first line."""
    found = RESULT.match("Answer_0:" + pred)
    return float(found is not None and found[2] == answers[0])


@dataclass(frozen=True)
class Task:
    score: Callable[[str, list[str]], float]
    max_new_tokens: int
    start: str = ""  # before the context
    query: str = "{input}"
    form: str = ".+"  # of an answer


# Texts and lengths as the benchmark has them. Not here: summaries and code, which need ROUGE and RepoQA's parser, and
# Chinese questions.
VALUE = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
BOOK = "Read the book and answer the question."
QUESTION = "Question: {input}\nAnswer:"
CHOICE = "Question: {input}\n{options}\n\nThe letter of the correct answer is"
TASKS = {
    "scbench_kv": Task(contains, 150, VALUE),
    "scbench_prefix_suffix": Task(contains, 150),
    "scbench_vt": Task(share_named, 30),
    "scbench_qa_eng": Task(word_f1, 40, f"{BOOK} Be very concise in your answer.\n\n", QUESTION),
    "scbench_choice_eng": Task(letter, 40, f"{BOOK}\n\n", CHOICE, "[A-D]"),
    "scbench_many_shot": Task(names_one, 10),
    "scbench_mf": Task(first_number, 5, query="{what}{input}", form=NUMBER),
}
SCORERS = {name: task.score for name, task in TASKS.items()} | {"mini": solution}


# ---- examples: a context, its queries, and what the answers are compared with --------------------------------


@dataclass(frozen=True)
class Example:
    """Queries in the order in which they are asked; answers has for each the texts that are right."""

    context: str
    queries: list[str]
    answers: list[list[str]]
    references: list[str]  # what later turns see as the answer
    seed: int = 0


def examples_of(arguments: argparse.Namespace) -> list[Example]:
    if arguments.mini:
        return [mini_example(arguments, seed, i) for seed in arguments.seeds for i in range(arguments.contexts)]
    path = arguments.data or hf_hub_download(HUB, f"data/{arguments.hub}.jsonl", repo_type="dataset")
    return common.read_some_rows(path, partial(data_example, TASKS[arguments.task]), arguments.limit)


def mini_example(arguments: argparse.Namespace, seed: int, i: int) -> Example:
    """Every question of a problem, each asked for alone, by the beginning of its answer."""
    problem = make_problem(f"scbench {seed} {i}", arguments.k, arguments.reference_rate)
    order = random_order(arguments.k, references_of(problem.prompt), Random(f"order {seed} {i}"))
    solutions = [line.partition(":")[2] for line in problem.answer.splitlines()]
    return Example(
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


def data_example(task: Task, row: dict) -> Example:
    """A published row -> an Example; ValueError says what is wrong with it."""
    context, turns = row.get("context"), row.get("multi_turns")
    if not context or not isinstance(turns, list) or not turns:
        raise ValueError("no `context`, or no list in `multi_turns`")
    check_fields(row, {"context": common.WHOLE_TEXT | list_of(common.NUMBER)})  # math find has a list of numbers
    answers = [checked_answers(task, f"turn {number}", turn) for number, turn in enumerate(turns, 1)]
    return Example(
        context=f"{task.start}{context}",
        queries=[query_text(task, turn) for turn in turns],
        answers=answers,
        references=[", ".join(each) if task.score is share_named else each[0] for each in answers],
    )


def checked_answers(task: Task, name: str, turn) -> list[str]:
    """All that is right, of an option its letter; ValueError says what is wrong with a turn."""
    if not isinstance(turn, dict) or not isinstance(turn.get("input"), str):
        raise ValueError(f"{name} has no text in `input`")
    given, options = turn.get("answer"), options_of(turn)
    given = given if isinstance(given, list) else [given]
    answers = ["ABCD"[options.index(x)] if x in options else str(x) for x in given if type(x) in (str, int, float)]
    if not answers or not re.fullmatch(task.form, answers[0], re.DOTALL):
        raise ValueError(f"{name} has no `answer` of the kind that {task.score.__name__} scores")
    if not all(map(common.is_whole, [query_text(task, turn), *answers])):
        raise ValueError(f"{name} has half a character in it (a lone surrogate)")
    return answers


def options_of(turn: dict) -> list:
    options = turn.get("options")
    return options[:4] if isinstance(options, list) else []


def query_text(task: Task, turn: dict) -> str:
    options = "\n".join(f"{name}. {text}" for name, text in zip("ABCD", options_of(turn), strict=False))
    what = re.search(r"The (.{1,200}) is", turn["input"])  # without a bound, a long text takes quadratic time
    what = f"What is the {what[1].lower()}?\n\n" if what else ""
    return task.query.format(input=turn["input"], options=options, what=what)


# ---- dialogues: the tokens that are read ------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialogue:
    """An example as token ids: the context, and what is read before each answer."""

    mode: str
    own_answers: bool
    context: list[int]
    reads: list[list[int]]

    def room(self, max_new_tokens: int) -> int:
        """The most tokens that ever follow the context at a time, without the answer that is being written."""
        lengths = list(map(len, self.reads))
        if self.mode == "multi-request":
            return max(lengths)
        return sum(lengths) + self.own_answers * len(lengths) * max_new_tokens


def make_dialogue(arguments: argparse.Namespace, tokenizer: Tokenizer, example: Example) -> Dialogue:
    chat = not arguments.mini and not arguments.no_chat and tokenizer.template is not None
    gap = "" if arguments.mini else "\n\n"
    start, end, following = chat_frame(tokenizer) if chat else ("", "", gap or "\n")
    context = tokenizer.encode(start + example.context, bos=not chat)  # a template writes its own bos
    texts = [f"{gap}{query}{end}" for query in example.queries]
    if arguments.mode == "multi-turn":
        answered = [""] * len(texts) if arguments.own_answers else example.references
        pairs = zip(answered, example.queries[1:], strict=False)
        texts[1:] = [f"{answer}{following}{query}{end}" for answer, query in pairs]
    return Dialogue(arguments.mode, arguments.own_answers, context, list(map(tokenizer.encode_after, texts)))


def chat_frame(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """What a chat template puts before a user's words, between them and the answer, and before the next words."""
    cut = "[CUT]"
    parts = tokenizer.render([{"role": role, "content": cut} for role in ("user", "assistant", "user")]).split(cut)
    if len(parts) != 4:
        raise ValueError("the chat template drops what was said before: run with --no-chat")
    start, _, following, end = parts
    return start, end, following


# ---- running ----------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> list[dict]:
    """All predictions of all methods, from disk or generated now."""
    examples = examples_of(arguments)
    model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.dtype)
    tokenizer = stops_at_newline(tokenizer) if arguments.mini else tokenizer
    settings, longest = settings_of(arguments, tokenizer, examples)
    pairs = [(example, make_dialogue(arguments, tokenizer, example)) for example in examples]
    pairs = fitting(pairs, model.config.context_limit()[0], settings["max_new_tokens"])
    dialogues = [dialogue for _, dialogue in pairs]
    jobs = jobs_of(arguments, settings, Sizes(statistics.mean(len(each.context) for each in dialogues), longest))
    what = f"k={arguments.k} reference-rate={arguments.reference_rate}" if arguments.mini else arguments.task
    mode = arguments.mode + (" own-answers" if arguments.own_answers else "")
    about = {"task": arguments.task, "source": common.source_of(arguments, what, mode)}
    asked = [about | {"answers": example.answers, "seed": example.seed} for example, _ in pairs]
    inputs, work = list(map(asdict, dialogues)), partial(predict, model, tokenizer, dialogues)
    return common.run_jobs(model, inputs, asked, jobs, arguments, work, check_made, "conversations")


def check_made(row: dict) -> None:
    """What a run has made of a conversation."""
    count = len(row["answers"])
    kinds = {"preds": list_of(common.TEXT, count), "start_s": list_of(common.AMOUNT, count), "stats": common.STATS}
    check_fields(row, kinds | {"prefill_s": common.POSITIVE, "restart": common.AMOUNT | common.NOTHING})


def stops_at_newline(tokenizer: Tokenizer) -> Tokenizer:
    """The mini model would go on with the next question's answer."""
    return replace(tokenizer, stop_ids=[*tokenizer.stop_ids, tokenizer.encode("\n", bos=False)[-1]])


def settings_of(arguments: argparse.Namespace, tokenizer, examples: list[Example]) -> tuple[dict, int]:
    """The settings that no method chooses, and the tokens of an answer that the decode budgets are shares of."""
    if arguments.mini:
        lines = {reference + "\n" for example in examples for reference in example.references}
        longest = max(len(tokenizer.encode(line, bos=False)) for line in lines)
        return common.run_settings(arguments, max_new_tokens=longest + MARGIN, compile=False), longest
    settings = common.run_settings(arguments, max_new_tokens=TASKS[arguments.task].max_new_tokens, compile=True)
    return settings, settings["max_new_tokens"]


def fitting(pairs: list[tuple[Example, Dialogue]], limit: int, T: int) -> list[tuple[Example, Dialogue]]:
    """Without the contexts that are too long for the model, all that follows them included; they are named."""
    chosen = []
    for number, (example, dialogue) in enumerate(pairs, 1):
        total = len(dialogue.context) + dialogue.room(T) + T
        if total <= limit:
            chosen.append((example, dialogue))
        else:
            note(f"context {number}: skipped: it needs {total} positions, the model has {limit}")
    if not chosen:
        raise ValueError(f"no context fits the model's {limit} positions: give a --checkpoint that reads longer texts")
    return chosen


def jobs_of(arguments: argparse.Namespace, settings: dict, sizes: Sizes) -> list[Job]:
    """Methods that name a compressor run at every prompt share, the others with the whole context."""
    shared = common.parse_settings(arguments.set)
    compressing = [m for m in arguments.methods if "compress" in shared | common.parse_method(m)]
    others = [m for m in arguments.methods if m not in compressing]
    jobs = common.make_jobs(arguments, others, [1.0], settings, sizes)
    return jobs + common.make_jobs(arguments, compressing, arguments.prompt_share, settings, sizes)


def predict(model, tokenizer, dialogues: list[Dialogue], missing: list[int], job: Job, bar: tqdm) -> Iterator:
    """(index, prediction) of each missing dialogue."""
    slots = max_context(model, dialogues, Options(**job.settings))
    for i in missing:
        conversation = Conversation(model, tokenizer, dialogues[i].context, **{"max_context": slots} | job.settings)
        prefill_s, results, starts = conversation.engine.prefill_s, [], []
        for result, start_s in converse(conversation, dialogues[i]):
            results.append(result)
            starts.append(start_s)
            bar.update(1 / len(dialogues[i].reads))
        stats = [asdict(result.stats) for result in results]
        most = {"live_peak": max(each["live_peak"] for each in stats)}
        mean = {"tokens_per_s": statistics.mean(each["tokens_per_s"] for each in stats)}
        made = {"preds": [result.text for result in results], "prefill_s": prefill_s, "start_s": starts}
        yield i, made | {"restart": restart_of(conversation), "stats": stats[0] | most | mean}


def max_context(model, dialogues: list[Dialogue], options: Options) -> int:
    """Slots for the largest of the dialogues: the graphs that were compiled for one serve them all."""
    size = size_of([dialogue.context for dialogue in dialogues], replace(options, batch_size=1))
    with torch.device("meta"):  # sizes only
        slots = max(Cache(model.config, *options.rules(), size, torch.float32).slots[0])
    room = max(dialogue.room(options.max_new_tokens) for dialogue in dialogues)
    return min(slots + room, model.config.context_limit()[0])


def converse(conversation: Conversation, dialogue: Dialogue) -> Iterator[tuple[Result, float]]:
    """Ask all queries. Yields each answer, and the seconds from the query to its first token, rewinding included."""
    back, stop = conversation.mark(), None
    for number, ids in enumerate(dialogue.reads):
        started = now(conversation)
        if dialogue.own_answers:
            ids = without_stop(conversation.tokenizer, ids, stop)
        elif number:
            conversation.rewind(back)
        conversation.read(ids)
        start_s = now(conversation) - started
        if dialogue.mode == "multi-turn":
            back = conversation.mark()  # before the answer: the next `ids` begin with the reference answer
        result = conversation.answer()
        stop = result.token_ids[-1] if result.finish_reason == "stop" else None
        yield result, start_s


def restart_of(conversation: Conversation) -> float | None:
    """Rewinding to the context and the first decode step after it, over the median of the other steps."""
    times = [now(conversation)]
    conversation.rewind(conversation.snapshots[0])
    conversation.answer(on_step=lambda cache: times.append(now(conversation)))
    first, *others = [end - start for start, end in pairwise(times)] or [0.0]
    return first / statistics.median(others) if others else None


def now(conversation: Conversation) -> float:
    """Seconds, after the device has done all its work."""
    conversation.engine.wait()
    return time.perf_counter()


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
        "eighths": report.accuracy_by_part(scored, 8),
        **times(rows),
        **report.costs(rows),
    }


def scored_of(row: dict) -> Scored:
    score, pairs = SCORERS[row["task"]], zip(row["preds"], row["answers"], strict=True)
    return Scored(row["seed"], [score(pred, answers) for pred, answers in pairs])


def times(rows: list[dict]) -> dict:
    """Medians: seconds to the first token of the first query, of later ones, and of each turn."""
    starts = [[row["prefill_s"] + row["start_s"][0], *row["start_s"][1:]] for row in rows]  # the first one waits
    turns = [[row[i] for row in starts if i < len(row)] for i in range(max(map(len, starts)))]
    by_turn = [(number, statistics.median(seconds)) for number, seconds in enumerate(turns, 1)]
    prefill_s, first_s = statistics.median(row["prefill_s"] for row in rows), by_turn[0][1]
    known = {"prefill_s": prefill_s, "first_start_s": first_s, "start_by_turn": by_turn}
    if later := [seconds for turn in turns[1:] for seconds in turn]:
        later_s = statistics.median(later)
        known |= {"later_start_s": later_s, "saved_prefills": (first_s - later_s) / prefill_s}
    if restarts := [row["restart"] for row in rows if row.get("restart") is not None]:
        known["restart"] = statistics.median(restarts)
    return known


COLUMNS: report.Columns = {
    **report.LABEL_COLUMNS,
    "contexts": lambda line: str(line["contexts"]),
    "accuracy": report.percent("accuracy"),
    "first": percent_at("first", 0),
    "last": percent_at("last", 0),
    **report.COST_COLUMNS,
    "prefill ms": figure("prefill_s", ".1f", 1e-3),
    "first start": figure("first_start_s", ".1f", 1e-3),
    "later": figure("later_start_s", ".1f", 1e-3),
    "saved": figure("saved_prefills", ".2f"),
    "restart": figure("restart", ".2f"),
}
LEGEND = """
first, last: query of each context. first start, later: ms to the first token of the first query, prefill included, and
of a later one, medians; saved: the difference, as a share of the prefill. restart: rewinding and the first decode step
after it, over the median decode step."""


def panels(lines: list[dict]) -> list[Panel]:
    """Accuracy by query: at each decode budget with the whole context, and of all compressed contexts together."""
    made = []
    for group in report.grouped(lines, "source"):
        whole = [line for line in group if line["prompt_share"] == 1]
        for budget in report.by_budget(whole) if whole else []:
            title = f"whole context, decode budget {share_text(budget[-1]['decode_budget'])}"
            made.append(position_panel(title, "queries", budget))
        cut = [line for line in group if line["prompt_share"] != 1]
        if cut:
            named = [line | {"method": name_of_cut(line)} for line in cut]
            made.append(position_panel("compressed context", "queries", named))
    return made


def name_of_cut(line: dict) -> str:
    """full:compress=h2o at 80 % -> "h2o keeps 80%"; other methods keep their name before it."""
    return f"{line['method'].removeprefix('full:compress=')} keeps {share_text(line['prompt_share'])}"


if __name__ == "__main__":
    sys.exit(main())
