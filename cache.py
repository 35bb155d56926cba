"""The static KV cache: every buffer is allocated once, then filled, appended to and evicted from in place.

    slot   0                 prompt_slots                   n_slots
           | the prompt's    | generated tokens, any order  |
    pos    | 0 1 4 5 7 .. -1 | 17  9 12 -1 16 ...           |    pos = -1: dead, nothing attends to it

A token never moves. Eviction marks its slot dead, and a later token overwrites it: K and V are written once per token
and never gathered. The order of slots means nothing, because RoPE is applied before caching.

A conversation goes on in the same buffers. Before a later turn is read, the cache copies what is left of the last
answer behind the prompt, and the decode slots are free again. `rewind` marks dead whatever came after a snapshot.
"""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import kernels
from model import ModelConfig
from scope import FORMATS, Format, Policy, PromptPolicy, for_layer, schedule

PROMPT_SLOTS = 64  # slots for whole prompts are a multiple of this: a slightly longer prompt finds its graphs compiled
READ_BUCKET = 256  # the prefix that attention reads grows by at least this many slots ...
READ_LENGTHS = 4  # ... and has at most so many lengths: each one compiles graphs of its own


class CacheSize(NamedTuple):
    """The batch, the prompts and the output that a cache must have room for."""

    batch: int  # answers that are decoded together
    lengths: list[int]  # tokens of the prompts
    T: int  # most tokens to generate; in a conversation, in each turn
    prompt_slots: int = 0  # per KV head of every layer, for the prompt and later turns; 0: what the prompts need
    samples: int = 1  # answers to each prompt, which share its slots

    @property
    def prompts(self) -> int:
        return self.batch // self.samples


class CacheSnapshot(NamedTuple):
    """A moment of a conversation that `Cache.rewind` goes back to."""

    position: int  # of the next token
    used: tuple[int, ...]  # prompt slots in use, of each layer
    kept: Tensor  # as in Cache
    scores: list[Tensor]  # of the layers whose prompt is evictable: later tokens change them


class StepInput(NamedTuple):
    """What the layers need to know of a decode step. One graph serves all values of a tensor, but of a bool or an int
    each value has a graph of its own."""

    select: bool  # whether a layer may evict
    reads: int  # decode slots that attention reads
    prompt_reads: int  # prompt slots that it reads; a layer with fewer reads all of its own
    position: Tensor  # [B] of the token that is written
    plan: Tensor  # [n_layers, 3 or 4]: the scope.StepPlan of each layer


class Slots(nn.Module):
    """The keys or the values of all slots of a layer, in one storage format. One token is one slot in all buffers."""

    def __init__(self, shape: tuple, format: Format, dtype):
        super().__init__()
        batch, n_kv_heads, n_slots, head_dim = shape
        self.dtype = dtype  # of what is written and unpacked
        self.bits, self.rotated = format.bits, format.rotated
        rules = {"bits": format.bits, "minimum": format.minimum, "rotated": format.rotated}
        self.encode = partial(kernels.encode, n_groups=format.n_groups(head_dim), **rules)
        one = self.encode(torch.zeros(1, n_kv_heads, 1, head_dim, dtype=dtype))
        all_slots = one.map(lambda part: part.new_zeros(batch, part.shape[1], n_slots, *part.shape[3:]))
        for name in ("codes", "scale", "low"):
            self.register_buffer(name, getattr(all_slots, name))

    @property
    def stored(self) -> kernels.Stored:
        return kernels.Stored(self.codes, self.scale, self.low, self.bits, self.rotated)

    def read(self, end: int, start: int = 0) -> kernels.Stored:
        """The slots from `start` to `end`."""
        return self.stored.map(lambda part: part[:, :, start:end])

    def unpack(self, end: int, start: int = 0) -> Tensor:
        """The same as numbers, [B, H, n, head_dim]: a copy, but where nothing is packed."""
        return kernels.decode(self.read(end, start), self.dtype)

    def put(self, x: Tensor, start: int, rows=slice(None)) -> None:
        """Write x [n_rows, H, n, head_dim] of these rows to the slots from `start` on."""
        for part, new in zip(self.stored.tensors, self.encode(x).tensors, strict=True):
            part[rows, :, start : start + x.shape[2]] = new

    def extend(self, x: Tensor, start: int) -> Tensor:
        """Put x behind the first `start` slots; returns all of them, the old ones as they are stored, x exactly."""
        self.put(x, start)
        if self.bits == 16:
            return self.codes[:, :, : start + x.shape[2]]  # no copy of a long context
        return torch.cat((self.unpack(start), x), 2)

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Write x [B, H, n, head_dim] to the slots [B, H, n]."""
        for part, new in zip(self.stored.tensors, self.encode(x).tensors, strict=True):
            kernels.write_slots(part, slots.repeat(1, part.shape[1] // slots.shape[1], 1), new)


class SharedPrompt(nn.Module):
    """The prompts' slots of one layer, a row for each prompt, where several answers to it read the same row."""

    def __init__(self, shape: tuple, formats, dtype):
        super().__init__()
        self.prompt_slots = shape[2]
        self.k, self.v = (Slots(shape, format, dtype) for format in formats)
        self.register_buffer("pos", torch.full(shape[:3], -1, dtype=torch.int32))


