"""What eviction costs a model: it reads a given text token by token, and its predictions are compared with full's.

python benchmarks/fidelity.py --checkpoint DIR --text FILE ...             prose
python benchmarks/fidelity.py --checkpoint DIR                             the model's own continuations instead
python benchmarks/fidelity.py --checkpoint DIR --text FILE ... --needles   facts in the text, asked for at its end

A prompt of M tokens is prefilled. The T tokens after it are given, not sampled (teacher forcing), so that all methods
read the same text. The engine is the one that generate.py runs; only its sampler is replaced: it returns the logits.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from math import exp, sqrt
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import common, report
from benchmarks.common import Job, Sizes, check_fields, list_of, positive
from benchmarks.plots import Panel
from benchmarks.report import figure
from cli.program import note, run_program
from generate import Engine, Options, generate, load, one_line, size_of
from model import Llama
from scope import FULL, require

METHODS = ["full", "slide", "slide:score=own", "slide:score=current", "adaptive", "discontinuous", "recent", "h2o",
           "streaming"]  # fmt: skip
HIGHLIGHTED = ["full", "slide", "slide:score=own", "recent", "h2o"]
PARTS = 4  # quarters of the output
MOST_NLL = 700  # above it, the perplexity is larger than a float


def main(argv: list[str] | None = None) -> int:
    return run_program("fidelity.py", lambda: benchmark(parse_arguments(argv)))


def benchmark(arguments: argparse.Namespace) -> None:
    lines = lines_of(run(arguments))
    common.publish(arguments, lines, COLUMNS | needle_columns(lines), panels, HIGHLIGHTED, LEGEND)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser("fidelity.py", __doc__)
    texts = parser.add_argument_group("what is read")
    texts.add_argument("--text", nargs="+", metavar="FILE", help="long texts (default: the model's own continuations)")
    texts.add_argument("--pieces", type=positive, default=2, help="pieces of prompt + output tokens per text, at most")
    texts.add_argument("--prompt-tokens", type=positive, default=512, help="M; own texts have their own prompts")
    texts.add_argument("--output-tokens", type=positive, default=1280, help="T")
    texts.add_argument("--seed", type=int, default=0, help="of own continuations and of the facts")
    texts.add_argument("--needles", action="store_true", help="plant facts, and ask for them at the end")
    distances = {"type": int, "nargs": "+", "default": [120, 350, 650], "metavar": "TOKENS"}
    texts.add_argument("--distances", **distances, help="from a fact in the output to the questions")
    common.add_method_flags(parser.add_argument_group("methods"), METHODS, budgets=[0.25])
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=positive, default=6, help="texts that are read together")
    common.add_run_flags(running)
    common.add_result_flags(parser.add_argument_group("results"))
    arguments = parser.parse_args(argv)
    common.check_flags(arguments)
    for distance in arguments.distances if arguments.needles else []:
        wanted = f"1 to {arguments.output_tokens - 100}, which leaves room for the questions"
        require(1 <= distance <= arguments.output_tokens - 100, "--distances", distance, wanted)
    return arguments


# ---- samples: a prompt, and the output that is fed after it -------------------------------------------------------


@dataclass(frozen=True)
class Needle:
    """A fact that the end of the output asks for. `code` are the output's tokens from `start` on that must be right."""

    distance: int  # from the fact to the questions, in tokens; 0: the fact is in the prompt
    start: int
    code: list[int]


@dataclass(frozen=True)
class Sample:
    prompt: list[int]
    output: list[int]
    needles: list[Needle] = field(default_factory=list)


def make_samples(arguments: argparse.Namespace, model: Llama, tokenizer) -> list[Sample]:
    M, T = arguments.prompt_tokens, arguments.output_tokens
    if arguments.text:
        samples = [piece for path in arguments.text for piece in pieces_of(path, tokenizer, M, T, arguments.pieces)]
    else:
        samples = own_continuations(arguments, model, tokenizer)
    if arguments.needles:
        samples = [
            with_needles(s, tokenizer, arguments.distances, f"{arguments.seed} {i}") for i, s in enumerate(samples)
        ]
    return samples


