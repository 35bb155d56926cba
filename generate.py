"""Generate text with SCOPE: load a checkpoint, prefill, decode through compiled graphs, stream the text.

From a shell:  python generate.py --prompt-file questions.txt --policy discontinuous
From Python:   model, tokenizer = load("checkpoints/mini")
               for result in generate(model, tokenizer, ["Question_1: ..."], "discontinuous"): print(result.text)
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the 3 s in which torch is imported ends quietly too
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kernels
from cache import Cache, CacheSize, CacheSnapshot, StepInput, round_up
from model import Llama, ModelConfig
from scope import COMPRESSORS, FULL, SCORES, STRATEGIES, WHOLE_PROMPT, Policy, PromptPolicy, one_line, require

log = logging.getLogger("scope")
MINI = Path(__file__).parent / "checkpoints" / "mini"


def option(default, help: str, **argument):
    return field(default=default, metadata={"help": help, **argument})


@dataclass(frozen=True)
class Options:
    """Every setting and its default; `--help` prints them. Raises ValueError for a value that is impossible."""

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
    seed: int = option(0, "of the sampling; prompt i of a run draws the same numbers whatever the batch size")
    ignore_eos: bool = option(False, "do not stop at a stop token")
    batch_size: int = option(8, "most prompts that run together")
    max_context: int = option(0, "slots per KV head for the prompt and, in a conversation, for all that follows it; "
                              "0: what the prompts need, in a conversation 4096 or what the model allows")  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1; auto: cuda if there is one")
    dtype: str = option("auto", "of weights and cache: float32, bfloat16, float16; auto: the checkpoint's")
    compile: bool = option(True, "compile the decode step (--no-compile: start at once, slower steps)")

    def __post_init__(self):
        self.rules()
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.max_context >= 0, "max_context", self.max_context, "0 (automatic) or more")

    def rules(self) -> tuple[Policy, PromptPolicy]:
        """What scope.py makes of these settings, for generated tokens and for the prompt."""
        policy = Policy(self.policy, self.heavy, self.recent, self.score)
        return policy, PromptPolicy(self.compress, self.prompt_budget, self.obs_window)


def load(checkpoint: str = Options.checkpoint, device: str = Options.device, dtype: str = Options.dtype):
    """Checkpoint directory or hub id -> (Llama, hf.tokenizer.Tokenizer). Raises ValueError if it cannot be run."""
    log.info("loading %s", checkpoint)
    from hf import load_checkpoint  # here: a fork with a tokenizer of its own needs the five files alone

    return load_checkpoint(place_of(checkpoint), device, dtype)


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


def no_callback(*arguments) -> None:
    """The default of on_text and on_step."""


def generate(
    model: Llama, tokenizer, prompts: list, policy=Options.policy, *, on_text=None, on_step=None, **settings
) -> Iterator[Result]:
    """Results in the order of `prompts` (texts, or lists of token ids), each as soon as its batch is through.

    policy: a name, with more fields of Options in `settings`, or Options. on_text(index, text) gets text as it comes,
    on_step(cache) the cache after prefill and after every step. The tokenizer needs `encode`, `decode`, `stream` and
    `stop_ids`. Raises ValueError, before anything is computed, for a prompt or a setting that cannot be run.
    """
    options = options_from(policy, settings)
    require(not isinstance(prompts, str), "prompts", repr(prompts[:40]), "a list of prompts: put the text in brackets")
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    check_run(model.config, ids, options)
    engine = Engine(model, options, tokenizer.stop_ids, size_of(ids, options))
    return run(engine, tokenizer, ids, on_text or no_callback, on_step or no_callback)


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


def size_of(prompts: list[list[int]], options: Options) -> CacheSize:
    """The size of the one cache that all batches of a run share."""
    lengths = sorted({len(ids) for ids in prompts})
    return CacheSize(min(options.batch_size, len(prompts)), lengths, options.max_new_tokens, options.max_context)


def run(engine: "Engine", tokenizer, prompts: list[list[int]], on_text=no_callback, on_step=no_callback):
    """Yields the Result of each prompt, batch after batch through the same buffers."""
    size = engine.size.batch
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        rows = [Row(start + i, ids, tokenizer.stream()) for i, ids in enumerate(batch)]
        interrupt = None
        try:
            first_token = engine.prefill(batch, [row.index for row in rows])
            on_step(engine.cache)
            decode_rows(engine, rows, first_token, READ_EVERY[engine.device.type], on_text, on_step)
        except KeyboardInterrupt as error:  # rows that are complete are not lost
            interrupt = error
        stats = engine.stats(rows)
        yield from (row.result(tokenizer, stats) for row in rows if row.stopped or not interrupt)
        if interrupt:
            raise interrupt


def decode_rows(engine: "Engine", rows: list["Row"], first_token: Tensor, read_every: int, on_text, on_step) -> None:
    """first_token [B]: what prefill gave each row; read_every: steps between two looks at which rows have stopped."""
    engine.start_decode()
    pending = [first_token]  # tokens on the device that no row has taken yet
    for t in range(1, engine.options.max_new_tokens):
        if len(pending) == read_every:
            deliver(engine, rows, pending, on_text)
            pending.clear()
            if all(row.stopped for row in rows):
                return
        pending.append(engine.decode(t))
        on_step(engine.cache)
    deliver(engine, rows, pending, on_text)
    for row in rows:
        on_text(row.index, row.stream.push([], last=True))


def deliver(engine: "Engine", rows: list["Row"], pending: list[Tensor], on_text) -> None:
    """Hand tokens to the rows. Only here the host waits for the device: it copies all tokens and stop flags at once."""
    *steps, stopped = torch.stack([*pending, engine.stopped.long()]).tolist()
    for i, row in enumerate(rows):
        if text := row.take([step[i] for step in steps if step[i] >= 0], bool(stopped[i])):
            on_text(row.index, text)


@dataclass
class Row:
    """One prompt of a running batch, on the host's side."""

    index: int
    prompt: list[int]
    stream: "hf.tokenizer.TextStream"  # noqa: F821
    tokens: list[int] = field(default_factory=list)  # generated, a stop token included
    stopped: bool = False

    def take(self, new: list[int], stopped: bool) -> str:
        """Add new tokens, a stop token included; returns the text that they complete."""
        self.tokens += new
        ended, self.stopped = stopped and not self.stopped, stopped
        return self.stream.push(new[:-1] if ended else new, last=ended)

    def result(self, tokenizer, stats: Stats) -> Result:
        text = tokenizer.decode(self.tokens[:-1] if self.stopped else self.tokens)
        reason = "stop" if self.stopped else "length"
        return Result(self.index, len(self.prompt), self.tokens, text, reason, stats)


