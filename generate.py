"""Generate text with SCOPE: load a checkpoint, prefill, decode through two compiled graphs, stream.

From a shell:  python generate.py --prompt-file questions.txt --policy discontinuous
From Python:   model, tokenizer = load("checkpoints/mini")
               for result in generate(model, tokenizer, ["Question_1: ..."], "discontinuous"): print(result.text)
"""

import argparse
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cache import Cache, Mark, Now, Shape
from model import ROPE_SCALINGS, Llama, ModelConfig
from scope import COMPRESSORS, FULL, SCORES, STRATEGIES, WHOLE, Policy, Prompt

log = logging.getLogger("scope")
MINI = Path(__file__).parent / "checkpoints" / "mini"


def option(default, help: str, **argument):
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Options:
    """Every setting and its default; `--help` prints them. ValueError names a value that is impossible."""

    checkpoint: str = option("checkpoints/mini", "directory in Hugging Face format, or hub id", metavar="DIR_OR_HUB_ID")
    policy: str = option("discontinuous", "what happens to generated tokens in the cache", choices=list(STRATEGIES))
    heavy: int = option(128, "heavy hitters: generated tokens kept per KV head for their score")
    recent: int = option(64, "newest generated tokens, always kept")
    score: str = option("cumulative", "what ranks generated tokens", choices=list(SCORES))
    compress: str = option("full", "what happens to the prompt after prefill", choices=list(COMPRESSORS))
    prompt_budget: int = option(2048, "prompt tokens that --compress keeps per KV head")
    obs_window: int = option(32, "of those, the last tokens of the prompt, always kept; some methods score by them")
    max_new_tokens: int = option(512, "most tokens to generate (the paper's T: growing budgets are full there)")
    temperature: float = option(0.0, "0: greedy")
    top_k: int = option(0, "sample from this many likeliest tokens; 0: all")
    top_p: float = option(1.0, "sample from the likeliest tokens with this total probability")
    seed: int = option(0, "of the sampling; a prompt samples the same alone and in a batch")
    ignore_eos: bool = option(False, "do not stop at a stop token")
    batch_size: int = option(8, "most prompts that run together")
    max_context: int = option(0, "slots per KV head for the prompt and, in a conversation, for all that follows it; "
                              "0: what the prompts need, in a conversation 4096 or what the model allows")  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1; auto: cuda if there is one")
    dtype: str = option("auto", "of weights and cache: float32, bfloat16, float16; auto: the checkpoint's")
    compile: bool = option(True, "run eagerly: nothing to wait for, slower steps")

    def __post_init__(self):
        self.rules()
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.max_context >= 0, "max_context", self.max_context, "0 (automatic) or more")

    def rules(self) -> tuple[Policy, Prompt]:
        """What scope.py makes of these settings, for the decode and for the prefill phase."""
        policy = Policy(self.policy, self.heavy, self.recent, self.score)
        return policy, Prompt(self.compress, self.prompt_budget, self.obs_window)