def pieces_of(path: str, tokenizer, M: int, T: int, most: int) -> list[Sample]:
    """Up to `most` pieces of M + T tokens of a text, one after the other."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is no text: {one_line(error)}") from None
    bos, ids = tokenizer.encode(""), tokenizer.encode(text, bos=False)
    size = M - len(bos) + T
    starts = range(0, len(ids) - size + 1, size)[:most]
    require(
        len(starts) > 0,
        f"--text {path}",
        f"{len(ids)} tokens long",
        f"at least {size} (--prompt-tokens + --output-tokens)",
    )
    return [Sample(bos + ids[i : i + M - len(bos)], ids[i + M - len(bos) : i + size]) for i in starts]


REQUESTS = [
    "Explain how a bicycle works, part by part, in a long text.",
    "Write a long story about a lighthouse keeper who finds a map.",
    "Describe the history of paper in detail.",
    "Write a long letter from a gardener to a friend about one year in the garden.",
    "Explain to a beginner how computers store numbers, with many examples.",
    "Plan a week of walking in the mountains, day by day, with everything that is needed.",
]


def own_continuations(arguments: argparse.Namespace, model: Llama, tokenizer) -> list[Sample]:
    """What the model says to REQUESTS with the full cache, sampled at temperature 1; it does not stop before T."""
    note(f"sampling {len(REQUESTS)} continuations of {arguments.output_tokens} tokens with the full cache ...")
    prompts = [chat_ids(tokenizer, request) for request in REQUESTS]
    settings = {"max_new_tokens": arguments.output_tokens, "temperature": 1.0, "seed": arguments.seed}
    results = generate(
        model, tokenizer, prompts, FULL.name, ignore_eos=True, compile=bool(arguments.compile), **settings
    )
    return [Sample(ids, result.token_ids) for ids, result in zip(prompts, results, strict=True)]


def chat_ids(tokenizer, request: str) -> list[int]:
    if tokenizer.template is None:
        return tokenizer.encode(request + "\n\n")
    return tokenizer.chat([{"role": "user", "content": request}])


COLOURS = ["red", "blue", "green", "white", "black", "yellow", "brown", "pink", "purple", "orange", "gray", "golden"]
FACT = "\nThe secret code of the {} door is"
IN_PROMPT = 2  # facts


def with_needles(sample: Sample, tokenizer, distances: list[int], seed: str) -> Sample:
    """The sample with facts in place of some of its text: two in the prompt, one at each distance in the output.

    The end of the output asks for all of them, in random order. Lengths stay: text is cut where facts come in.
    """
    rng = Random(seed)
    colours = rng.sample(COLOURS, IN_PROMPT + len(distances))
    facts = {colour: f" {rng.randint(1000, 9999)}." for colour in colours}
    ids = {colour: tokenizer.encode(FACT.format(colour) + code + "\n", bos=False) for colour, code in facts.items()}
    prompt = list(sample.prompt)
    for number, colour in enumerate(colours[:IN_PROMPT]):
        at = (number + 1) * len(prompt) // (IN_PROMPT + 1)
        prompt[at : at + len(ids[colour])] = ids[colour]
    questions = [question(tokenizer, colour, facts[colour]) for colour in rng.sample(colours, len(colours))]
    asked = sum(len(each.ids) for each in questions)
    text = list(sample.output[asked:])
    far = dict(zip(colours[IN_PROMPT:], distances, strict=True))
    apart = min(b - a for a, b in pairwise([0, *sorted(distances), len(text)]))
    longest = max(map(len, ids.values()))
    require(apart >= longest, "--distances", distances, f"{longest} tokens apart (a fact), and at most {len(text)}")
    for colour, distance in far.items():
        at = len(text) - distance
        text[at : at + len(ids[colour])] = ids[colour]
    needles = []
    for each in questions:
        needles.append(Needle(far.get(each.colour, 0), len(text) + each.start, each.code))
        text += each.ids
    return Sample(prompt, text, needles)


@dataclass(frozen=True)
class Question:
    colour: str
    ids: list[int]
    start: int  # of the code in ids
    code: list[int]


def question(tokenizer, colour: str, code: str) -> Question:
    asking, whole = (tokenizer.encode(FACT.format(colour) + end, bos=False) for end in ("", code))
    start = next(i for i, (a, b) in enumerate(zip([*asking, -1], whole, strict=False)) if a != b)
    return Question(colour, whole, start, whole[start : len(whole) - 1])  # the last token is the full stop


# ---- running -----------------------------------------------------------------------------------------------------


class ReturnLogits(nn.Module):
    """A sampler that chooses nothing: `Engine.prefill` and `Engine.decode` then return the logits."""

    def forward(self, logits: Tensor, noise: Tensor, stopped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits.argmax(-1), logits, stopped


def read_output(engine: Engine, samples: list[Sample]) -> Iterator[Tensor]:
    """Log-probabilities [B, vocab] of what comes next, before each of the T given tokens."""
    outputs = torch.tensor([sample.output for sample in samples], device=engine.device)
    first = engine.prefill([sample.prompt for sample in samples], list(range(len(samples))))
    engine.start_decode()
    yield first.log_softmax(-1)
    for t in range(1, outputs.shape[1]):
        engine.token = outputs[:, t - 1]
        yield engine.decode(t).log_softmax(-1)


def run(arguments: argparse.Namespace) -> list[dict]:
    model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.dtype)
    samples = make_samples(arguments, model, tokenizer)
    settings = {"max_new_tokens": arguments.output_tokens, "compile": bool(arguments.compile)}
    mean_prompt = statistics.mean(len(sample.prompt) for sample in samples)
    sizes = Sizes(mean_prompt, arguments.output_tokens)
    jobs = common.make_jobs(arguments, arguments.methods, arguments.prompt_share, settings, sizes)
    rows = []
    for start in range(0, len(samples), arguments.batch_size):
        batch = samples[start : start + arguments.batch_size]
        note(f"texts {start + 1} to {start + len(batch)} of {len(samples)}")
        asked = [{"source": source_of(arguments), "text": start + i} for i in range(len(batch))]
        work = partial(predict, model, batch, Reference(model, settings, batch))
        inputs = [asdict(sample) for sample in batch]
        rows += common.run_jobs(model, inputs, asked, jobs, arguments, work, check_made, "texts")
    return rows


def check_made(row: dict) -> None:
    """What a run has made of a text."""
    kinds = dict.fromkeys(("nll", "kl", "same"), list_of(common.NUMBER, PARTS))
    check_fields(row, kinds | {"stats": common.STATS})
    if row.get("needles") != []:
        needle = common.record({"distance": common.COUNT, "right": list_of(common.BOOL)})
        check_fields(row, {"needles": list_of(needle)})


def source_of(arguments: argparse.Namespace) -> str:
    """Keeps the runs apart that share a predictions file."""
    texts = " ".join(Path(path).name for path in arguments.text) if arguments.text else f"own seed={arguments.seed}"
    return common.source_of(arguments, "needles" if arguments.needles else "prose", texts)


class Reference:
    """The full cache's log-probabilities of a batch, computed when they are first asked for."""

    def __init__(self, model: Llama, settings: dict, samples: list[Sample]):
        self.model = model
        self.settings = settings
        self.samples = samples
        self.known: list[Tensor] = []  # T times [B, vocab]

    def log_probs(self) -> list[Tensor]:
        if not self.known:
            engine = make_engine(self.model, Options(policy=FULL.name, **self.settings), self.samples)
            with torch.inference_mode():
                for log_prob in read_output(engine, self.samples):
                    self.known.append(log_prob)
        return self.known


