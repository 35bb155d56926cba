"""Generate text with SCOPE: load a checkpoint, prefill, decode through compiled graphs, stream the text.

From a shell:  python generate.py --prompt-file questions.txt --policy discontinuous
From Python:   model, tokenizer = load("checkpoints/mini")
               for result in generate(model, tokenizer, ["Question_1: ..."], "discontinuous"): print(result.text)
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the 3 s in which torch is imported ends quietly too
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import logging
import math
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import kernels
import scope
from cache import Cache, CacheSize, CacheSnapshot, StepInput, free_memory, round_up
from model import Llama, ModelConfig
from scope import Policy, PromptPolicy, one_line, require, require_known

log = logging.getLogger("scope")
MINI = Path(__file__).parent / "checkpoints" / "mini"


def option(default, help: str, **argument):
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Options:
    """Every setting and its default; `--help` prints them. Raises ValueError for a value that is impossible."""

    checkpoint: str = option("checkpoints/mini", "directory in Hugging Face format, or hub id", metavar="DIR_OR_HUB_ID")
    policy: str = option("discontinuous", "what happens to generated tokens", choices=list(scope.STRATEGIES))
    heavy: int = option(128, "heavy hitters: generated tokens kept per KV head for their score")
    recent: int = option(64, "newest generated tokens, always kept")
    score: str = option("cumulative", "what ranks generated tokens", choices=list(scope.SCORES))
    interval: int = option(0, "steps from one selection to the next; 0: the policy's own")
    compress: str = option("full", "what happens to the prompt after prefill", choices=list(scope.COMPRESSORS))
    prompt_budget: int = option(2048, "prompt tokens that --compress keeps per KV head")
    obs_window: int = option(32, "of those, the last tokens of the prompt, always kept; some methods score by them")
    layer_shares: str = option("", "each layer's share of --prompt-budget, as benchmarks/calibrate.py has measured it: "
                               "--compress prefixkv and zipvl read it", metavar="FILE.json")  # fmt: skip
    question_after: str = option("", "the question is what follows the last such text of a prompt: it chooses and "
                                 "stays, in place of --obs-window", metavar="TEXT")  # fmt: skip
    key_channels: float = option(1.0, "a study that saves no memory: prompt keys before --obs-window keep this share "
                                 "of their channels, and the others are set to 0")  # fmt: skip
    kv_format: str = option("model", "how keys and values are stored: as the model's dtype, or in fewer bits",
                            choices=list(scope.FORMATS))  # fmt: skip
    max_new_tokens: int = option(512, "most tokens to generate (the paper's T: growing budgets are full there)")
    temperature: float = option(0.0, "0: greedy")
    top_k: int = option(0, "sample from this many likeliest tokens; 0: all")
    top_p: float = option(1.0, "sample from the likeliest tokens with this total probability")
    seed: int = option(0, "of the sampling; prompt i draws the same numbers in any batch (in float32: the same tokens)")
    samples: int = option(1, "answers to each prompt, which is stored once for all; sample 2 is as with --seed SEED+2")
    ignore_eos: bool = option(False, "do not stop at a stop token")
    stop: tuple = option((), "end an answer before this text; may be given several times")
    batch_size: int = option(8, "most prompts that run together")
    max_context: int = option(0, "slots per KV head for the prompt and, in a conversation, for all that follows it; "
                              "0: what the prompts need, in a conversation 4096 or what the model allows")  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1; auto: cuda if there is one")
    dtype: str = option("auto", "of weights and cache: float32, bfloat16, float16; auto: the checkpoint's")
    compile: bool = option(True, "compile the decode step (--no-compile: start at once, slower steps)")

    def __post_init__(self):
        policy, _ = self.rules()
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        require(self.samples >= 1, "samples", self.samples, "1 or more")
        frozen = ", ".join(name for name, strategy in scope.STRATEGIES.items() if strategy.frozen_prompt)
        shares = self.samples == 1 or policy.strategy.frozen_prompt
        require(shares, "samples", self.samples, f"1 where answers evict the prompt: choose a policy of {frozen}")
        differ = self.samples == 1 or self.temperature > 0
        require(differ, "samples", self.samples, "1 without a temperature: all answers would be the same")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.max_context >= 0, "max_context", self.max_context, "0 (automatic) or more")
        object.__setattr__(self, "stop", tuple(self.stop))
        require(all(isinstance(text, str) and text for text in self.stop), "stop", list(self.stop), "texts, none empty")

    def rules(self) -> tuple[Policy, PromptPolicy]:
        """What scope.py makes of these settings, for generated tokens and for the prompt."""
        policy = Policy(self.policy, self.heavy, self.recent, self.score, self.interval)
        require_known("kv_format", self.kv_format, scope.FORMATS)
        shares = read_shares(self.layer_shares).get(self.compress, ())
        prompt = PromptPolicy(self.compress, self.prompt_budget, self.obs_window, shares, self.key_channels)
        return policy, prompt


def read_shares(path: str) -> dict[str, tuple]:
    """Compressor -> each layer's share of the prompt budget, from a file of benchmarks/calibrate.py; "": no file."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))["shares"] if path else {}
        shares = {name: tuple(row) for name, row in table.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = one_line(error) if isinstance(error, OSError) else "it holds no table of shares"
        raise ValueError(f"layer_shares {path}: {why}: give a file that benchmarks/calibrate.py writes") from None
    for row in shares.values():
        numbers = all(type(share) in (int, float) and 0 < share <= len(row) for share in row)
        holds = numbers and abs(sum(row) - len(row)) <= len(row) / 100
        wanted = "numbers above 0 with the mean 1, as benchmarks/calibrate.py writes them"
        require(holds, f"layer_shares {path}", list(row), wanted)
    return shares


def load(checkpoint: str = Options.checkpoint, device: str = Options.device, dtype: str = Options.dtype):
    """Checkpoint directory or hub id -> (Llama, hf.tokenizer.Tokenizer). Raises ValueError if it cannot be run.

    Where torchrun has started several processes, each must call it, and gets its own part of the model.
    """
    log.info("loading %s", checkpoint)
    from cli import ranks  # here: a fork with a tokenizer of its own needs the five files alone
    from hf import load_checkpoint

    rank, n_ranks = ranks.join()
    with ranks.all_or_none(n_ranks):
        return load_checkpoint(place_of(checkpoint), ranks.take_device(device, n_ranks), dtype, rank, n_ranks)


def place_of(checkpoint: str) -> str:
    """The default names the bundled model in any directory, but a folder of that name in this one goes first."""
    return str(MINI) if checkpoint == Options.checkpoint and not Path(checkpoint).is_dir() else checkpoint


# ---- generating -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stats:
    """What a batch took. Bytes are allocated ones, of the whole batch; seconds are wall clock."""

    policy: str
    heavy: int
    recent: int
    score: str
    interval: int
    compress: str
    prompt_budget: int
    obs_window: int
    kv_format: str
    samples: int
    n_ranks: int  # processes that share out the heads; bytes are those of one of them
    steps: int  # decode steps: the tokens of the longest row, less the one that prefill gives
    prompt_slots: int  # allocated per KV head, the mean of the layers
    decode_slots: int
    live_peak: float  # most tokens held at a time per KV head by the fullest row, the mean of layers and heads
    kv_bytes: int
    kv_bytes_full: int  # of a full static cache for the same prompt slots + T
    prefill_s: float
    compile_s: float  # of the run, the same for all of its batches
    eager_step_s: float  # what one step took before it was compiled; 0 where nothing was
    decode_s: float
    tokens_per_s: float  # tokens of all rows that decode steps made, over decode_s


@dataclass(frozen=True)
class Result:
    """One line of --output. `token_ids` are the generated ones; `stats` are those of the row's batch."""

    index: int  # of the prompt
    sample: int  # of its answers, counted from 0
    prompt_len: int
    token_ids: list[int]
    text: str
    finish_reason: str  # "stop", "length" or, in a conversation, "interrupted"
    stats: Stats


@dataclass(frozen=True)
class Request:
    """A prompt of a run, and the most tokens of its answer."""

    index: int
    ids: list[int]
    max_new_tokens: int
    question: int = 0  # the last tokens, which choose what stays of the others; 0: obs_window of them


def no_callback(*arguments) -> None:
    """The default of on_text, on_step and should_stop."""


def generate(
    model: Llama,
    tokenizer,
    prompts: list,
    policy=Options.policy,
    *,
    questions: list[int] | None = None,
    on_text=None,
    on_step=None,
    **settings,
) -> Iterator[Result]:
    """Results in the order of `prompts` (texts, or lists of token ids), each as soon as its batch is through.

    policy: a name, with more fields of Options in `settings`, or Options. questions: how many tokens at the end of each
    prompt are its question (`question_after` finds them in a text). on_text(number, text) gets text as it comes; with 4
    samples, answers 0 to 3 are those of prompt 0. on_step(cache) gets the cache after prefill and after every step. The
    tokenizer needs `encode`, `decode`, `stream` and `stop_ids`. Raises ValueError, before anything is computed, for a
    prompt or a setting that cannot be run.
    """
    options = options_from(policy, settings)
    require(not isinstance(prompts, str), "prompts", repr(prompts[:40]), "a list of prompts: put the text in brackets")
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    check_run(model.config, ids, options)
    rows = enumerate(zip(ids, find_questions(tokenizer, ids, options, questions), strict=True))
    engine = Engine(model, options, tokenizer.stop_ids, size_of(ids, options))
    requests = [Request(i, prompt, options.max_new_tokens, question) for i, (prompt, question) in rows]
    return run(engine, tokenizer, requests, on_text or no_callback, on_step or no_callback)


def options_from(policy: str | Options, settings: dict) -> Options:
    """Options from a policy's name and more settings, or Options that are there already, with changes."""
    return replace(policy, **settings) if isinstance(policy, Options) else Options(policy=policy, **settings)


def check_run(config: ModelConfig, prompts: list[list[int]], options: Options) -> None:
    """Raises ValueError for prompts that the model cannot read, or that leave no room for the output."""
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    limit, what = config.context_limit()
    require(options.max_context <= limit, "max_context", options.max_context, f"at most the model's {limit} {what}")
    for i, ids in enumerate(prompts):
        check_ids(config, f"prompt {i}", ids, 0, options)


def check_ids(config: ModelConfig, name: str, ids: list[int], before: int, options: Options) -> None:
    """before: tokens that the model has read already."""
    if not ids:
        raise ValueError(f"{name} is empty: give it at least one token")
    wrong = [x for x in ids if type(x) is not int or not 0 <= x < config.vocab_size]
    if wrong:
        raise ValueError(f"{name} has token id {wrong[0]!r}: the vocabulary is 0 to {config.vocab_size - 1}")
    end, (limit, what) = before + len(ids), config.context_limit()
    if end + options.max_new_tokens > limit:
        more = f"{name} ends at token {end} and {options.max_new_tokens} may follow, the model has {limit} {what}"
        raise ValueError(f"{more}: lower --max-new-tokens or shorten the prompt")


def find_questions(tokenizer, prompts: list[list[int]], options: Options, given=None) -> list[int]:
    """Tokens of each prompt's question, its last ones: as given, or what follows --question-after; 0: obs_window."""
    after = options.question_after
    found = given or [question_len(tokenizer, f"prompt {i}", ids, after) for i, ids in enumerate(prompts)]
    require(len(found) == len(prompts), "questions", found, f"{len(prompts)} numbers, one for each prompt")
    for i, (n, ids) in enumerate(zip(found, prompts, strict=True)):
        most = min(len(ids), options.prompt_budget)
        wanted = f"0 to {most}: all of them stay, so they are part of prompt_budget"
        require(type(n) is int and 0 <= n <= most, f"the number of tokens of question {i}", n, wanted)
    return found


def question_len(tokenizer, name: str, ids: list[int], after: str) -> int:
    """Tokens that end behind the last `after` in a prompt. "": 0."""
    if not after:
        return 0
    text = tokenizer.decode(ids)
    end = text.rfind(after) + len(after)
    before = bisect_right(range(len(ids) + 1), end, key=lambda n: len(tokenizer.decode(ids[:n]))) - 1  # tokens
    if after not in text or before == len(ids):
        raise ValueError(f"{name} has no question after {after!r}: put this text before it, or change --question-after")
    return len(ids) - before


def size_of(prompts: list[list[int]], options: Options) -> CacheSize:
    """The size of the one cache that all batches of a run share."""
    lengths = sorted({len(ids) for ids in prompts})
    batch = min(options.batch_size, len(prompts)) * options.samples
    return CacheSize(batch, lengths, options.max_new_tokens, options.max_context, options.samples)


def run(engine: "Engine", tokenizer, requests: list[Request], on_text=no_callback, on_step=no_callback):
    """Yields the Results of each request, batch after batch through the same buffers."""
    size, samples = engine.size.prompts, range(engine.options.samples)
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        rows = [Row(request, sample, tokenizer.stream(), engine.options) for request in batch for sample in samples]
        interrupt = None
        try:
            ids, indexes = [request.ids for request in batch], [request.index for request in batch]
            first_token = engine.prefill(ids, indexes, [request.question for request in batch])
            on_step(engine.cache)
            decode_rows(engine, rows, first_token, READ_EVERY[engine.device.type], on_text, on_step)
        except KeyboardInterrupt as error:  # rows that are complete are not lost
            interrupt = error
        stats = engine.stats(rows)
        yield from (row.result(tokenizer, stats) for row in rows if row.finish_reason or not interrupt)
        if interrupt:
            raise interrupt


def decode_rows(
    engine: "Engine", rows: list["Row"], first_token: Tensor, read_every: int, on_text, on_step, should_stop=no_callback
) -> None:
    """first_token [B]: what prefill gave each row; read_every: steps between two looks at which rows have stopped.
    should_stop() is asked after each step."""
    engine.start_decode()
    pending = [first_token]  # tokens on the device that no row has taken yet
    for t in range(1, engine.options.max_new_tokens):
        if len(pending) == read_every:
            deliver(engine, rows, pending, on_text)
            pending.clear()
            if all(row.finish_reason for row in rows):
                return
        pending.append(engine.decode(t))
        on_step(engine.cache)
        if should_stop():
            break
    deliver(engine, rows, pending, on_text)
    for row in rows:
        if not row.finish_reason:
            on_text(row.number, row.end("interrupted"))


def deliver(engine: "Engine", rows: list["Row"], pending: list[Tensor], on_text) -> None:
    """Hand tokens to the rows. Only here the host waits for the device: it copies all tokens and stop flags at once."""
    *steps, stopped = torch.stack([*pending, engine.stopped.long()]).tolist()
    for i, row in enumerate(rows):
        tokens = [step[i] for step in steps]
        if kernels.BROKEN in tokens and not row.finish_reason:
            number = len(row.tokens) + tokens.index(kernels.BROKEN) + 1
            where = f"prompt {row.request.index}: the logits of token {number}"
            raise ValueError(f"{where} are not finite: try --dtype float32, or other weights")
        if text := row.take([token for token in tokens if token >= 0], bool(stopped[i])):
            on_text(row.number, text)


class Row:
    """One answer of a running batch, on the host's side."""

    def __init__(self, request: Request, sample: int, stream: "hf.tokenizer.TextStream", options: Options):  # noqa: F821
        self.request = request
        self.sample = sample
        self.number = request.index * options.samples + sample  # of the answer, in the run
        self.stream = stream
        self.stop = options.stop
        self.tokens: list[int] = []  # generated, a stop token included
        self.text = ""  # of these tokens, as far as its characters are whole
        self.shown = 0  # characters of it that are out
        self.stop_token = False  # whether the last token is one
        self.finish_reason = ""  # "": it is not finished

    def take(self, new: list[int], stopped: bool) -> str:
        """Add new tokens, a stop token included; returns the text that they complete."""
        shown = ""
        for i, token in enumerate(new):
            if self.finish_reason:  # the device does not know of stop texts, and runs on
                break
            self.tokens.append(token)
            self.stop_token = stopped and i == len(new) - 1
            if self.stop_token:
                shown += self.end("stop")
            elif len(self.tokens) == self.request.max_new_tokens:
                shown += self.end("length", [token])
            else:
                shown += self.show([token])
        return shown

    def end(self, reason: str, ids: list[int] = ()) -> str:
        """Add the last ids; returns the rest of the text."""
        self.finish_reason = reason
        return self.show(list(ids), last=True)

    def show(self, ids: list[int], last: bool = False) -> str:
        """The text that is new and cannot belong to a stop text any more."""
        self.text += self.stream.push(ids, last)
        end = kept_before(self.text, self.stop)
        if end < len(self.text):
            self.finish_reason = "stop"
        elif not last:
            end -= may_begin(self.text, self.stop)
        new, self.shown = self.text[self.shown : end], max(end, self.shown)
        return new

    def result(self, tokenizer, stats: Stats) -> Result:
        text = tokenizer.decode(self.tokens[:-1] if self.stop_token else self.tokens)
        text = text[: kept_before(text, self.stop)]
        request = self.request
        return Result(request.index, self.sample, len(request.ids), self.tokens, text, self.finish_reason, stats)


def kept_before(text: str, stops: tuple[str, ...]) -> int:
    """Where the first of the stop texts begins; the length of the text where none is in it."""
    return min([i for stop in stops if (i := text.find(stop)) >= 0], default=len(text))


def may_begin(text: str, stops: tuple[str, ...]) -> int:
    """How many of the last characters may begin a stop text: 2 of "x = {{" where a stop text is "{{{"."""
    return max([n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])], default=0)