def require(holds: bool, name: str, value, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: it must be {wanted}")


# ---- generating -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stats:
    """What a batch took. Bytes are allocated ones, of the whole batch; seconds are wall clock."""

    policy: str
    heavy: int
    recent: int
    score: str
    compress: str
    prompt_budget: int
    obs_window: int
    steps: int  # decode steps: the tokens of the longest row, less the one that prefill gives
    prompt_slots: int  # allocated per KV head, the mean of the layers
    decode_slots: int
    live_peak: float  # most tokens held at a time per KV head by the fullest row, the mean of layers and heads
    kv_bytes: int
    kv_bytes_full: int  # of a full static cache for the same prompt slots + T
    prefill_s: float
    compile_s: float  # of the run, the same for all of its batches
    decode_s: float
    tokens_per_s: float  # tokens of all rows that decode steps made, over decode_s


@dataclass(frozen=True)
class Result:
    """One line of --output. `token_ids` are the generated ones; `stats` are those of the row's batch."""

    index: int
    prompt_len: int
    token_ids: list[int]
    text: str
    finish_reason: str  # "stop" or "length"
    stats: Stats


def generate(
    model: Llama,
    tokenizer: "Tokenizer",
    prompts: list[str | list[int]],
    policy: str = Options.policy,
    *,
    on_text=None,
    on_step=None,
    **settings,
) -> Iterator[Result]:
    """Results in the order of `prompts` (texts, or lists of token ids), each as soon as its batch is through.

    settings: more fields of Options. on_text(index, text) gets text as it is generated, on_step(cache) the cache
    after prefill and after every step. ValueError, before anything is computed, for a prompt or a setting that
    cannot be run.
    """
    options = Options(policy=policy, **settings)
    prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    check_run(model.config, prompts, options)
    engine = Engine(model, options, tokenizer.stop_ids, shape_of(prompts, options))
    return run(engine, tokenizer, prompts, on_text or ignore, on_step or ignore)


def ignore(*seen) -> None:
    """Where nobody listens."""


def check_run(config: ModelConfig, prompts: list[list[int]], options: Options) -> None:
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    limit, what = limit_of(config)
    require(options.max_context <= limit, "max_context", options.max_context, f"at most the model's {limit} {what}")
    for i, ids in enumerate(prompts):
        check_ids(config, f"prompt {i}", ids)
        check_length(config, f"prompt {i} has {len(ids)} tokens", len(ids) + options.max_new_tokens, options)


def check_ids(config: ModelConfig, name: str, ids: list[int]) -> None:
    if not ids:
        raise ValueError(f"{name} is empty: give it at least one token")
    wrong = [x for x in ids if type(x) is not int or not 0 <= x < config.vocab_size]
    if wrong:
        raise ValueError(f"{name} has token id {wrong[0]!r}: the vocabulary is 0 to {config.vocab_size - 1}")


def check_length(config: ModelConfig, prompt: str, total: int, options: Options) -> None:
    limit, what = limit_of(config)
    if total > limit:
        more = f"{prompt} and {options.max_new_tokens} may follow: {total} are more than the model's {limit} {what}"
        raise ValueError(f"{more}; lower --max-new-tokens or shorten the prompt")


def limit_of(config: ModelConfig) -> tuple[int, str]:
    """Tokens that the model can be right about, and what limits them."""
    limits = [(config.max_positions, "positions")]
    return min(limits + [(config.sliding_window, "tokens of sliding window")] * bool(config.sliding_window))


def shape_of(prompts: list[list[int]], options: Options) -> Shape:
    """Of the one cache that all batches of a run share."""
    lengths = sorted({len(ids) for ids in prompts})
    return Shape(min(options.batch_size, len(prompts)), lengths, options.max_new_tokens, options.max_context)


def run(engine: "Engine", tokenizer: "Tokenizer", prompts: list[list[int]], on_text, on_step) -> Iterator[Result]:
    size = engine.shape.batch
    for first in range(0, len(prompts), size):
        rows = [Row(first + i, ids, TextStream(tokenizer)) for i, ids in enumerate(prompts[first : first + size])]
        try:
            run_batch(engine, rows, on_text, on_step)
        except KeyboardInterrupt:  # rows that are complete are not lost
            if stopped := [row for row in rows if row.stopped]:
                stats = engine.stats(rows)
                yield from (row.result(tokenizer, stats) for row in stopped)
            raise
        stats = engine.stats(rows)
        yield from (row.result(tokenizer, stats) for row in rows)


READ_EVERY = {"cpu": 1, "cuda": 8}  # steps; a GPU runs ahead of the host, and each read makes it wait


def run_batch(engine: "Engine", rows: list["Row"], on_text, on_step) -> None:
    """Prefill, then decode until every row has stopped or has its most tokens."""
    first = engine.prefill(rows)
    on_step(engine.cache)
    decode_rows(engine, rows, first, READ_EVERY[engine.device.type], on_text, on_step)


def decode_rows(engine: "Engine", rows: list["Row"], first: Tensor, read_every: int, on_text, on_step) -> None:
    """first: the token that prefill gave to each row; read_every: steps between two looks at what has stopped."""
    engine.begin_decode()
    unread = [first]
    for t in range(1, engine.options.max_new_tokens):
        if len(unread) == read_every:
            deliver(engine, rows, unread, on_text)
            unread.clear()
            if all(row.stopped for row in rows):
                return
        unread.append(engine.decode(t))
        on_step(engine.cache)
    deliver(engine, rows, unread, on_text)
    for row in rows:
        on_text(row.index, row.stream.push([], last=True))


def deliver(engine: "Engine", rows: list["Row"], unread: list[Tensor], on_text) -> None:
    """The one place where the host waits for the device: some steps' tokens and the stop flags, in one copy."""
    *steps, stopped = torch.stack([*unread, engine.stopped.long()]).tolist()
    for i, row in enumerate(rows):
        if text := row.take([step[i] for step in steps if step[i] >= 0], bool(stopped[i])):
            on_text(row.index, text)


@dataclass
class Row:
    """One prompt of a running batch, on the host's side."""

    index: int
    prompt: list[int]
    stream: "TextStream"
    tokens: list[int] = field(default_factory=list)  # generated, a stop token included
    stopped: bool = False

    def take(self, new: list[int], stopped: bool) -> str:
        """New tokens, a stop token included -> the text that they complete."""
        self.tokens += new
        ended, self.stopped = stopped and not self.stopped, stopped
        return self.stream.push(new[:-1] if ended else new, last=ended)

    def result(self, tokenizer: "Tokenizer", stats: Stats) -> Result:
        text = tokenizer.decode(self.tokens[:-1] if self.stopped else self.tokens)
        reason = "stop" if self.stopped else "length"
        return Result(self.index, len(self.prompt), self.tokens, text, reason, stats)


# ---- the engine -------------------------------------------------------------------------------------------

# Two graphs per policy and shape. A process that sweeps many is no accident, which torch's default of 8 takes it for.
torch._dynamo.config.recompile_limit = 64

# Store what feeds a sum of products, however short, instead of computing it again for each of the sum's rows: the
# default recomputes the norm before a linear layer once per output channel (5.5 against 3.4 ms a step).
CPU_OPTIONS = {"realize_reads_threshold": 1, "realize_opcount_threshold": 6}


def decode_step(
    model: Llama,
    cache: Cache,
    sampler: "Sampler",
    now: Now,
    select: bool,
    token: Tensor,
    noise: Tensor,
    stopped: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Feed token [B], choose the next. This is what gets compiled: one graph for append, one for select steps."""
    attends = cache.selects(now) if select else cache.appends(now)
    hidden = model(token[:, None], now.position[:, None], attends)
    return sampler(model.logits(hidden[:, -1]), noise, stopped)


class Engine:
    """One model and one cache; runs batch after batch of prompts through the same buffers and graphs."""

    def __init__(self, model: Llama, options: Options, stop_ids: list[int], shape: Shape):
        self.model, self.options, self.shape = model, options, shape
        self.device = model.embed.weight.device
        self.cache = self.allocate(*options.rules(), shape, self.device)
        self.sampler = Sampler(options, stop_ids).to(self.device)
        self.step = decode_step
        self.compile_s = self.compile() if options.compile else 0.0

    def allocate(self, policy: Policy, prompt: Prompt, shape: Shape, device) -> Cache:
        try:
            with torch.device(device):
                return Cache(self.model.config, policy, prompt, shape, self.model.embed.weight.dtype)
        except RuntimeError as error:  # torch's out-of-memory errors, CPU and CUDA
            raise ValueError(f"the KV cache does not fit: {one_line(error)[:120]}; lower --batch-size") from error

    @torch.inference_mode()
    def compile(self) -> float:
        """Compile both graphs on the empty cache, so that no step of a run waits for it. Returns seconds."""
        check_compiler(self.device)
        began = time.perf_counter()
        on_gpu = self.device.type == "cuda"
        how = {"mode": "reduce-overhead"} if on_gpu else {"options": CPU_OPTIONS}
        self.step = torch.compile(decode_step, fullgraph=True, dynamic=False, **how)
        for graph in sorted(set(self.cache.graph_at)):
            log.info("compiling the %s graph for %d decode slots ...", "select" if graph[0] else "append", graph[1])
            for _ in range(3 if on_gpu else 1):  # CUDA graphs: warm up, record, replay
                self.begin([0] * self.shape.batch)
                self.decode(1, graph)
        self.wait()
        return time.perf_counter() - began

    def begin(self, indexes: list[int]) -> None:
        """Forget the batch before."""
        self.cache.reset()
        self.begin_turn(indexes)

    @torch.inference_mode()
    def begin_turn(self, indexes: list[int]) -> None:
        """The sampling noise of a row depends on the seed and its prompt's index alone."""
        self.noise = draw_noise(self.options, indexes).to(self.device)
        self.token = torch.zeros(len(indexes), dtype=torch.int64, device=self.device)
        self.stopped = torch.zeros(len(indexes), dtype=torch.bool, device=self.device)
        self.steps = 0

    @torch.inference_mode()
    def prefill(self, rows: list[Row]) -> Tensor:
        """Read the prompts as one right-padded block; returns each row's first token [B].

        A batch shorter than the cache fills up with copies of its last row.
        """
        began = time.perf_counter()
        rows = rows + rows[-1:] * (self.shape.batch - len(rows))
        self.begin([row.index for row in rows])
        width = max(len(row.prompt) for row in rows)
        block = torch.tensor([row.prompt + [0] * (width - len(row.prompt)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row.prompt) for row in rows], device=self.device)
        positions = torch.arange(width, device=self.device).expand_as(block)
        hidden = self.model(block, positions, self.cache.fills(lengths.tolist()))
        last = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        return self.first_tokens(last, began)

    @torch.inference_mode()
    def extend(self, turn: int, ids: list[int]) -> Tensor:
        """Read a later turn of a conversation on top of everything live; returns its first token [1]."""
        began = time.perf_counter()
        self.begin_turn([turn])
        positions, attends = self.cache.joins(len(ids))
        hidden = self.model(torch.tensor([ids], device=self.device), positions, attends)
        self.cache.count()
        return self.first_tokens(hidden[:, -1], began)

    def first_tokens(self, hidden: Tensor, began: float) -> Tensor:
        """hidden [B, hidden] of the last token that each row has read."""
        self.token, shown, self.stopped = self.sampler(self.model.logits(hidden), self.noise[0], self.stopped)
        self.wait()
        self.prefill_s = time.perf_counter() - began
        return shown

    def begin_decode(self) -> None:
        self.prompt_live = self.cache.kept.float().mean(0).amax().item()
        self.decode_began = time.perf_counter()

    @torch.inference_mode()
    def decode(self, t: int, graph: tuple[bool, int] | None = None) -> Tensor:
        """Step t, 1-based; returns the tokens to show [B], -1 where a row had stopped. The schedule picks the graph."""
        select, reads = graph or self.cache.graph_at[t - 1]
        now, noise = self.cache.now(t, reads), self.noise[t % len(self.noise)]
        step = self.step(self.model, self.cache, self.sampler, now, select, self.token, noise, self.stopped)
        self.token, shown, self.stopped = (x.clone() for x in step)  # CUDA graphs reuse the memory of their results
        self.steps = t
        return shown

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def stats(self, rows: list[Row]) -> Stats:
        """The figures of the batch that has just been decoded."""
        self.wait()
        decode_s = time.perf_counter() - self.decode_began
        full = Shape(self.shape.batch, [*self.shape.lengths, self.shape.prompt_slots], self.shape.T)
        prompt_slots, decode_slots = (round(sum(n) / len(n)) for n in self.cache.slots)
        return Stats(
            **settings_in_stats(self.options),
            steps=self.steps,
            prompt_slots=prompt_slots,
            decode_slots=decode_slots,
            live_peak=self.prompt_live + self.cache.decode_peak(self.steps),
            kv_bytes=self.cache.nbytes,
            kv_bytes_full=self.allocate(FULL, WHOLE, full, "meta").nbytes,
            prefill_s=self.prefill_s,
            compile_s=self.compile_s,
            decode_s=decode_s,
            tokens_per_s=sum(len(row.tokens) - 1 for row in rows) / decode_s,
        )


def settings_in_stats(options: Options) -> dict:
    names = {entry.name for entry in fields(Stats)}
    return {name: value for name, value in asdict(options).items() if name in names}


def check_compiler(device: torch.device) -> None:
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ValueError("torch.compile finds no C++ compiler here: install g++, or run with --no-compile") from error


# ---- conversations ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moment:
    """All that `Conversation.rewind` puts back."""

    cache: Mark
    turn: int
    block: list[int]
    unread: list[int]
    first: tuple[Tensor, Tensor] | None


class Conversation:
    """One context, read once, and any number of turns that follow it or of requests that are rewound.

    What is read stays for good, but for what --compress takes of the context. Of an answer stays what the policy has
    left of it when the next turn is read; every turn has a decode budget and a T of its own. Requests over one
    context run one after the other. ValueError, before anything is computed, for what cannot be run.
    """

    def __init__(
        self, model: Llama, tokenizer: "Tokenizer", context: str | list[int], policy: str = Options.policy, **settings
    ):
        options = Options(policy=policy, **settings)
        slots = options.max_context or min(4096, limit_of(model.config)[0])
        self.tokenizer, self.options = tokenizer, replace(options, max_context=slots)
        ids = tokenizer.encode(context) if isinstance(context, str) else context
        check_run(model.config, [ids], self.options)
        self.engine = Engine(model, self.options, tokenizer.stop_ids, shape_of([ids], self.options))
        self.turn, self.block = 0, ids  # what was read last
        self.unread: list[int] = []  # the last token of an answer, until the next turn
        self.moments: list[Moment] = []
        self.begin(self.engine.prefill([Row(0, ids, None)]))

    def begin(self, first: Tensor) -> None:
        """first [1]: the token that an answer now would begin with."""
        self.first = first, self.engine.stopped
        self.end = self.engine.cache.position

    def read(self, turn: str | list[int]) -> None:
        """What a user says next, or one more piece of it."""
        ids = self.tokenizer.encode_after(turn) if isinstance(turn, str) else turn
        check_ids(self.engine.model.config, f"turn {self.turn}", ids)
        ids = self.unread + ids
        self.check_room(len(ids))
        end = self.end + len(ids)
        total = end + self.options.max_new_tokens
        check_length(self.engine.model.config, f"turn {self.turn} ends at token {end}", total, self.options)
        self.engine.cache.settle(self.engine.steps, self.end)
        self.block, self.unread = ids, []
        self.begin(self.engine.extend(self.turn, ids))

    def check_room(self, n: int) -> None:
        room = self.engine.cache.room(self.engine.steps)
        if n > room:
            have = f"{max(room, 0)} of max_context {self.options.max_context} are left"
            raise ValueError(f"turn {self.turn} needs {n} slots, {have}: raise --max-context or begin anew")

    def answer(self, on_text=ignore, on_step=ignore) -> Result:
        """Decode until a stop token or max_new_tokens; on_text and on_step as in `generate`."""
        if self.first is None:
            raise ValueError(f"turn {self.turn} has nothing to answer: read something first")
        row, (first, _) = Row(self.turn, self.block, TextStream(self.tokenizer)), self.first
        self.first = None  # of an interrupted answer nothing stays
        # A device that ran ahead of the stop token would evict what a later turn could still have used.
        decode_rows(self.engine, [row], first, 1, on_text, on_step)
        self.turn, self.unread = self.turn + 1, row.tokens[-1:]
        self.end += len(row.tokens) - 1
        return row.result(self.tokenizer, self.engine.stats([row]))

    def mark(self) -> Moment:
        """Now, to come back to; what is left of an answer stays for good."""
        self.check_room(len(self.unread))
        self.engine.cache.settle(self.engine.steps, self.end)
        self.engine.steps = 0
        self.moments.append(Moment(self.engine.cache.mark(), self.turn, self.block, self.unread, self.first))
        return self.moments[-1]

    def rewind(self, moment: Moment) -> None:
        """Forget what came after: no prefill, no buffer allocated, a few small operations per layer. An answer then
        samples as it did the first time."""
        if moment not in self.moments:
            raise ValueError("this moment is forgotten: an earlier one was rewound to, or it is another conversation's")
        del self.moments[self.moments.index(moment) + 1 :]
        self.engine.cache.rewind(moment.cache)
        self.turn, self.block, self.unread, self.first = moment.turn, moment.block, moment.unread, moment.first
        self.end = moment.cache.position
        self.engine.begin_turn([self.turn])
        self.engine.prefill_s = 0.0
        if self.first:
            self.engine.token, self.engine.stopped = self.first


def without_stop(tokenizer: "Tokenizer", ids: list[int], answer: Result) -> list[int]:
    """What a template puts after an answer, without the stop token that the model has written itself."""
    stop = answer.token_ids[-1]
    if answer.finish_reason != "stop" or stop not in ids:
        return ids
    first = ids.index(stop)
    return ids if tokenizer.decode(ids[:first]).strip() else ids[first + 1 :]


# ---- sampling ---------------------------------------------------------------------------------------------


class Sampler(nn.Module):
    """Chooses each row's next token and notes which rows have stopped: on the device, in the compiled step."""

    def __init__(self, options: Options, stop_ids: list[int]):
        super().__init__()
        self.temperature, self.top_k, self.top_p = options.temperature, options.top_k, options.top_p
        stop_ids = [] if options.ignore_eos else stop_ids
        self.register_buffer("stop_ids", torch.tensor(stop_ids, dtype=torch.int64))

    def forward(self, logits: Tensor, noise: Tensor, stopped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits [B, vocab], noise and stopped [B] -> the token to feed next, the same or -1 if stopped, stopped."""
        token = self.sample(logits, noise)
        return token, torch.where(stopped, -1, token), stopped | torch.isin(token, self.stop_ids)

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """The token at which the cumulative probability of the likeliest ones passes the noise, uniform in [0, 1)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        vocab = logits.shape[-1]
        top, ids = (logits / self.temperature).topk(min(self.top_k or vocab, vocab))  # sorted
        prob = top.softmax(-1)
        prob = torch.where(prob.cumsum(-1) - prob < self.top_p, prob, 0)  # the token that crosses top_p stays
        edges = prob.cumsum(-1)
        choice = (edges <= noise[:, None] * edges[:, -1:]).sum(-1, keepdim=True)
        return ids.gather(-1, choice.clamp(max=ids.shape[-1] - 1)).squeeze(-1)


def draw_noise(options: Options, indexes: list[int]) -> Tensor:
    """[T, B] uniform numbers, one for each token. Drawn before the run, so that no graph holds a random state."""
    if options.temperature == 0:
        return torch.zeros(options.max_new_tokens, len(indexes), device="cpu")
    seeds = [(options.seed * 1_000_003 + index) % 2**63 for index in indexes]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(options.max_new_tokens, generator=g, device="cpu") for g in generators], dim=1)


# ---- loading ----------------------------------------------------------------------------------------------

HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
             "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip


def load(checkpoint: str = Options.checkpoint, device: str = Options.device, dtype: str = Options.dtype):
    """Checkpoint directory or hub id -> (Llama, Tokenizer). ValueError says in one line what is wrong with it."""
    device = find_device(device)
    folder = find_checkpoint(str(checkpoint))
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder / "config.json")
    tokenizer = load_tokenizer(folder, raw, config.vocab_size)
    model = load_model(folder, config, device, find_dtype(dtype, raw))
    return model, tokenizer