def make_engine(model: Llama, options: Options, samples: list[Sample]) -> Engine:
    require(not options.question_after, "question_after", repr(options.question_after), "empty: no text has a question")
    size = size_of([sample.prompt for sample in samples], options)._replace(batch=len(samples))
    return Engine(model, options, [], size, sampler=ReturnLogits())


@torch.inference_mode()
def predict(
    model: Llama, batch: list[Sample], reference: Reference, missing: list[int], job: Job, bar: tqdm
) -> Iterator[tuple[int, dict]]:
    """(number, measured) for each missing sample of a batch, which is read as a whole."""
    full = reference.log_probs()
    engine = make_engine(model, Options(**job.settings), batch)
    outputs = torch.tensor([sample.output for sample in batch], device=engine.device)
    T = outputs.shape[1]
    nll, kl = torch.zeros(2, T, len(batch))
    first = torch.zeros(T, len(batch), dtype=torch.int64)  # the likeliest token
    for t, (log_prob, wanted) in enumerate(zip(read_output(engine, batch), full, strict=True)):
        nll[t] = -log_prob.gather(1, outputs[:, t : t + 1])[:, 0]
        kl[t] = (wanted.exp() * (wanted - log_prob)).sum(-1)
        first[t] = log_prob.argmax(-1)
        bar.update(len(missing) / T)
    same = (first == torch.stack([log_prob.argmax(-1) for log_prob in full]).cpu()).float()
    stats = asdict(engine.stats([]))
    stats["kv_bytes"] /= len(batch)
    for i in missing:
        found = [needle_result(needle, first[:, i].tolist()) for needle in batch[i].needles]
        parts = {name: by_part(values[:, i]) for name, values in (("nll", nll), ("kl", kl), ("same", same))}
        yield i, parts | {"needles": found, "stats": stats}


def by_part(values: Tensor) -> list[float]:
    """The mean of each quarter of the output."""
    return [part.mean().item() for part in values.tensor_split(PARTS)]


def needle_result(needle: Needle, likeliest: list[int]) -> dict:
    """Which of the code's tokens the model would have said, each after the right ones before it."""
    said = likeliest[needle.start : needle.start + len(needle.code)]
    return {"distance": needle.distance, "right": [a == b for a, b in zip(said, needle.code, strict=True)]}