# ---- the engine -------------------------------------------------------------------------------------------

READ_EVERY = {"cpu": 1, "cuda": 8}  # steps; a GPU runs ahead of the host, and each read makes it wait

# Thresholds: inductor stores every operand of a sum of products. Otherwise it computes the norm before a linear layer
# again for each output channel (5.5 against 3.4 ms a step). vec_isa_ok: it does not test what /proc/cpuinfo says (3 s).
CPU_OPTIONS = {"realize_reads_threshold": 1, "realize_opcount_threshold": 6, "cpp.vec_isa_ok": True}


def decode_step(
    model: Llama, cache: Cache, sampler: kernels.Sampler, now: StepInput, select: bool, token, noise, stopped
):
    """Feed token [B] and choose the next one. Compiled: a graph for append steps and one for select steps."""
    hidden = model(token[:, None], now.position[:, None], cache.step_attention(now, select))
    return sampler(model.logits(hidden[:, -1]), noise, stopped)


class Engine:
    """One model and one cache. It runs batch after batch of prompts through the same buffers and graphs."""

    def __init__(self, model: Llama, options: Options, stop_ids: list[int], size: CacheSize, sampler=None):
        self.model = model
        self.options = options
        self.size = size
        self.device = model.embed.weight.device
        self.check_memory()
        self.cache = self.allocate(*options.rules(), size, self.device)
        self.sampler = sampler or kernels.Sampler(options, [] if options.ignore_eos else stop_ids).to(self.device)
        self.decode_step = decode_step
        self.noise: Tensor  # [T, B] one number per token, for sampling
        self.token: Tensor  # [B] to feed next
        self.stopped: Tensor  # [B] bool
        self.steps: int  # decode steps since the prompt or the turn was read
        self.start_turn([0] * size.batch)
        self.prefill_s = 0.0
        self.prompt_live = 0.0  # tokens that the fullest row held before the first step
        self.decode_started = 0.0
        self.compile_s = self.compile() if options.compile else 0.0

    def check_memory(self) -> None:
        """Raises ValueError for a cache that does not fit: the system would kill the process when it fills up."""
        need, free = self.allocate(*self.options.rules(), self.size, "meta").nbytes, free_memory(self.device)
        if need > free:
            rows = int(self.size.batch * free / need)
            remedy = f"lower --batch-size to {rows}" if rows else "lower --max-new-tokens, or shorten the prompt"
            raise ValueError(f"the KV cache takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {remedy}")

    def allocate(self, policy: Policy, prompt: PromptPolicy, size: CacheSize, device) -> Cache:
        try:
            with torch.device(device):
                return Cache(self.model.config, policy, prompt, size, self.model.embed.weight.dtype)
        except RuntimeError as error:  # torch's out-of-memory errors, CPU and CUDA
            raise ValueError(f"the KV cache does not fit: {one_line(error)[:120]}; lower --batch-size") from error

    @torch.inference_mode()
    def compile(self) -> float:
        """Compile all graphs on the empty cache, so that no step of a run waits for it. Returns seconds."""
        started = time.perf_counter()
        # torch stops compiling a function after 8 graphs. A process that runs many policies needs more: each has up to
        # two for each number of slots read. Set here: the line imports the compiler, and an eager run need not wait.
        torch._dynamo.config.recompile_limit = 64
        on_gpu = self.device.type == "cuda"
        if not on_gpu:
            check_compiler()
        how = {"mode": "reduce-overhead"} if on_gpu else {"options": CPU_OPTIONS}
        self.decode_step = torch.compile(decode_step, fullgraph=True, dynamic=False, **how)
        for select, reads in sorted(set(self.cache.graph_keys)):
            log.info("compiling the %s graph for %d decode slots ...", "select" if select else "append", reads)
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
        self.start_turn(indexes or [0] * self.size.batch)

    @torch.inference_mode()
    def start_turn(self, indexes: list[int]) -> None:
        """Draw the sampling noise anew. It depends on the seed and on each row's index, and on nothing else."""
        self.noise = kernels.draw_noise(self.options, indexes).to(self.device)
        self.token = torch.zeros(len(indexes), dtype=torch.int64, device=self.device)
        self.stopped = torch.zeros(len(indexes), dtype=torch.bool, device=self.device)
        self.steps = 0

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], indexes: list[int]) -> Tensor:
        """Read the prompts as one right-padded block; returns each row's first token [B].

        A batch that is shorter than the cache is filled up with copies of its last prompt.
        """
        started = time.perf_counter()
        missing = self.size.batch - len(prompts)
        prompts = prompts + prompts[-1:] * missing
        self.reset(indexes + indexes[-1:] * missing)
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        width = padded_width(max(len(ids) for ids in prompts))
        block = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts], device=self.device)
        positions = torch.arange(width, device=self.device).expand_as(block)
        hidden = self.model(block, positions, self.cache.begin_prefill(lengths.tolist()))
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]
        return self.sample_first(last, started)

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
        now = self.cache.eager_step_input(t) if eager else self.cache.step_input(t, reads)
        noise = self.noise[t % len(self.noise)]
        step = self.decode_step(self.model, self.cache, self.sampler, now, select, self.token, noise, self.stopped)
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
            steps=self.steps,
            prompt_slots=prompt_slots,
            decode_slots=decode_slots,
            live_peak=self.prompt_live + (held.amax(0).float().mean().item() if self.steps else 0.0),
            kv_bytes=self.cache.nbytes,
            kv_bytes_full=self.allocate(FULL, WHOLE_PROMPT, full, "meta").nbytes,
            prefill_s=self.prefill_s,
            compile_s=self.compile_s,
            decode_s=decode_s,
            tokens_per_s=sum(len(row.tokens) - 1 for row in rows) / decode_s,
        )