# ---- the engine -------------------------------------------------------------------------------------------

READ_EVERY = {"cpu": 1, "cuda": 8}  # steps; a GPU runs ahead of the host, and each read makes it wait


def decode_step(
    model: Llama, cache: Cache, sampler: kernels.Sampler, now: StepInput, token: Tensor, noise: Tensor, stopped: Tensor
):
    """Feed token [B] and choose the next one. Compiled: a graph for append steps and one for select steps."""
    hidden = model(token[:, None], now.position[:, None], cache.layers, now)
    return sampler(model.logits(hidden[:, -1]), noise, stopped)


class Engine:
    """One model and one cache. It runs batch after batch of prompts through the same buffers and graphs."""

    def __init__(self, model: Llama, options: Options, stop_ids: list[int], size: CacheSize, sampler=None):
        self.model = model
        self.options = options
        self.size = size
        self.device = model.embed.weight.device
        self.check_memory()
        self.cache = self.allocate(*options.rules(), size, self.device, options.kv_format)
        self.sampler = sampler or kernels.Sampler(options, [] if options.ignore_eos else stop_ids).to(self.device)
        self.decode_step = decode_step
        self.noise: Tensor  # [T, B] one number per token, for sampling
        self.token: Tensor  # [B] to feed next
        self.stopped: Tensor  # [B] bool
        self.steps: int  # decode steps since the prompt or the turn was read
        self.start_turn([0] * size.prompts)
        self.prefill_s = self.decode_started = 0.0
        self.prompt_live = 0.0  # tokens that the fullest row held before the first step
        self.eager_step_s = self.time_eager_step() if options.compile else 0.0
        self.compile_s = self.compile() if options.compile else 0.0

    def check_memory(self) -> None:
        """Raises ValueError for a cache that does not fit: the system would kill the process when it fills up.

        The rank with the least memory decides for all, so that none waits for one that has ended.
        """
        need = self.allocate(*self.options.rules(), self.size, "meta", self.options.kv_format).nbytes
        n_ranks = self.model.config.n_ranks
        free = torch.tensor([free_memory(self.device)], dtype=torch.float64, device=self.device)
        free = kernels.gather_over_ranks(free, n_ranks, 0).min().item()
        if need > free:
            rows = int(self.size.batch * free / need)
            remedy = f"lower --batch-size to {rows}" if rows else "lower --max-new-tokens, or shorten the prompt"
            each = " per rank" if n_ranks > 1 else ""
            raise ValueError(f"the KV cache takes {need / 1e9:.1f} GB{each} and {free / 1e9:.1f} GB are free: {remedy}")

    def allocate(self, policy: Policy, prompt: PromptPolicy, size: CacheSize, device, kv_format: str) -> Cache:
        formats = scope.FORMATS[kv_format]
        try:
            with torch.device(device):
                return Cache(self.model.config, policy, prompt, size, self.model.embed.weight.dtype, formats)
        except RuntimeError as error:  # torch's out-of-memory errors, CPU and CUDA
            raise ValueError(f"the KV cache does not fit: {one_line(error)[:120]}; lower --batch-size") from error

    def time_eager_step(self) -> float:
        """Seconds of a step that is not compiled, over the slots that a compiled one reads."""
        for _ in range(2):  # the first one warms up
            self.reset()
            started = time.perf_counter()
            self.decode(1, self.cache.graph_keys[0])
            self.wait()
        return time.perf_counter() - started

    @torch.inference_mode()
    def compile(self) -> float:
        """Compile all graphs on the empty cache, so that no step of a run waits for it. Returns seconds."""
        started = time.perf_counter()
        on_gpu = self.device.type == "cuda"
        prepare_compiler(needs_cpp=not on_gpu)
        bits = min(format.bits for format in scope.FORMATS[self.options.kv_format])
        cpu = {"options": kernels.compiler_options(bits, self.model.config.head_dim)}
        how = {"mode": "reduce-overhead"} if on_gpu else cpu
        self.decode_step = torch.compile(decode_step, fullgraph=True, dynamic=False, **how)
        graphs = sorted(set(self.cache.graph_keys))
        for i, (select, reads) in enumerate(graphs):
            spent = time.perf_counter() - started
            to_go = f"; {spent:.0f} s so far, about {spent / i * (len(graphs) - i):.0f} s to go" if i else ""
            what = f"{'select' if select else 'append'} step, {reads} decode slots"
            log.info("compiling graph %d of %d (%s)%s ...", i + 1, len(graphs), what, to_go)
            for _ in range(3 if on_gpu else 1):  # CUDA graphs: warm up, record, replay
                self.reset()
                try:
                    self.decode(1, (select, reads))
                except (RuntimeError, OSError) as error:  # from Dynamo, Inductor, the C++ compiler or their cache
                    raise ValueError(f"torch.compile failed: {one_line(error)}: run with --no-compile") from error
        self.wait()
        return time.perf_counter() - started

    def reset(self, indexes: list[int] | None = None) -> None:
        """Forget the batch before. indexes: the numbers of the prompts that follow."""
        self.cache.reset()
        self.start_turn(indexes or [0] * self.size.prompts)

    @torch.inference_mode()
    def start_turn(self, indexes: list[int]) -> None:
        """Draw the sampling noise anew. It depends on the seed and on each prompt's index, and on nothing else."""
        self.noise = kernels.draw_noise(self.options, indexes).to(self.device)
        self.token = torch.zeros(self.size.batch, dtype=torch.int64, device=self.device)
        self.stopped = torch.zeros(self.size.batch, dtype=torch.bool, device=self.device)
        self.steps = 0

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], indexes: list[int], questions: list[int] | None = None) -> Tensor:
        """Read the prompts, those of one width together; returns each answer's first token [B].

        questions: tokens of each prompt's question, as in Request. A batch that is shorter than the cache is filled up
        with copies of its last prompt.
        """
        started = time.perf_counter()
        missing = self.size.prompts - len(prompts)
        self.reset(indexes + indexes[-1:] * missing)
        lengths, questions = [len(ids) for ids in prompts], questions or [0] * len(prompts)
        self.cache.begin_prefill(lengths + lengths[-1:] * missing, questions + questions[-1:] * missing)
        groups: dict[int, list[int]] = {}  # padded width -> rows
        for row, ids in enumerate(prompts):
            groups.setdefault(padded_width(len(ids)), []).append(row)
        hidden: dict[int, Tensor] = {}
        for width, rows in groups.items():
            hidden |= zip(rows, self.read_rows(rows, [prompts[row] for row in rows], width), strict=True)
        self.cache.end_prefill(len(prompts))
        last = len(prompts) - 1
        rows = [hidden[min(i // self.size.samples, last)] for i in range(self.size.batch)]
        return self.sample_first(torch.stack(rows), started)

    def read_rows(self, rows: list[int], prompts: list[list[int]], width: int) -> Tensor:
        """Read prompts as one right-padded block; returns the hidden state of each one's last token, [n, hidden]."""
        block = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts], device=self.device)
        positions = torch.arange(width, device=self.device).expand_as(block)
        hidden = self.model(block, positions, self.cache.prefill_attention(torch.tensor(rows, device=self.device)))
        return hidden[torch.arange(len(rows)), [len(ids) - 1 for ids in prompts]]

    @torch.inference_mode()
    def read_turn(self, turn: int, ids: list[int]) -> Tensor:
        """Read a later turn of a conversation on top of all live tokens; returns its first token [1]."""
        started = time.perf_counter()
        self.start_turn([turn])
        positions, attends = self.cache.begin_turn(len(ids))
        hidden = self.model(torch.tensor([ids], device=self.device), positions, attends)
        self.cache.begin_output()
        return self.sample_first(hidden[:, -1], started)

    def sample_first(self, hidden: Tensor, started: float) -> Tensor:
        """hidden [B, hidden] of the last token that each row has read -> each row's first token [B]."""
        self.token, shown, self.stopped = self.sampler(self.model.logits(hidden), self.noise[0], self.stopped)
        self.wait()
        self.prefill_s = time.perf_counter() - started
        return shown

    def settle(self, end: int) -> None:
        """End an answer: what is left of its tokens before position `end` stays for the turns that follow."""
        self.cache.settle(self.steps, end)
        self.steps = 0

    def resume(self, turn: int, opening: tuple[Tensor, Tensor] | None) -> None:
        """Go back to where a turn had just been read. opening: its first token [1] and whether that one stops."""
        self.start_turn([turn])
        self.prefill_s = 0.0
        if opening:
            self.token, self.stopped = opening

    def start_decode(self) -> None:
        self.prompt_live = self.cache.kept.float().mean(0).amax().item()
        self.decode_started = time.perf_counter()

    @torch.inference_mode()
    def decode(self, t: int, graph_key: tuple[bool, int] | None = None) -> Tensor:
        """Run step t, counted from 1; returns the tokens to show [B], -1 for a row that had stopped before."""
        select, reads = graph_key or self.cache.graph_keys[t - 1]
        eager = not (self.options.compile or graph_key)
        now = self.cache.eager_step_input(t) if eager else self.cache.step_input(t, select, reads)
        noise = self.noise[t % len(self.noise)]
        step = self.decode_step(self.model, self.cache, self.sampler, now, self.token, noise, self.stopped)
        self.token, shown, self.stopped = (x.clone() for x in step)  # CUDA graphs reuse the memory of their results
        self.steps = t
        return shown

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def stats(self, rows: list[Row]) -> Stats:
        """The figures of the batch that has just been decoded."""
        self.wait()
        decode_s = time.perf_counter() - self.decode_started
        full = CacheSize(self.size.batch, [*self.size.lengths, self.size.prompt_slots], self.size.T)
        prompt_slots, decode_slots = (round(sum(n) / len(n)) for n in self.cache.slots)
        held = self.cache.held_of_output(self.steps)  # [steps, n_layers]
        settings = asdict(self.options)
        return Stats(
            **{entry.name: settings[entry.name] for entry in fields(Stats) if entry.name in settings},
            n_ranks=self.model.config.n_ranks,
            steps=self.steps,
            prompt_slots=prompt_slots,
            decode_slots=decode_slots,
            live_peak=self.prompt_live + (held.amax(0).float().mean().item() if self.steps else 0.0),
            kv_bytes=self.cache.nbytes,
            kv_bytes_full=self.allocate(scope.FULL, scope.WHOLE_PROMPT, full, "meta", "model").nbytes,
            prefill_s=self.prefill_s,
            compile_s=self.compile_s,
            eager_step_s=self.eager_step_s,
            decode_s=decode_s,
            tokens_per_s=sum(len(row.tokens) - 1 for row in rows) / decode_s,
        )


def padded_width(n: int) -> int:
    """A little more than n, so that few widths occur: oneDNN keeps a kernel for each shape that it has seen.

    5 -> 8, 100 -> 104, 1000 -> 1024: eight widths from each power of two to the next.
    """
    return round_up(n, max(8, 2 ** n.bit_length() // 16))


def prepare_compiler(needs_cpp: bool) -> None:
    """Import torch's compiler, which takes seconds that an eager run need not wait, and lift its limits."""
    try:
        import torch._dynamo.config as dynamo
        from torch._inductor.cpp_builder import get_cpp_compiler
    except OSError as error:
        where = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written, or run with --no-compile"
        raise ValueError(f"torch.compile cannot use its cache: {one_line(error)}: {where}") from error
    # torch stops compiling a function after 8 graphs, and after 256 with those that are gone. A sweep needs more.
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 10**6
    if not needs_cpp:
        return
    try:
        get_cpp_compiler()
    except Exception as error:
        raise ValueError("torch.compile finds no C++ compiler here: install g++, or run with --no-compile") from error


# ---- conversations ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A moment of a conversation that `Conversation.rewind` goes back to."""

    cache: CacheSnapshot
    turn: int
    read_last: list[int]
    unread: list[int]
    opening: tuple[Tensor, Tensor] | None


class Conversation:
    """One context that is read once, and any number of turns that follow it, or of requests that are rewound.

    All that is read stays, except what --compress takes of the context. Of an answer stays what the policy has left of
    it when the next turn is read. Each turn has a decode budget and a T of its own. Requests over one context run one
    after the other. The tokenizer needs `encode_after` too. Raises ValueError, before anything is computed, for what
    cannot be run.
    """

    def __init__(self, model: Llama, tokenizer, context: str | list[int], policy=Options.policy, **settings):
        options = options_from(policy, settings)
        slots = options.max_context or min(4096, model.config.context_limit()[0])
        ids = tokenizer.encode(context) if isinstance(context, str) else context
        self.tokenizer = tokenizer
        self.options = replace(options, max_context=slots)
        require(options.samples == 1, "samples", options.samples, "1 in a conversation, which goes on from its answer")
        check_run(model.config, [ids], self.options)
        questions = find_questions(tokenizer, [ids], self.options)
        self.engine = Engine(model, self.options, tokenizer.stop_ids, size_of([ids], self.options))
        self.snapshots: list[Snapshot] = []
        self.turn = 0
        self.read_last = ids  # what was read before the next answer
        self.unread: list[int] = []  # the last token of an answer, which is read with the next turn
        first_token = self.engine.prefill([ids], [0], questions)
        self.opening = first_token, self.engine.stopped  # what an answer begins with
        self.end = self.engine.cache.position  # of the next token

    def read(self, turn: str | list[int]) -> None:
        """Read what a user says next, or one more piece of it."""
        ids = self.tokenizer.encode_after(turn) if isinstance(turn, str) else turn
        check_ids(self.engine.model.config, f"turn {self.turn}", ids, self.end + len(self.unread), self.options)
        ids = self.unread + ids
        self.check_room(len(ids))
        self.engine.settle(self.end)
        self.read_last, self.unread = ids, []
        self.opening = self.engine.read_turn(self.turn, ids), self.engine.stopped
        self.end = self.engine.cache.position

    def check_room(self, n: int) -> None:
        room = self.engine.cache.room(self.engine.steps)
        if n > room:
            have = f"{max(room, 0)} of max_context {self.options.max_context} are left"
            raise ValueError(f"turn {self.turn} needs {n} slots, {have}: raise --max-context or begin anew")

    def answer(self, on_text=no_callback, should_stop=no_callback, *, on_step=no_callback) -> Result:
        """Decode until a stop, or max_new_tokens, or should_stop() is true; on_text and on_step as in `generate`."""
        if self.opening is None:
            raise ValueError(f"turn {self.turn} has nothing to answer: read something first")
        request, (first_token, _) = Request(self.turn, self.read_last, self.options.max_new_tokens), self.opening
        row = Row(request, 0, self.tokenizer.stream(), self.options)
        self.opening = None  # an answer that is interrupted leaves nothing to go on from
        # Each step is looked at: a device that ran past the stop token would evict what a later turn could still use.
        decode_rows(self.engine, [row], first_token, 1, on_text, on_step, should_stop)
        self.turn += 1
        self.unread = row.tokens[-1:]
        self.end += len(row.tokens) - 1
        return row.result(self.tokenizer, self.engine.stats([row]))

    def mark(self) -> Snapshot:
        """Settle the last answer and return a snapshot of this moment, to rewind to."""
        self.check_room(len(self.unread))
        self.engine.settle(self.end)
        cache = self.engine.cache.snapshot()
        self.snapshots.append(Snapshot(cache, self.turn, self.read_last, self.unread, self.opening))
        return self.snapshots[-1]

    def rewind(self, snapshot: Snapshot) -> None:
        """Forget what came after the snapshot. There is no prefill, and an answer samples as it did the first time."""
        if snapshot not in self.snapshots:
            raise ValueError("this snapshot is gone: an earlier one was rewound to, or it is another conversation's")
        del self.snapshots[self.snapshots.index(snapshot) + 1 :]
        self.engine.cache.rewind(snapshot.cache)
        self.turn = snapshot.turn
        self.read_last = snapshot.read_last
        self.unread = snapshot.unread
        self.opening = snapshot.opening
        self.end = snapshot.cache.position
        self.engine.resume(self.turn, self.opening)


if __name__ == "__main__":
    from cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