def find_device(name: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    there = ["cpu"] + ["cuda"] * cuda + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    require(name in there, "device", repr(name), "one that is here: " + ", ".join(there))
    return torch.device(name)


def find_dtype(name: str, raw: dict) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"  # transformers 5, transformers 4
    name = stored if name == "auto" else name
    require(isinstance(name, str) and name in known, "dtype", repr(name), "one of " + ", ".join(known))
    return known[name]


def find_checkpoint(name: str) -> Path:
    """The directory of a checkpoint; a hub id is downloaded into the hub's own cache first."""
    if name == Options.checkpoint:
        return MINI
    if name and Path(name).is_dir():
        return Path(name)
    if name and Path(name).exists():
        raise ValueError(f"checkpoint {name} is a file: give the directory that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"checkpoint {name}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download  # here, so that a local checkpoint does not wait for it

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # no network, no login, no such repository, a full disk: they share no base class
        raise ValueError(f"checkpoint {name}: no such directory, and the hub says: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a checkpoint in Hugging Face format has it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:1: a JSON object is expected, not {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


class Fields:
    """A JSON object whose values are checked as they are read; ValueError names file, field, value and remedy."""

    def __init__(self, values: dict, path: Path):
        self.values, self.path = values, path

    def take(self, name: str, default, holds, wanted: str):
        value = default if self.values.get(name) is None else self.values[name]
        if not holds(value):
            raise ValueError(f"{self.path}: {name} is {json.dumps(value)[:80]}: {wanted} is needed")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        return self.take(name, default, lambda x: type(x) is int and x > 0, "a whole number above 0")

    def number(self, name: str, default: float | None = None) -> float:
        return self.take(name, default, lambda x: type(x) in (int, float) and 0 < x < math.inf, "a number above 0")

    def flag(self, name: str) -> bool:
        return self.take(name, False, lambda x: type(x) is bool, "true or false")

    def only(self, name: str, default, *known) -> None:
        self.take(
            name, default, lambda x: x in known, " or ".join(map(json.dumps, known)) + " (nothing else is supported)"
        )


def parse_config(raw: dict, path: Path) -> ModelConfig:
    """Hugging Face's config.json, spelled as transformers 4 or 5 do. ValueError names the field not supported."""
    given = Fields(raw, path)
    given.only("architectures", None, ["LlamaForCausalLM"], ["MistralForCausalLM"])
    given.only("quantization_config", None, None)
    given.only("hidden_act", "silu", "silu")
    given.only("partial_rotary_factor", 1.0, 1.0)
    n_heads = given.size("num_attention_heads")
    rope = parse_rope(given)
    config = ModelConfig(
        vocab_size=given.size("vocab_size"),
        hidden_size=given.size("hidden_size"),
        intermediate_size=given.size("intermediate_size"),
        n_layers=given.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=given.size("num_key_value_heads", n_heads),
        head_dim=given.size("head_dim", given.size("hidden_size") // n_heads),
        norm_eps=given.number("rms_norm_eps", 1e-6),
        max_positions=given.size("max_position_embeddings", 2048),
        sliding_window=given.size("sliding_window") if raw.get("sliding_window") is not None else None,
        rope_theta=rope.number("rope_theta", given.number("rope_theta", 10000.0)),
        rope_scaling=rope.values,
        tie_embeddings=given.flag("tie_word_embeddings"),
        attention_bias=given.flag("attention_bias"),
        mlp_bias=given.flag("mlp_bias"),
    )
    if config.head_dim % 2:
        raise ValueError(f"{path}: head_dim is {config.head_dim}: an even number is needed, RoPE turns pairs")
    if config.n_heads % config.n_kv_heads:
        raise ValueError(f"{path}: num_key_value_heads is {config.n_kv_heads}: a divisor of {config.n_heads} is needed")
    return config


def parse_rope(config: Fields) -> Fields:
    """transformers 5 says rope_parameters, 4 rope_scaling; the numbers that the rope type needs are checked."""
    name = "rope_parameters" if config.values.get("rope_parameters") else "rope_scaling"
    rope = Fields(config.take(name, {}, lambda x: isinstance(x, dict), "an object"), config.path)
    kind = rope.take("type", "default", lambda x: isinstance(x, str), "a word")
    rope.values = {"rope_type": kind} | rope.values
    rope.take(
        "rope_type", None, lambda x: x in list(ROPE_SCALINGS), " or ".join(ROPE_SCALINGS) + " (no other is implemented)"
    )
    _, needs = ROPE_SCALINGS[rope.values["rope_type"]]
    numbers = {need: rope.number(need) for need in needs}
    low, high = numbers.get("low_freq_factor", 0), numbers.get("high_freq_factor", 1)
    if low >= high:
        raise ValueError(f"{config.path}: low_freq_factor is {low}: it must be below high_freq_factor, which is {high}")
    return rope


def load_model(folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Llama:
    with torch.device("meta"):  # shapes only: no memory is taken twice
        model = Llama(config)
    stored = open_weights(folder)
    expected = {name: sources(name, tensor.shape, config) for name, tensor in model.state_dict().items()}
    check_names(stored, [source for parts in expected.values() for source, _ in parts], folder, config)
    weights = {}
    for name, parts in expected.items():
        tensors = [read_weight(stored[source], source, shape, dtype) for source, shape in parts]
        weights[name] = torch.cat(tensors).to(device) if len(tensors) > 1 else tensors[0].to(device)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.to(device).eval().requires_grad_(False)


def read_weight_map(index: Path) -> set[str]:
    """The files of a sharded checkpoint: beside their index, and nowhere else on this machine."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(
            f"{index}: weight_map is {json.dumps(where)[:80]}: an object of tensor and file names is needed"
        )
    for file in where.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: weight_map names {json.dumps(file)}: a file beside the index is needed")
    return set(where.values())


def open_weights(folder: Path) -> dict:
    """Tensor name -> the open safetensors file that holds it. Nothing but safetensors is ever read."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in read_weight_map(index)})
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(list(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth"))
        why = "only pickled weights, which can run code: convert them to safetensors" if pickled else "no *.safetensors"
        raise ValueError(f"checkpoint {folder} has {why}")
    stored = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except FileNotFoundError:
            raise ValueError(f"{file} is missing: the checkpoint is incomplete, download it again") from None
        except (SafetensorError, OSError) as error:
            why = f"{one_line(error)}; download it again (a Git LFS pointer: git lfs pull)"
            raise ValueError(f"{file} is truncated or no safetensors file: {why}") from None
        stored.update(dict.fromkeys(handle.keys(), handle))
    return stored


HF_NAMES = {
    "embed": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "head": ["lm_head"],
    "attention_norm": ["input_layernorm"],
    "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.wo": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.w_gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.w_down": ["mlp.down_proj"],
}


def sources(name: str, shape: torch.Size, config: ModelConfig) -> list[tuple[str, tuple]]:
    """One of our parameters -> Hugging Face's names and shapes of the pieces that are stacked into it."""
    module, kind = name.rsplit(".", 1)
    layer = re.match(r"layers\.\d+\.", module)
    prefix, module = (f"model.{layer[0]}", module[layer.end() :]) if layer else ("", module)
    if name == "head.weight" and config.tie_embeddings:
        module = "embed"
    parts = HF_NAMES[module]
    rows = [shape[0] // len(parts)] * len(parts)
    if module == "attention.wqkv":
        rows = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    return [(f"{prefix}{part}.{kind}", (n, *shape[1:])) for part, n in zip(parts, rows, strict=True)]


def check_names(stored: dict, expected: list[str], folder: Path, config: ModelConfig) -> None:
    missing = [name for name in expected if name not in stored]
    ignored = ["lm_head.weight"] if config.tie_embeddings else []
    extra = [n for n in stored if n not in set(expected) | set(ignored) and not n.endswith("rotary_emb.inv_freq")]
    for names, verdict in ((missing, "lacks"), (extra, "has what its config does not name:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"checkpoint {folder} {verdict} tensor {names[0]}{more}")


def read_weight(handle, name: str, shape: tuple, dtype: torch.dtype) -> Tensor:
    stored = tuple(handle.get_slice(name).get_shape())
    if stored != shape:
        raise ValueError(f"tensor {name} is {list(stored)}, but config.json makes it {list(shape)}")
    tensor = handle.get_tensor(name)
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"tensor {name} holds {tensor.dtype}: quantised weights are not supported")
    return tensor.to(dtype)


# ---- tokenizing -------------------------------------------------------------------------------------------


class SentencePiece:
    """tokenizer.model. Special tokens in a text become their ids, as transformers does it."""

    def __init__(self, path: Path, settings: dict):
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_file=str(path))
        pieces = range(self.processor.vocab_size())
        self.special = {self.processor.id_to_piece(i): i for i in pieces if self.processor.is_control(i)}
        added = settings.get("added_tokens_decoder", {})
        self.special |= {token["content"]: int(i) for i, token in added.items()}
        self.eos_id = self.processor.eos_id()
        self.bos = [self.processor.bos_id()] if settings.get("add_bos_token", True) else []
        self.vocab_size = max([len(pieces), *(i + 1 for i in self.special.values())])

    def encode(self, text: str, bos: bool) -> list[int]:
        pattern = "|".join(re.escape(piece) for piece in sorted(self.special, key=len, reverse=True))
        ids = [i for i in self.bos if bos and i >= 0]
        for part in re.split(f"({pattern})", text) if pattern else [text]:
            ids += [self.special[part]] if part in self.special else self.processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        special = set(self.special.values())
        return self.processor.decode([i for i in ids if i not in special and i < self.processor.vocab_size()])

    def id_of(self, piece: str) -> int | None:
        return self.special.get(piece)


class FastTokenizer:
    """tokenizer.json, through the tokenizers library: Llama 3 ships no sentencepiece model."""

    def __init__(self, path: Path, settings: dict):
        from tokenizers import Tokenizer as Backend

        self.backend = Backend.from_file(str(path))
        self.backend.no_padding()
        self.backend.no_truncation()
        self.vocab_size = self.backend.get_vocab_size()
        self.eos_id = -1  # tokenizer.json does not say which token it is

    def encode(self, text: str, bos: bool) -> list[int]:
        return self.backend.encode(text, add_special_tokens=bos).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def id_of(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)


@dataclass
class Tokenizer:
    """A backend, the ids that end a text, and the chat template if the checkpoint has one."""

    backend: SentencePiece | FastTokenizer
    stop_ids: list[int]
    special: dict  # bos_token, eos_token as text, for the chat template
    template: str | None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {text[:40]!a} is no text: {one_line(error)}") from None
        return self.backend.encode(text, bos)

    def encode_after(self, text: str) -> list[int]:
        """The ids of a text that goes on where another one ends: no bos, and not the space that sentencepiece puts
        before a first word. The line break that keeps it away is taken off again, unless it merges with the text."""
        start, both = self.encode("\n", bos=False), self.encode("\n" + text, bos=False)
        return both[len(start) :] if both[: len(start)] == start else self.encode(text, bos=False)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def chat(self, messages: list[dict]) -> list[int]:
        """A conversation -> prompt ids."""
        return self.encode(self.render(messages), bos=False)  # the template writes its own bos

    def render(self, messages: list[dict]) -> str:
        """A conversation as text, by the checkpoint's own template in jinja2's sandbox."""
        if self.template is None:
            raise ValueError("this checkpoint has no chat template: run it without --chat")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str):
            raise TemplateError(message)

        jinja = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        jinja.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        jinja.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        try:
            template = jinja.from_string(self.template)
            return template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self.special
            )
        except Exception as error:  # a template is a program: it may fail in any way a program does
            raise ValueError(f"the chat template fails: {one_line(error)}") from error


def load_tokenizer(folder: Path, raw_config: dict, vocab_size: int) -> Tokenizer:
    settings = read_optional_json(folder / "tokenizer_config.json")
    if not isinstance(settings.get("added_tokens_decoder", {}), dict):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is no object")
    backend = load_backend(folder, settings)
    if backend.vocab_size > vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {backend.vocab_size} tokens, the model only {vocab_size}")
    special = {name: text_of(settings.get(name), name, folder) for name in ("bos_token", "eos_token")}
    stops = read_optional_json(folder / "generation_config.json").get("eos_token_id", raw_config.get("eos_token_id"))
    stops = stops if isinstance(stops, list) else [stops]
    wrong = [stop for stop in stops if stop is not None and type(stop) is not int]
    if wrong:
        raise ValueError(f"{folder}: eos_token_id has {json.dumps(wrong[0])}: a token id or a list of them is needed")
    stops = {*stops, backend.id_of(special["eos_token"]), backend.eos_id} - {None, -1}
    return Tokenizer(backend, sorted(stops), special, read_template(folder, settings))


def load_backend(folder: Path, settings: dict) -> SentencePiece | FastTokenizer:
    """tokenizer.json first: where both are there, it is the one that knows the chat tokens."""
    for name, backend in (("tokenizer.json", FastTokenizer), ("tokenizer.model", SentencePiece)):
        if (folder / name).exists():
            try:
                return backend(folder / name, settings)
            except Exception as error:  # both libraries raise bare Exception or RuntimeError for a broken file
                raise ValueError(f"{folder / name} cannot be read: {one_line(error)}") from error
    raise ValueError(f"checkpoint {folder} has no tokenizer.json and no tokenizer.model")


def text_of(token: str | dict | None, name: str, folder: Path) -> str:
    text = token.get("content") if isinstance(token, dict) else token or ""
    if not isinstance(text, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: {name} is {json.dumps(token)}: a text is needed")
    return text


def read_template(folder: Path, settings: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) and "name" in entry for entry in template):
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is no text and no list of named texts")
    return template


class TextStream:
    """Token ids in, text out as soon as it is whole: a character split over tokens waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer):
        self.decode = tokenizer.decode
        self.ids: list[int] = []
        self.start = self.shown = 0  # ids[start:shown] is context whose text is out already

    def push(self, ids: list[int], last: bool = False) -> str:
        self.ids += ids
        old, new = self.decode(self.ids[self.start : self.shown]), self.decode(self.ids[self.start :])
        if (new == old or new.endswith("\ufffd")) and not last:
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return new[len(old) :]


# ---- the command line -------------------------------------------------------------------------------------


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line, as for every other mistake; argparse would print the usage first
        raise ValueError(f"{message} (see --help)")


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a mistake, said in one line before anything was computed; 130: interrupted."""
    log.setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        arguments = parse_arguments(argv)
        converses = arguments.chat and arguments.prompt_file is None and not arguments.stdin
        return (converse if converses else answer)(arguments)
    except BrokenPipeError:  # whoever read our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        note(f"generate.py: error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        note("\ninterrupted")
        return 130


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "generate.py", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    source = parser.add_argument_group("what to continue (default: the bundled model's demo prompt)")
    source.add_argument("stdin", nargs="?", choices=["-"], help="read one prompt from standard input")
    source.add_argument("--prompt", metavar="TEXT", help="one prompt")
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='.txt: one prompt; .jsonl: a {"prompt": TEXT} or {"prompt_ids": [...]} per line',
    )
    source.add_argument(
        "--chat", action="store_true", help="apply the chat template; without a prompt, hold a conversation"
    )
    result = parser.add_argument_group("where the results go (generated text: standard output)")
    result.add_argument("--output", metavar="FILE.jsonl", help="one line per prompt: token ids, text, statistics")
    result.add_argument(
        "--trace", metavar="FILE.npz", help="the positions held by every slot after every step; for small runs"
    )
    settings = parser.add_argument_group("settings")
    for entry in fields(Options):
        add_option(settings, entry.name, entry.default, dict(entry.metadata))
    arguments = parser.parse_args(argv)
    if sum(given is not None for given in (arguments.stdin, arguments.prompt, arguments.prompt_file)) > 1:
        raise ValueError("give one of --prompt, --prompt-file and -, not several")
    return arguments


def add_option(group, name: str, default, argument: dict) -> None:
    flag = "--" + name.replace("_", "-")
    if default is True:
        group.add_argument(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, **argument)
    elif default is False:
        group.add_argument(flag, action="store_true", **argument)
    else:
        group.add_argument(flag, type=type(default), default=default, **argument)


def options_of(arguments: argparse.Namespace) -> Options:
    return Options(**{entry.name: getattr(arguments, entry.name, entry.default) for entry in fields(Options)})


def read_prompts(arguments: argparse.Namespace) -> list:
    """Texts, or lists of token ids, from whichever source the command line names."""
    if arguments.prompt is not None:
        return [arguments.prompt]
    if arguments.stdin:
        return [sys.stdin.read()]
    if arguments.prompt_file is None and arguments.checkpoint != Options.checkpoint:
        raise ValueError("there is no prompt: give --prompt TEXT, --prompt-file FILE, or - for standard input")
    path = Path(arguments.prompt_file or MINI / "demo.txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {path} cannot be read: {one_line(error)}") from None
    if arguments.prompt_file is None:
        note("\n" + text)  # the demo shows what it answers
    if path.suffix != ".jsonl":
        return [text]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [parse_prompt(line, f"{path}:{number}") for number, line in lines]


def parse_prompt(line: str, where: str) -> str | list[int]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON: {error.msg}") from None
    if isinstance(row, dict) and {"prompt", "prompt_ids"} <= row.keys():
        raise ValueError(f"{where}: give prompt or prompt_ids, not both")
    prompt = row.get("prompt", row.get("prompt_ids")) if isinstance(row, dict) else None
    if not isinstance(prompt, list if isinstance(row, dict) and "prompt" not in row else str):
        raise ValueError(f'{where}: one {{"prompt": TEXT}} or {{"prompt_ids": [ID, ...]}} is expected')
    return prompt


def check_writable(arguments: argparse.Namespace) -> None:
    """Refuse an --output or --trace that could not be written, before a long run finds out."""
    given = {name: Path(path) for name in ("output", "trace") if (path := getattr(arguments, name)) is not None}
    for name, path in given.items():
        if not getattr(arguments, name):
            raise ValueError(f"--{name} is empty: give a file")
        if path.is_dir():
            raise ValueError(f"--{name} {path} is a directory: give a file")
        if not path.parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no directory {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"--{name} {path} cannot be written: no permission")
    sources = [Path(arguments.prompt_file)] if arguments.prompt_file else []
    paths = [path.resolve() for path in [*given.values(), *sources]]
    if len(set(paths)) < len(paths):
        raise ValueError("--output, --trace and --prompt-file name the same file: give each its own")


def load_aloud(options: Options) -> tuple[Llama, Tokenizer]:
    log.info("loading %s", options.checkpoint)
    return load(options.checkpoint, options.device, options.dtype)


def answer(arguments: argparse.Namespace) -> int:
    """One run over the given prompts: text to standard output, rows to --output, a summary to standard error."""
    options = options_of(arguments)
    prompts = read_prompts(arguments)
    check_writable(arguments)
    model, tokenizer = load_aloud(options)
    if arguments.chat:
        prompts = [tokenizer.chat([{"role": "user", "content": p}]) if isinstance(p, str) else p for p in prompts]
    prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    check_run(model.config, prompts, options)
    trace = Trace(arguments.trace, options, model, prompts) if arguments.trace else None
    printer = Printer()
    results = generate(model, tokenizer, prompts, **asdict(options), on_text=printer.text, on_step=trace)
    batches: dict[int, Stats] = {}
    with open(arguments.output or os.devnull, "w", encoding="utf-8") as output:
        for result in results:
            printer.end(result.index)
            write_row(output, result)
            batches[id(result.stats)] = result.stats
    if trace:
        trace.save()
    note(summary(list(batches.values())))
    return 0


def write_row(output, result: Result) -> None:
    print(json.dumps(asdict(result), ensure_ascii=False), file=output, flush=True)


def converse(arguments: argparse.Namespace) -> int:
    """A conversation, one line a turn, until the end of input."""
    options = options_of(arguments)
    if arguments.trace:
        raise ValueError("--trace records one run: with --chat, give the prompt with --prompt-file")
    check_writable(arguments)
    model, tokenizer = load_aloud(options)
    tokenizer.chat([{"role": "user", "content": ""}])  # refuses now if there is no template
    chat = Chat(model, tokenizer, options)
    with open(arguments.output or os.devnull, "w", encoding="utf-8") as output:
        for number, text in enumerate(turns(arguments.prompt)):
            result = chat.reply(text)
            write_row(output, replace(result, index=number))
            note(summary([result.stats]))
    return 0


def turns(first: str | None) -> Iterator[str]:
    """The user's side of a conversation. A --prompt is its first turn, and the only one without a terminal."""
    if first is not None:
        yield first
        if not sys.stdin.isatty():
            return
    while True:
        try:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            yield input()
        except EOFError:
            return


class Chat:
    """A conversation in the words of the checkpoint's template, of which every turn reads only what is new."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, options: Options):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.messages: list[dict] = []
        self.text = ""  # what the template has made of all messages so far
        self.conversation: Conversation | None = None

    def reply(self, text: str) -> Result:
        self.messages.append({"role": "user", "content": text})
        before, self.text = self.text, self.tokenizer.render(self.messages)
        new = self.new_ids(before)
        if new is None:
            ids, self.conversation = self.tokenizer.encode(self.text, bos=False), None  # frees its cache first
            self.conversation = Conversation(self.model, self.tokenizer, ids, **asdict(self.options))
        else:
            self.conversation.read(new)
        printer = Printer()
        result = self.conversation.answer(lambda index, piece: printer.text(0, piece))
        printer.end(0)
        self.messages.append({"role": "assistant", "content": result.text})
        self.last = result
        return result

    def new_ids(self, before: str) -> list[int] | None:
        """What follows the last answer in the template's text; None: it is the first turn, or the template has changed
        what was said before, and all must be read again."""
        if self.conversation is None:
            return None
        answer = self.last.text.strip()  # as most templates print it
        rest = self.text.removeprefix(before)
        start = rest.find(answer)
        if not self.text.startswith(before) or start < 0 or rest[:start].strip():
            log.info("the chat template changes earlier turns: the conversation is read again")
            return None
        return without_stop(self.tokenizer, self.tokenizer.encode_after(rest[start + len(answer) :]), self.last)


class Printer:
    """Standard output: the first unfinished prompt streams, those after it wait for their turn."""

    def __init__(self):
        self.streaming = 0
        self.waiting: dict[int, str] = {}
        self.last = ""

    def text(self, index: int, piece: str) -> None:
        if index != self.streaming:
            self.waiting[index] = self.waiting.get(index, "") + piece
        elif piece:
            self.last = piece
            print(piece, end="", flush=True)

    def end(self, index: int) -> None:
        print(end="" if self.last.endswith("\n") else "\n", flush=True)
        self.streaming, self.last = index + 1, ""
        self.text(index + 1, self.waiting.pop(index + 1, ""))


class Trace:
    """--trace: the positions in every slot after prefill and after every step, one batch, at most 1 GiB."""

    LIMIT = 2**30

    def __init__(self, path: str, options: Options, model: Llama, prompts: list[list[int]]):
        if len(prompts) > options.batch_size:
            raise ValueError(f"--trace records one batch: {len(prompts)} prompts need --batch-size {len(prompts)}")
        with torch.device("meta"):  # shapes only
            cache = Cache(model.config, *options.rules(), shape_of(prompts, options), torch.float32)
        size = cache.positions().nbytes * options.max_new_tokens
        if size > self.LIMIT:
            raise ValueError(f"--trace would take {size / 2**30:.1f} GiB, more than 1: lower --max-new-tokens")
        self.path, self.options, self.prompt_slots = path, options, cache.slots[0]
        self.frames: list[np.ndarray] = []

    def __call__(self, cache: Cache) -> None:
        self.frames.append(cache.positions().cpu().numpy())

    def save(self) -> None:
        settings = settings_in_stats(self.options) | {"max_new_tokens": self.options.max_new_tokens}
        slots = (
            self.prompt_slots[0] if len(set(self.prompt_slots)) == 1 else self.prompt_slots
        )  # by layer if they differ
        unfinished = Path(self.path + ".part")
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, pos=np.stack(self.frames), prompt_slots=slots, **settings)
        unfinished.replace(self.path)


def summary(batches: list[Stats]) -> str:
    """The statistics of a run, for a person."""
    s = batches[-1]
    prefill, decode = sum(b.prefill_s for b in batches), sum(b.decode_s for b in batches)
    tokens = sum(b.tokens_per_s * b.decode_s for b in batches)
    return (
        f"\npolicy   {s.policy}: heavy {s.heavy} + recent {s.recent} generated tokens per KV head, score {s.score}\n"
        f"cache    {s.prompt_slots} prompt + {s.decode_slots} decode slots, {s.kv_bytes / 1e6:.2f} MB: "
        f"{s.kv_bytes / s.kv_bytes_full:.0%} of the full cache's {s.kv_bytes_full / 1e6:.2f} MB\n"
        f"time     prefill {prefill:.2f} s, compile {s.compile_s:.1f} s, decode {decode:.2f} s\n"
        f"speed    {tokens:.0f} tokens in decode steps, {tokens / decode:.1f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