def padded_width(n: int) -> int:
    """A little more than n, so that few widths occur: oneDNN keeps a kernel for each shape that it has seen.

    5 -> 8, 100 -> 104, 1000 -> 1024: eight widths from each power of two to the next.
    """
    return round_up(n, max(8, 2 ** n.bit_length() // 16))


def free_memory(device: torch.device) -> float:
    """Bytes that the process may still take, of the GPU or of the machine and its cgroup; inf where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [math.inf]
    if Path("/proc/meminfo").exists():
        free += [1024 * int(kb) for kb in re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())]
    limit, used, parts = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and limit.read_text().strip().isdigit():
        file_cache = re.search(r"^file (\d+)", parts.read_text(), re.MULTILINE)  # the system can take that back
        free.append(int(limit.read_text()) - int(used.read_text()) + int(file_cache[1] if file_cache else 0))
    return min(free)


def check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

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
        check_run(model.config, [ids], self.options)
        self.engine = Engine(model, self.options, tokenizer.stop_ids, size_of([ids], self.options))
        self.snapshots: list[Snapshot] = []
        self.turn = 0
        self.read_last = ids  # what was read before the next answer
        self.unread: list[int] = []  # the last token of an answer, which is read with the next turn
        self.opening = self.engine.prefill([ids], [0]), self.engine.stopped  # the token that an answer begins with
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

    def answer(self, on_text=no_callback, on_step=no_callback) -> Result:
        """Decode until a stop token or max_new_tokens; on_text and on_step as in `generate`."""
        if self.opening is None:
            raise ValueError(f"turn {self.turn} has nothing to answer: read something first")
        row, (first_token, _) = Row(self.turn, self.read_last, self.tokenizer.stream()), self.opening
        self.opening = None  # an answer that is interrupted leaves nothing to go on from
        # Each step is looked at: a device that ran past the stop token would evict what a later turn could still use.
        decode_rows(self.engine, [row], first_token, 1, on_text, on_step)
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


# ---- the command line (the benchmarks share these three) ----------------------------------------------------


def note(text: str) -> None:
    if sys.stderr:  # None where the shell has closed it; print would then write to standard output
        print(text, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse would print the usage before its one line
        raise ValueError(f"{message} (see --help)")


def run_program(name: str, work: Callable[[], None]) -> int:
    """The exit status. 0: done; 2: a mistake, said in one line; 1: the reader of our output has gone; 130: Ctrl-C."""
    try:
        work()
        return 0
    except BrokenPipeError:
        from cli.output import silence_stdout

        silence_stdout()
        return 1
    except (ValueError, OSError) as error:
        note(f"{name}: error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        note(f"\n{name}: interrupted")
        return 130


def main(argv: list[str] | None = None) -> int:
    log.setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s", handlers=None if sys.stderr else [logging.NullHandler()])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    return run_program("generate.py", lambda: run_command(parse_arguments(argv)))


def run_command(arguments: argparse.Namespace) -> None:
    options = Options(**{entry.name: getattr(arguments, entry.name) for entry in fields(Options)})
    converses = arguments.chat and arguments.prompt_file is None and not arguments.stdin
    (run_chat if converses else run_prompts)(arguments, options)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    about = __doc__.split("\n")[0]
    parser = Parser("generate.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = parser.add_argument_group("what to continue (default: the bundled model's demo prompt)")
    source.add_argument("stdin", nargs="?", choices=["-"], help="read one prompt from standard input")
    source.add_argument("--prompt", metavar="TEXT", help="one prompt")
    rows = '.txt: one prompt; .jsonl: a {"prompt": TEXT} or {"prompt_ids": [...]} per line'
    source.add_argument("--prompt-file", metavar="FILE", help=rows)
    source.add_argument("--chat", action="store_true", help="apply the chat template; without a prompt, converse")
    result = parser.add_argument_group("where the results go (generated text: standard output)")
    result.add_argument("--output", metavar="FILE.jsonl", help="one line per prompt: token ids, text, statistics")
    result.add_argument(
        "--trace", metavar="FILE.npz", help="the positions in all slots after every step; for small runs"
    )
    settings = parser.add_argument_group("settings")
    for entry in fields(Options):
        is_flag = type(entry.default) is bool
        kind = {"action": argparse.BooleanOptionalAction} if is_flag else {"type": type(entry.default)}
        name = "--" + entry.name.replace("_", "-")
        settings.add_argument(name, default=entry.default, **kind, **entry.metadata)
    arguments = parser.parse_args(argv)
    if sum(given is not None for given in (arguments.stdin, arguments.prompt, arguments.prompt_file)) > 1:
        raise ValueError("give one of --prompt, --prompt-file and -, not several")
    return arguments


def run_prompts(arguments: argparse.Namespace, options: Options) -> None:
    """Answer the given prompts: text to standard output, rows to --output, a summary to standard error."""
    from cli.output import Printer, RowFile, check_outputs

    prompts = read_prompts(arguments)
    inputs = {"--prompt-file": arguments.prompt_file, "--checkpoint": place_of(arguments.checkpoint)}
    check_outputs({"--output": arguments.output, "--trace": arguments.trace}, inputs)
    model, tokenizer = load(options.checkpoint, options.device, options.dtype)
    if arguments.chat:
        prompts = [tokenizer.chat([{"role": "user", "content": p}]) if isinstance(p, str) else p for p in prompts]
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    check_run(model.config, ids, options)
    trace = Trace(arguments.trace, options, model, ids) if arguments.trace else None
    engine = Engine(model, options, tokenizer.stop_ids, size_of(ids, options))
    printer = Printer(goes_on=arguments.output is not None)
    batches: dict[int, Stats] = {}
    with RowFile(arguments.output) as output:
        for result in run(engine, tokenizer, ids, printer.print_piece, trace or no_callback):
            output.write(asdict(result))
            printer.end_prompt(result.index)
            batches[id(result.stats)] = result.stats
    if trace:
        trace.save()
    note(summary(list(batches.values())))
    printer.close()


def read_prompts(arguments: argparse.Namespace) -> list:
    """Texts, or lists of token ids, from the source that the command line names."""
    if arguments.prompt is not None:
        return [arguments.prompt]
    if arguments.stdin:
        return [sys.stdin.read()]
    if arguments.prompt_file is None and arguments.checkpoint != Options.checkpoint:
        raise ValueError("there is no prompt: give --prompt TEXT, --prompt-file FILE, or - for standard input")
    path = MINI / "demo.txt" if arguments.prompt_file is None else Path(arguments.prompt_file)
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
    for name, kind, other in (("prompt", str, "prompt_ids"), ("prompt_ids", list, "prompt")):
        if isinstance(row, dict) and isinstance(row.get(name), kind) and other not in row:
            return row[name]
    raise ValueError(f'{where}: one {{"prompt": TEXT}} or {{"prompt_ids": [ID, ...]}} is expected, not both')


def run_chat(arguments: argparse.Namespace, options: Options) -> None:
    """Hold a conversation, one line a turn, until the end of input. Each turn reads only what is new."""
    from cli.output import Printer, RowFile, check_outputs

    if arguments.trace:
        raise ValueError("--trace records one run: with --chat, give the prompt with --prompt-file")
    check_outputs({"--output": arguments.output}, {"--checkpoint": place_of(arguments.checkpoint)})
    model, tokenizer = load(options.checkpoint, options.device, options.dtype)
    tokenizer.chat([{"role": "user", "content": ""}])  # refuses now if there is no template
    history, conversation = tokenizer.chat_history(), None
    with RowFile(arguments.output) as output:
        for number, text in enumerate(read_turns(arguments.prompt)):
            ids, continues = history.add_question(text)
            if continues:
                conversation.read(ids)
            else:
                if conversation:
                    log.info("the chat template changes earlier turns: the conversation is read again")
                conversation = None  # frees its cache before the next one is allocated
                conversation = Conversation(model, tokenizer, ids, options)
            printer = Printer()
            result = conversation.answer(lambda index, piece, printer=printer: printer.print_piece(0, piece))
            output.write(asdict(result) | {"index": number})
            printer.end_prompt(0)
            history.add_answer(result.text, result.token_ids[-1] if result.finish_reason == "stop" else None)
            note(summary([result.stats]))


def read_turns(first: str | None) -> Iterator[str]:
    """The user's side of a conversation. A --prompt is its first turn, and the only one without a terminal."""
    if first is not None:
        yield first
        if not sys.stdin.isatty():
            return
    while True:
        print("> " if sys.stdin.isatty() else "", end="", file=sys.stderr, flush=True)
        try:
            yield input()
        except EOFError:
            return


class Trace:
    """--trace: the positions in all slots after prefill and after every step, of one batch, at most 1 GiB."""

    def __init__(self, path: str, options: Options, model: Llama, prompts: list[list[int]]):
        if len(prompts) > options.batch_size:
            raise ValueError(f"--trace records one batch: {len(prompts)} prompts need --batch-size {len(prompts)}")
        with torch.device("meta"):  # shapes only
            cache = Cache(model.config, *options.rules(), size_of(prompts, options), torch.float32)
        size = cache.positions().nbytes * options.max_new_tokens
        if size > 2**30:
            raise ValueError(f"--trace would take {size / 2**30:.1f} GiB, more than 1: lower --max-new-tokens")
        self.path = path
        self.options = options
        self.prompt_slots = cache.slots[0]
        self.frames: list[np.ndarray] = []

    def __call__(self, cache: Cache) -> None:
        self.frames.append(cache.positions().cpu().numpy())

    def save(self) -> None:
        from cli.output import replace_file

        slots = self.prompt_slots if len(set(self.prompt_slots)) > 1 else self.prompt_slots[0]
        arrays = {"pos": np.stack(self.frames), "prompt_slots": slots} | asdict(self.options)
        replace_file(self.path, lambda file: np.savez_compressed(file, **arrays))


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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