# ---- the report ------------------------------------------------------------------------------------------------


def lines_of(rows: list[dict]) -> list[dict]:
    """A line for each method and budget; changes are against full on the same text."""
    lines = []
    for group in report.grouped(rows, *report.LABELS):
        full = {row["text"]: row for row in rows if row["source"] == group[0]["source"] and row["method"] == FULL.name}
        lines.append(line_of(group, full))
    return lines


def line_of(rows: list[dict], full: dict[int, dict]) -> dict:
    nll = [statistics.mean(row["nll"]) for row in rows]
    line = {name: rows[0].get(name) for name in report.LABELS}
    line |= {"texts": len(rows), "perplexity": exp(min(statistics.mean(nll), MOST_NLL))}
    line |= {name: mean_of(rows, name) for name in ("kl", "same")}
    line |= {
        f"{name}_parts": [statistics.mean(row[name][i] for row in rows) for i in range(PARTS)] for name in ("nll", "kl")
    }
    if full:
        changes = [own - statistics.mean(full[row["text"]]["nll"]) for own, row in zip(nll, rows, strict=True)]
        line["change"] = (statistics.mean(changes), standard_error(changes))
        parts = [[row["nll"][i] - full[row["text"]]["nll"][i] for row in rows] for i in range(PARTS)]
        line["change_parts"] = [statistics.mean(part) for part in parts]
    return line | {"needles": needles_found(rows)} | report.costs(rows)


def mean_of(rows: list[dict], name: str) -> float:
    return statistics.mean(statistics.mean(row[name]) for row in rows)


def standard_error(values: list[float]) -> float | None:
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def needles_found(rows: list[dict]) -> dict[str, list[float]]:
    """{distance: [% of the code's tokens right, % of the codes right as a whole]}; "prompt" for facts there."""
    right: dict[str, list[list[bool]]] = {}
    for needle in (needle for row in rows for needle in row["needles"]):
        right.setdefault(str(needle["distance"] or "prompt"), []).append(needle["right"])
    return {
        name: [100 * statistics.mean(sum(codes, [])), 100 * statistics.mean(map(all, codes))]
        for name, codes in sorted(right.items(), key=lambda item: (item[0] != "prompt", item[0].zfill(9)))
    }


def change(line: dict) -> str:
    if "change" not in line:
        return ""
    mean, error = line["change"]
    return f"{mean:+.3f}" if error is None else f"{mean:+.3f} ±{error:.3f}"


COLUMNS = {
    **report.LABEL_COLUMNS,
    "texts": figure("texts", ".0f"),
    "perplexity": figure("perplexity", ".2f"),
    "change": change,
    **{
        f"Q{i + 1}": lambda line, i=i: f"{line['change_parts'][i]:+.3f}" if "change_parts" in line else ""
        for i in range(PARTS)
    },
    "KL": figure("kl", ".4f"),
    "same top-1": figure("same", ".1%"),
    **{name: report.COST_COLUMNS[name] for name in ("slots", "live peak", "KV MB")},
}
LEGEND = """
change: of the negative log-likelihood per token against full, ± its standard error over the texts; Q1 to Q4: the same
in each quarter of the output. KL: full's distribution against the method's, in nats. same top-1: steps with full's
likeliest token. needle, by distance: % of the code's tokens right (in brackets: % of the codes right as a whole)."""


def needle_columns(lines: list[dict]) -> report.Columns:
    names = dict.fromkeys(name for line in lines for name in line["needles"])
    return {f"needle {name}": partial(needle_cell, name) for name in names}


def needle_cell(name: str, line: dict) -> str:
    tokens, codes = line["needles"].get(name, (None, None))
    return "" if tokens is None else f"{tokens:.0f} ({codes:.0f})"


def panels(lines: list[dict]) -> list[Panel]:
    """For each budget: the change in NLL by quarter, or where there are needles, what was found by distance."""
    made = []
    for group in report.by_budget(lines):
        title = report.budget_title(group[-1])
        if any(line["needles"] for line in lines):
            found = {
                line["method"]: [(float(d), y[0]) for d, y in line["needles"].items() if d != "prompt"]
                for line in group
            }
            made.append(Panel(title, "distance (tokens)", "code tokens right (%)", found))
        else:
            curves = {
                line["method"]: list(enumerate(line["change_parts"], 1)) for line in group if "change_parts" in line
            }
            made.append(Panel(title, "quarter of the output", "change in NLL per token", curves))
    return made


if __name__ == "__main__":
    sys.exit(main())