class LayerCache(nn.Module):
    """The slots of one layer. What the model calls attention is `fill` for a prompt, `join` for a later turn and the
    layer itself for a decode step, which either appends or selects.

    shape: of K; ranks: this one's number, and how many share the heads; shared: where the prompt's slots are, if not in
    front of the decode slots; prompt_slots is 0 then.
    """

    def __init__(
        self,
        layer: int,
        shape: tuple,
        ranks: tuple,
        prompt_slots: int,
        max_evict: int,
        policy: Policy,
        formats,
        dtype,
        shared=None,
    ):
        super().__init__()
        batch, n_kv_heads, n_slots, _ = shape  # and head_dim
        rank, self.n_ranks = ranks
        self.first_head = rank * n_kv_heads  # of this rank's heads
        self.layer = layer
        self.shared: SharedPrompt | None = shared
        self.prompt_slots = prompt_slots
        self.max_evict = max_evict
        self.policy = policy
        self.first_evictable = prompt_slots if policy.strategy.frozen_prompt else 0  # slot
        self.scores_every_step = bool(max_evict) and policy.ranking.every_step
        self.prompt_is_evictable = bool(max_evict) and not policy.strategy.frozen_prompt
        n_scores = n_slots - self.first_evictable if max_evict else 0
        self.k, self.v = (Slots(shape, format, dtype) for format in formats)
        self.register_buffer("pos", torch.full(shape[:3], -1, dtype=torch.int32))
        self.register_buffer("score", torch.zeros(batch, n_kv_heads, n_scores))
        self.register_buffer("victims", torch.zeros(batch, n_kv_heads, max_evict, dtype=torch.int64))
        n_held, n_gaps = (1, n_slots) if self.prompt_is_evictable else (0, 0)
        self.register_buffer("held", torch.zeros(batch, n_kv_heads, n_held, dtype=torch.int32))
        self.register_buffer("gaps", torch.zeros(batch, n_kv_heads, n_gaps, dtype=torch.int32))
        self.register_buffer("number", torch.tensor([layer]))  # an int would make each layer compile a graph of its own

    @property
    def prompt(self) -> "LayerCache | SharedPrompt":
        """What holds the slots of the prompt: `k`, `v`, `pos` and `prompt_slots`."""
        return self.shared or self

    def reset(self) -> None:
        for each in {self, self.prompt}:
            each.pos.fill_(-1)
            for buffer in (*each.k.buffers(), *each.v.buffers()):
                buffer.zero_()
        self.score.zero_()
        self.victims.zero_()

    # ---- prefill

    def fill(self, rows: Tensor, lengths: Tensor, window: Tensor, kept: Tensor | None, prompt, q, k, v) -> Tensor:
        """Attend over whole prompts, then store the part of K and V [n, H, S, head_dim] that stays.

        rows [n]: of the batch. lengths [n]: tokens of each one's prompt. window [n], on the host: the last of them,
        which choose. kept [n]: how many of them stay; None: all.
        """
        y = kernels.causal_attention(q, k, v)
        slot = kernels.slot_numbers(k)
        pos = torch.where(slot < lengths[:, None, None], slot, -1)
        score = self.prompt_score(q, k, v, lengths)
        if kept is not None:
            pos = self.choose_prompt(lengths, window, kept, prompt, q, k)
            k, v, score = pick(k, pos), pick(v, pos), pick(score[..., None], pos)[..., 0]
        if prompt.key_channels < 1:
            k = kernels.zero_weak_channels(q, k, pos, lengths, window, prompt.key_channels)
        n = min(pos.shape[2], self.prompt.prompt_slots)  # what is cut off is padding
        self.prompt.k.put(k[:, :, :n], 0, rows)
        self.prompt.v.put(v[:, :, :n], 0, rows)
        self.prompt.pos[rows, :, :n] = pos[:, :, :n]
        if self.prompt_is_evictable:
            self.score[rows, :, :n] = score[:, :, :n]
        return y

    def repeat_row(self, n: int) -> None:
        """Copy the prompt in row n - 1 to all rows after it."""
        for buffer in (*self.prompt.k.buffers(), *self.prompt.v.buffers(), self.prompt.pos, self.score):
            buffer[n:] = buffer[n - 1]

    def count_prompt(self, lengths: Tensor) -> None:
        """Before an output: note how many tokens each head holds, and how many are missing after each of them.

        A window counts tokens, not positions. Of a prompt of 7 a head has kept 0, 1, 5 and 6: `held` is 4. Behind 1
        three are missing, so its gap is 3 and it counts as if it stood at 4: the third newest, as it is.
        """
        pos = self.pos[:, :, : self.prompt_slots]
        self.held.copy_((pos >= 0).sum(-1, keepdim=True))
        newer = kernels.ranks(pos)
        self.gaps.zero_()
        self.gaps[:, :, : self.prompt_slots] = torch.where(pos >= 0, lengths[:, None, None] - 1 - newer - pos, 0)

    def prompt_score(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """[B, H, S]: the decode score of each prompt token, from the prompt's own queries; 0 where none is needed."""
        if not (self.prompt_is_evictable and self.scores_every_step):
            return torch.zeros(k.shape[:3], device=k.device)
        received = kernels.received_attention(q, k, lengths)
        age = (lengths[:, None, None] - kernels.slot_numbers(k)).clamp(min=0)
        return self.policy.ranking.update(torch.zeros_like(received), received, age, k, v)

    def choose_prompt(self, lengths: Tensor, window: Tensor, kept: Tensor, prompt: PromptPolicy, q, k) -> Tensor:
        """The prompt positions that stay, [B, H, prompt_slots] int32; -1: the slot stays empty."""
        score = prompt.compressor.score(q, k, lengths, window)
        in_window = kernels.slot_numbers(k) >= (lengths - window.to(k.device))[:, None, None]
        others = (kept - prompt.obs_window).clamp(min=0)
        floor = kept - others + (others * prompt.compressor.head_floor).long()
        score = score.masked_fill(in_window, torch.inf)
        if prompt.compressor.head_floor == 1:
            return kernels.highest(score, lengths, kept, floor, self.prompt.prompt_slots)
        everybody = kernels.gather_over_ranks(score, self.n_ranks, 1)  # all heads compete, other ranks' too
        pos = kernels.highest(everybody, lengths, kept, floor, self.prompt.prompt_slots)
        return pos[:, self.first_head : self.first_head + k.shape[1]]

    # ---- later turns of a conversation

    def settle(self, start: int, count: int) -> None:
        """Copy the `count` decode slots in use, dead ones too, to slot `start` on, then free them: one copy a turn."""
        old, new = slice(self.prompt_slots, self.prompt_slots + count), slice(start, start + count)
        for buffer in (*self.k.buffers(), *self.v.buffers(), self.pos):
            buffer[:, :, new] = buffer[:, :, old]
        if self.prompt_is_evictable:
            self.score[:, :, new] = self.score[:, :, old]
        self.pos[:, :, self.prompt_slots :] = -1

    def join(self, start: int, query_positions: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write a turn's tokens, at positions query_positions [B, n], to prompt slots from `start` on, and attend."""
        end = start + k.shape[2]
        k, v = self.k.extend(k, start), self.v.extend(v, start)
        self.pos[:, :, start:end] = query_positions[:, None]
        pos = self.pos[:, :, :end]
        y, received = kernels.attend_block(q, k, v, pos, query_positions)
        if self.prompt_is_evictable and self.scores_every_step:
            self.score[:, :, start:end] = 0.0
            age = torch.where(pos >= 0, query_positions[:, None, -1:] + 1 - pos, 0)
            self.score[:, :, :end] = self.policy.ranking.update(self.score[:, :, :end], received, age, k, v)
        return y

    # ---- decode

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *step) -> Tensor:
        """q [B, H * G, 1, head_dim], k and v [B, H, 1, head_dim], step: the fields of a StepInput -> as q."""
        now = StepInput(*step)
        return (self.select if now.select else self.append)(now, q, k, v)

    def append(self, now: StepInput, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write one token, then attend to all live tokens, itself included."""
        self.write_token(now, k, v)
        y, prob = self.attend(now, q)
        if self.scores_every_step:
            self.update_score(now, prob)
        return y

    def select(self, now: StepInput, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `append`; then the tokens with the lowest scores die. The scores include this step's attention."""
        self.write_token(now, k, v)
        y, prob = self.attend(now, q)
        if self.max_evict:
            self.update_score(now, prob)
            self.evict(now)
        return y

    @property
    def all_pos(self) -> Tensor:
        """[B, H, n]: the positions in the prompt's slots, then in the decode slots."""
        if not self.shared:
            return self.pos
        answers = self.pos.shape[0] // self.shared.pos.shape[0]
        return torch.cat((self.shared.pos.repeat_interleave(answers, 0), self.pos), 2)

    def write_token(self, now: StepInput, k: Tensor, v: Tensor) -> None:
        slot = self.next_slot(*self.of_layer(now.plan)[:2])
        self.k.write(slot, k)
        self.v.write(slot, v)
        kernels.write_slots(self.pos, slot, now.position.int()[:, None, None].expand_as(slot))
        if self.prompt_is_evictable:
            kernels.write_slots(self.gaps, slot, torch.zeros_like(slot, dtype=torch.int32))  # its victim's gap is gone

    def of_layer(self, x: Tensor) -> Tensor:
        """This layer's part of x [n_layers, ...]."""
        return x.index_select(0, self.number)[0]

    def next_slot(self, reuse: Tensor, fresh: Tensor) -> Tensor:
        """[B, H, 1]: each head's own victim of the last selection, or one fresh slot for all heads."""
        fresh = (fresh + self.prompt_slots).expand(*self.pos.shape[:2], 1)
        if not self.max_evict:
            return fresh
        victim = self.victims.index_select(-1, reuse.clamp(min=0).view(1))
        return torch.where(reuse >= 0, victim, fresh)

    def attend(self, now: StepInput, q: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over the slots in use, and the probability of this layer's own, [B, H, prompt_slots + reads]."""
        end = min(now.prompt_reads, self.prompt.prompt_slots)
        n, gap = self.prompt_slots + now.reads, self.prompt_slots - end
        if self.shared:
            y, (_, prob) = kernels.attend_slots(q, slots_between(self.shared, 0, end), slots_between(self, 0, n))
            return y, prob
        if gap < READ_BUCKET:
            y, (prob,) = kernels.attend_slots(q, slots_between(self, 0, n))
            return y, prob
        # A conversation may have thousands of prompt slots that it has not reached yet.
        before, after = slots_between(self, 0, end), slots_between(self, end + gap, n)
        y, (first, last) = kernels.attend_slots(q, before, after)
        return y, torch.cat((first, first.new_zeros(*first.shape[:2], gap), last), 2)

    def evictable_pos(self, now: StepInput) -> Tensor:
        """[B, H, n]: the positions in the slots that compete for staying."""
        return self.pos[:, :, self.first_evictable : self.prompt_slots + now.reads]

    def age(self, now: StepInput) -> Tensor:
        """[B, H, n]: how many queries have seen each of these tokens; 1 for this step's own, 0 in a dead slot."""
        pos = self.evictable_pos(now)
        return torch.where(pos >= 0, now.position.int()[:, None, None] - pos + 1, 0)

    def evictable_kv(self, now: StepInput) -> list:
        """The keys and the values of these tokens; None for a score that does not read them."""
        if not self.policy.ranking.reads_kv:
            return [None, None]
        return [part.unpack(self.prompt_slots + now.reads, self.first_evictable) for part in (self.k, self.v)]

    def update_score(self, now: StepInput, prob: Tensor) -> None:
        age = self.age(now)
        score = self.score[:, :, : age.shape[2]]
        inherited = torch.where(age == 1, 0.0, score)  # a new token starts from 0, not from its victim's score
        prob = prob[:, :, self.first_evictable :]
        score.copy_(self.policy.ranking.update(inherited, prob, age, *self.evictable_kv(now)))

    def rank(self, pos: Tensor) -> Tensor:
        """[B, H, n]: what the tokens at these positions are compared by."""
        score, rank = self.score[:, :, : pos.shape[2]], self.policy.ranking.rank
        if not rank:
            return score
        return rank(score, kernels.token_numbers(pos, self.first_head, pos.shape[1] * self.n_ranks))

    def candidates(self, now: StepInput) -> Tensor:
        """[B, H, n] bool: the tokens that may die. They are older than the window, or the two that the plan names."""
        pos, strategy = self.evictable_pos(now), self.policy.strategy
        if strategy.candidates:
            place = kernels.ranks(pos) - self.of_layer(now.plan)[3]
            return (pos >= 0) & (place >= 0) & (place <= 1)
        newer = self.age(now) - 1  # tokens, where none is missing
        if self.prompt_is_evictable:
            newer = newer - self.gaps[:, :, : pos.shape[2]]
        return (pos >= 0) & (newer >= strategy.window(self.policy, self.held))

    def evict(self, now: StepInput) -> None:
        """Mark dead as many tokens as the plan says: the lowest-scored ones of the candidates.

        Two cases share this code, because layers may select at different steps. Plan says 3: the 3 slots go dead, and
        `victims` lists them for the next 3 tokens. Plan says 0: nothing dies, and `victims` stays as it was.
        """
        pos = self.evictable_pos(now)
        most = min(self.max_evict, pos.shape[2])  # max_evict may be a later selection's, with more slots in use
        victims = kernels.lowest(self.rank(pos), pos, self.candidates(now), most) + self.first_evictable
        count = self.of_layer(now.plan)[2]
        dies = torch.arange(most, device=pos.device) < count
        kernels.write_slots(self.pos, victims, torch.where(dies, -1, self.pos.gather(2, victims)))
        listed = self.victims[:, :, :most]
        listed.copy_(torch.where(count > 0, victims, listed))


def slots_between(buffers: LayerCache | SharedPrompt, start: int, end: int) -> kernels.Part:
    live = buffers.pos[:, :, start:end] >= 0
    return kernels.Part(buffers.k.read(end, start), buffers.v.read(end, start), live)


def pick(x: Tensor, pos: Tensor) -> Tensor:
    """x [B, H, S, d] at the positions pos [B, H, n] -> [B, H, n, d]. Where pos is -1, the values mean nothing."""
    return x.gather(2, pos.clamp(min=0).long()[..., None].expand(-1, -1, -1, x.shape[3]))


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is at least n: round_up(65, 64) is 128."""
    return (n + multiple - 1) // multiple * multiple


def free_memory(device: torch.device) -> float:
    """Bytes that the process may still take, of the GPU or of the machine and its cgroup; inf where nobody says. The
    ranks of one machine share its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [math.inf]
    if Path("/proc/meminfo").exists():
        free += [1024 * int(kb) for kb in re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())]
    limit, used, parts = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and limit.read_text().strip().isdigit():
        file_cache = re.search(r"^file (\d+)", parts.read_text(), re.MULTILINE)  # the system can take that back
        free.append(int(limit.read_text()) - int(used.read_text()) + int(file_cache[1] if file_cache else 0))
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Cache(nn.Module):
    """All layers, for one batch size, one policy and one output length. It holds everything that eviction knows."""

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        prompt: PromptPolicy,
        size: CacheSize,
        dtype,
        formats=FORMATS["model"],
    ):
        super().__init__()
        self.config = config
        self.policy = policy
        self.prompt = prompt
        self.samples = size.samples
        policies = [for_layer(policy, layer, config.n_layers) for layer in range(config.n_layers)]
        schedules = [schedule(each, size.T) for each in policies]
        self.layers = nn.ModuleList()
        for layer, (each, plan) in enumerate(zip(policies, schedules, strict=True)):
            prompt_slots, shared = self.allocated_for(layer, size), None
            if size.samples > 1:
                shape = (size.prompts, config.n_kv_heads, prompt_slots, config.head_dim)
                prompt_slots, shared = 0, SharedPrompt(shape, formats, dtype)
            shape = (size.batch, config.n_kv_heads, prompt_slots + plan.n_slots, config.head_dim)
            numbers = (config.rank, config.n_ranks), prompt_slots, plan.max_evict
            self.layers.append(LayerCache(layer, shape, *numbers, each, formats, dtype, shared))
        self.most_prompt_slots = max(self.slots[0])  # of the layer that has the most
        steps = list(zip(*(plan.steps for plan in schedules), strict=True))  # [T][n_layers]
        in_use = [[s.fresh + 1 if s.reuse < 0 else s.fresh for s in layers] for layers in steps]
        self.slots_at = [max(layers) for layers in in_use]  # decode slots in use at each step
        self.graph_keys = self.find_graph_keys(steps, max(plan.n_slots for plan in schedules))
        numbers = 4 if policy.strategy.candidates else 3  # of a StepPlan: nobody else reads `pair`
        self.register_buffer("plan", torch.tensor(steps)[..., :numbers].clone())  # [T, n_layers, numbers]
        self.register_buffer("lengths", torch.zeros(size.prompts, dtype=torch.int64))  # tokens before the output
        kept = torch.zeros(config.n_layers, size.prompts, dtype=torch.int64)
        self.register_buffer("kept", kept)  # prompt tokens kept per KV head, the mean of the heads
        self.used = [0] * config.n_layers  # prompt slots in use, of each layer
        self.windows = [prompt.obs_window] * size.prompts  # the last tokens of each prompt, which choose and stay
        self.position = 0  # of the next token that a conversation reads

    def allocated_for(self, layer: int, size: CacheSize) -> int:
        """Prompt slots of a layer. Raises ValueError where `size.prompt_slots` are too few for the prompts."""
        slots = self.slots_for(layer, size.lengths)
        if not size.prompt_slots:
            return round_up(slots, PROMPT_SLOTS) if slots == max(size.lengths) else slots
        if slots > size.prompt_slots:
            need = f"a prompt of {max(size.lengths)} tokens needs {slots} slots, max_context is {size.prompt_slots}"
            raise ValueError(f"{need}: raise --max-context, or shorten the prompt")
        return size.prompt_slots

    def slots_for(self, layer: int, lengths: list[int]) -> int:
        """Slots that prompts of these lengths need: one for each token that a single head may keep.

        Where heads compete, one head may win more than its budget. 2 heads keep 100 tokens each, 32 of them in the
        window, and adakv's floor is 0.2: of the other 68, a head is sure of 13 and may lose 55 to the other head. So
        each head needs 100 + 55 slots.
        """
        most = max(self.kept_of(layer, length) for length in lengths)
        others = most - min(self.prompt.obs_window, most)
        may_lose = others - int(others * self.prompt.compressor.head_floor)
        return min(max(lengths), most + may_lose * (self.config.all_kv_heads - 1))

    def kept_of(self, layer: int, length: int) -> int:
        """Tokens per KV head that stay of a prompt of this length; the mean of the heads where they compete."""
        if self.prompt.compressor.score is None:
            return length
        spread = self.prompt.spread or self.policy.strategy.spread
        return spread(self.prompt.budget, layer, self.config.n_layers, length)

    def find_graph_keys(self, steps: list, n_slots: int) -> list[tuple[bool, int]]:
        """For each step, what names its compiled graph: whether it selects, and how many decode slots it reads.

        The full cache reads all of them, as static caches do; a pool that grows reads what it has grown to, in at most
        READ_LENGTHS lengths: 1,024 slots are read in steps of 256, 9,216 in steps of 2,304.
        """
        bucket = max(READ_BUCKET, round_up(n_slots, READ_LENGTHS) // READ_LENGTHS)
        bucket = bucket if self.policy.strategy.grows else n_slots
        reads = [min(round_up(used, bucket), n_slots) for used in self.slots_at]
        return [(any(step.evict for step in layers), n) for layers, n in zip(steps, reads, strict=True)]

    @property
    def slots(self) -> tuple[list[int], list[int]]:
        """Prompt slots and decode slots of each layer."""
        decode = [layer.pos.shape[2] - layer.prompt_slots for layer in self.layers]
        return [layer.prompt.prompt_slots for layer in self.layers], decode

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: K, V and what eviction needs beside them."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def held_of_output(self, steps: int) -> Tensor:
        """[steps, n_layers]: tokens that each step attends to beyond what the prompt gave, per KV head, by the plan."""
        evicted = self.plan[:steps, :, 2].cpu()
        evicted_before = evicted.cumsum(0) - evicted  # a step attends before it evicts
        return torch.arange(1, steps + 1)[:, None] - evicted_before

    def positions(self) -> Tensor:
        """[n_layers, B, n_kv_heads, n_slots] int32: the position in each slot, -1: dead; short layers end in -1."""
        found = [layer.all_pos for layer in self.layers]
        n_slots = max(pos.shape[2] for pos in found)
        return torch.stack([pad(pos, (0, n_slots - pos.shape[2]), value=-1) for pos in found])

    # ---- one run: prefill, then steps

    def reset(self) -> None:
        self.lengths.zero_()
        self.kept.zero_()
        self.used = [0] * len(self.layers)
        self.position = 0
        for layer in self.layers:
            layer.reset()

    def begin_prefill(self, lengths: list[int], questions: Sequence[int] = ()) -> None:
        """Prepare for prompts of these lengths. questions: the last tokens of each, which choose what stays
        of it and stay themselves; 0: obs_window of them."""
        kept = [[self.kept_of(layer.layer, length) for length in lengths] for layer in self.layers]
        self.used = [self.slots_for(layer.layer, lengths) for layer in self.layers]
        self.position = max(lengths)
        self.lengths.copy_(torch.tensor(lengths))
        self.windows = [n or self.prompt.obs_window for n in questions or [0] * len(lengths)]
        self.kept.copy_(torch.tensor(kept))

    def prefill_attention(self, rows: Tensor) -> list:
        """The attention of each layer that reads the right-padded prompts of these numbers [n]."""
        lengths, kept = self.lengths[rows], self.kept[:, rows]
        window = torch.tensor([self.windows[row] for row in rows.tolist()])  # on the host: its maximum is a shape
        all_stay = (kept == lengths).all(1).tolist()  # of each layer; one look at the device for all of them
        keeps = [None if whole else keep for whole, keep in zip(all_stay, kept, strict=True)]
        pairs = zip(self.layers, keeps, strict=True)
        return [partial(layer.fill, rows, lengths, window, keep, self.prompt) for layer, keep in pairs]

    def end_prefill(self, n: int) -> None:
        """All prompts below n are read; those after them become copies of the last one."""
        for layer in self.layers:
            layer.repeat_row(n)
            if layer.prompt_is_evictable:
                layer.count_prompt(self.lengths)

    def step_input(self, t: int, select: bool, reads: int) -> StepInput:
        """The input of step t, counted from 1, for the graph of `select` and `reads`. It reads all prompt slots."""
        position = (self.lengths + (t - 1))[:, None].expand(-1, self.samples).flatten()  # [B]
        return StepInput(select, reads, self.most_prompt_slots, position, self.plan[t - 1])

    def eager_step_input(self, t: int) -> StepInput:
        """The input of step t that reads the slots in use and no others: no graph was compiled for a number of them."""
        select, _ = self.graph_keys[t - 1]
        return self.step_input(t, select, self.slots_at[t - 1])._replace(prompt_reads=max(self.used))

    # ---- a conversation: one row, turn after turn

    def in_use(self, steps: int) -> list[int]:
        """Decode slots of each layer that the first `steps` steps of a turn have written."""
        return (self.plan[:steps, :, 0] < 0).sum(0).tolist()

    def room(self, steps: int) -> int:
        """Prompt slots that are free for the next turn, after an answer of this many steps."""
        taken = zip(self.layers, self.used, self.in_use(steps), strict=True)
        return min(layer.prompt_slots - used - in_use for layer, used, in_use in taken)

    def settle(self, steps: int, position: int) -> None:
        """End an answer of this many steps: what is left of its tokens before `position` stays, and the rest goes."""
        self.drop(position)
        in_use = self.in_use(steps)
        for layer, start, count in zip(self.layers, self.used, in_use, strict=True):
            layer.settle(start, count)
        self.used = [start + count for start, count in zip(self.used, in_use, strict=True)]
        self.position = position

    def begin_turn(self, n: int) -> tuple[Tensor, list]:
        """Prepare for n more tokens; returns their positions [1, n] and the attention of each layer that reads them."""
        query_positions = self.position + torch.arange(n, device=self.lengths.device)[None]
        pairs = zip(self.layers, self.used, strict=True)
        attends = [partial(layer.join, start, query_positions) for layer, start in pairs]
        self.used = [used + n for used in self.used]
        self.position += n
        return query_positions, attends

    def begin_output(self) -> None:
        """Note what is held before an answer: its position, and the tokens that count as prompt."""
        self.lengths.fill_(self.position)
        held = torch.stack([(layer.pos >= 0).sum((1, 2)) for layer in self.layers])  # [n_layers, B]: in all heads
        self.kept.copy_(kernels.sum_over_ranks(held, self.config.n_ranks) / self.config.all_kv_heads)
        for layer in self.layers:
            if layer.prompt_is_evictable:
                layer.count_prompt(self.lengths)

    def drop(self, position: int) -> None:
        """Forget the tokens from this position on."""
        for layer in self.layers:
            layer.pos.masked_fill_(layer.pos >= position, -1)

    def snapshot(self) -> CacheSnapshot:
        scores = [layer.score.clone() for layer in self.layers if layer.prompt_is_evictable]
        return CacheSnapshot(self.position, tuple(self.used), self.kept.clone(), scores)

    def rewind(self, snapshot: CacheSnapshot) -> None:
        """Forget what came after the snapshot. A frozen prompt is then bit for bit as it was. A pool that prompt and
        output share cannot bring back the prompt tokens that it has evicted since."""
        self.drop(snapshot.position)
        self.used = list(snapshot.used)
        self.position = snapshot.position
        self.lengths.fill_(snapshot.position)
        self.kept.copy_(snapshot.kept)
        scored = [layer for layer in self.layers if layer.prompt_is_evictable]
        for layer, score in zip(scored, snapshot.scores, strict=True):
            layer.score.copy_(score)
        if not self.policy.strategy.frozen_prompt:
            self.begin_output()
