"""The static KV cache: every buffer allocated once, then filled, appended to and evicted from in place.

    slot   0               prompt_slots                       n_slots
           | the prompt's    | generated tokens, any order ... |
    pos    | 0 1 4 5 7 .. -1 | 17  9 12 -1 16 ...              |    -1: dead, nothing attends to it

A token never moves. Eviction marks its slot dead, and a later token overwrites it: K and V are written
once per token and never gathered. The order of slots means nothing, because RoPE is applied before caching.

A conversation goes on in the same buffers. Before a later turn is read, what is left of the last answer is copied
behind the prompt, once, and the decode slots are free again; `rewind` marks dead whatever came after a moment.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import kernels
from model import ModelConfig
from scope import Policy, Prompt, for_layer, schedule

PROMPT_SLOTS = 64  # slots for whole prompts are a multiple of this: a slightly longer one finds its graphs compiled
READ_BUCKET = 256  # slots by which the prefix that attention reads grows: each value compiles a graph of its own


class Shape(NamedTuple):
    """What a cache must have room for."""

    batch: int
    lengths: list[int]  # of the prompts
    T: int  # most tokens to generate; in a conversation, in each turn
    prompt_slots: int = 0  # per KV head of every layer, for the prompt and later turns; 0: what the prompts need


class Mark(NamedTuple):
    """A moment of a conversation: what came after it can be forgotten."""

    position: int  # of the next token
    used: tuple[int, ...]  # prompt slots of each layer
    kept: Tensor  # as in Now
    scores: list[Tensor]  # of each layer whose prompt is ranked: later tokens change them


class Now(NamedTuple):
    """One decode step. All but `reads` are tensors, which no compiled graph freezes."""

    reads: int  # decode slots in use, rounded up: the only number that a graph is compiled for
    position: Tensor  # [B] of the token being written
    kept: Tensor  # [n_layers, B] tokens kept of the prompt, per KV head
    plan: Tensor  # [n_layers, 3]: each layer's scope.Step


class LayerCache(nn.Module):
    """One layer's slots. `fill`, `append` and `select` are what the model calls attention."""

    def __init__(self, layer: int, shape: tuple, prompt_slots: int, max_evict: int, policy: Policy, dtype):
        super().__init__()
        batch, n_kv_heads, n_slots, _ = shape  # and head_dim
        self.layer = layer
        self.prompt_slots = prompt_slots
        self.max_evict = max_evict
        self.policy = policy
        self.pool = prompt_slots if policy.strategy.frozen_prompt else 0  # the first slot that may ever be evicted
        self.scored = bool(max_evict) and policy.ranking.every_step
        self.ranks_prompt = bool(max_evict) and self.pool == 0
        self.register_buffer("k", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype))
        self.register_buffer("pos", torch.full(shape[:3], -1, dtype=torch.int32))
        self.register_buffer("score", torch.zeros(batch, n_kv_heads, n_slots - self.pool if max_evict else 0))
        self.register_buffer("victims", torch.zeros(batch, n_kv_heads, max_evict, dtype=torch.int64))

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.pos.fill_(-1)

    # ---- prefill

    def fill(self, lengths: Tensor, kept: Tensor | None, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the whole prompt; of its K and V [B, H, S, head_dim] only what is kept is ever stored.

        lengths and kept [B]: tokens of each row's prompt, and how many of them stay; None: all.
        """
        y = kernels.causal_attention(q, k, v)
        slot = kernels.slot_numbers(k)
        pos = torch.where(slot < lengths[:, None, None], slot, -1)
        score = self.prompt_score(q, k, lengths)
        if kept is not None:
            pos = self.choose(lengths, kept, prompt, q, k)
            k, v, score = pick(k, pos), pick(v, pos), pick(score[..., None], pos)[..., 0]
        n = pos.shape[2]
        self.k[:, :, :n], self.v[:, :, :n], self.pos[:, :, :n] = k, v, pos
        if self.ranks_prompt:
            self.score[:, :, :n] = score
        return y

    def prompt_score(self, q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        """[B, H, S]: what the prompt's own queries make of each token, where prompt and output share one pool."""
        if self.pool or not self.scored:
            return torch.zeros(k.shape[:3], device=k.device)
        received = kernels.received_attention(q, k, lengths)
        seen_by = lengths[:, None, None] - kernels.slot_numbers(k)  # queries
        return self.policy.ranking.update(torch.zeros_like(received), received, seen_by)

    def choose(self, lengths: Tensor, kept: Tensor, prompt: Prompt, q: Tensor, k: Tensor) -> Tensor:
        """The prompt positions that stay, [B, H, prompt_slots] int32, -1 = none."""
        score = prompt.compressor.score(q, k, lengths, prompt.obs_window)
        newest = kernels.slot_numbers(k) >= lengths[:, None, None] - prompt.obs_window
        others = (kept - prompt.obs_window).clamp(min=0)
        floor = kept - others + (others * prompt.compressor.head_floor).long()
        return kernels.highest(score.masked_fill(newest, torch.inf), lengths, kept, floor, self.prompt_slots)

    # ---- later turns of a conversation

    def settle(self, first: int, count: int) -> None:
        """The first `count` decode slots, dead ones and all, become prompt slots from `first` on: a copy per turn."""
        old, new = slice(self.prompt_slots, self.prompt_slots + count), slice(first, first + count)
        for buffer in (self.k, self.v, self.pos, *[self.score] * self.ranks_prompt):
            buffer[:, :, new] = buffer[:, :, old]
        self.pos[:, :, self.prompt_slots :] = -1

    def join(self, first: int, asking: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A turn's block takes the prompt slots from `first` on; its tokens, at positions asking [B, n], attend to
        whatever lives and is no newer than they are."""
        end = first + k.shape[2]
        self.k[:, :, first:end], self.v[:, :, first:end] = k, v
        self.pos[:, :, first:end] = asking[:, None]
        pos = self.pos[:, :, :end]
        y, received = kernels.attend_block(q, self.k[:, :, :end], self.v[:, :, :end], pos, asking)
        if self.ranks_prompt and self.scored:
            self.score[:, :, first:end] = 0.0
            seen_by = asking[:, None, -1:] + 1 - pos
            self.score[:, :, :end] = self.policy.ranking.update(self.score[:, :, :end], received, seen_by)
        return y

    # ---- decode

    def append(self, now: Now, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write one token, attend to everything live, itself included."""
        self.write(now, k, v)
        y, prob = self.attend(now, q)
        if self.scored:
            self.update_score(now, prob)
        return y

    def select(self, now: Now, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `append`; then the lowest-scored tokens die, by the score that includes this step."""
        self.write(now, k, v)
        y, prob = self.attend(now, q)
        if self.max_evict:
            self.update_score(now, prob)
            self.evict(now)
        return y

    def write(self, now: Now, k: Tensor, v: Tensor) -> None:
        slot = self.next_slot(*now.plan[self.layer, :2])
        kernels.write_slots(self.k, slot, k)
        kernels.write_slots(self.v, slot, v)
        kernels.write_slots(self.pos, slot, now.position.int()[:, None, None].expand_as(slot))

    def next_slot(self, reuse: Tensor, fresh: Tensor) -> Tensor:
        """[B, H, 1]: each head's own victim of the last selection, or the fresh slot they all have in common."""
        fresh = (fresh + self.prompt_slots).expand(*self.pos.shape[:2], 1)
        if not self.max_evict:
            return fresh
        victim = self.victims.index_select(-1, reuse.clamp(min=0).view(1))
        return torch.where(reuse >= 0, victim, fresh)

    def attend(self, now: Now, q: Tensor) -> tuple[Tensor, Tensor]:
        """Over the slots in use, a prefix; their probabilities are [B, H, prompt_slots + reads]."""
        n = self.prompt_slots + now.reads
        return kernels.attend_slots(q, self.k[:, :, :n], self.v[:, :, :n], self.pos[:, :, :n] >= 0)

    def pooled(self, now: Now) -> Tensor:
        """[B, H, n] positions in the slots that evict together and are in use."""
        return self.pos[:, :, self.pool : self.prompt_slots + now.reads]

    def age(self, now: Now) -> Tensor:
        """[B, H, n] steps that have seen each token that may be evicted; 1 for the newest."""
        return now.position.int()[:, None, None] - self.pooled(now) + 1

    def update_score(self, now: Now, prob: Tensor) -> None:
        age = self.age(now)
        score = self.score[:, :, : age.shape[2]]
        inherited = torch.where(age == 1, 0.0, score)  # a new token starts from nothing, not from its victim
        score.copy_(self.policy.ranking.update(inherited, prob[:, :, self.pool :], age))

    def evict(self, now: Now) -> None:
        """The lowest-scored of the tokens older than the window die, as many as the plan says. No K or V moves."""
        pos = self.pooled(now)
        window = self.policy.strategy.window(self.policy, now.kept[self.layer][:, None, None])
        evictable = (pos >= 0) & (self.age(now) > window)
        most = min(self.max_evict, pos.shape[2])  # a later selection may take more than there are now
        victims = kernels.lowest(self.score[:, :, : pos.shape[2]], pos, evictable, most) + self.pool
        count = now.plan[self.layer, 2]
        dies = torch.arange(most, device=pos.device) < count
        kernels.write_slots(self.pos, victims, torch.where(dies, -1, self.pos.gather(2, victims)))
        old = self.victims[:, :, :most]
        old.copy_(torch.where(count > 0, victims, old))  # 0: only another layer selects now


def pick(x: Tensor, pos: Tensor) -> Tensor:
    """x [B, H, S, d], pos [B, H, n] -> [B, H, n, d]; where pos is -1, anything."""
    return x.gather(2, pos.clamp(min=0).long()[..., None].expand(-1, -1, -1, x.shape[3]))


class Cache(nn.Module):
    """All layers of one batch, for one policy and one length. The only state there is between two steps."""

    def __init__(self, config: ModelConfig, policy: Policy, prompt: Prompt, shape: Shape, dtype):
        super().__init__()
        self.config, self.policy, self.prompt = config, policy, prompt
        policies = [for_layer(policy, layer, config.n_layers) for layer in range(config.n_layers)]
        plans = [schedule(each, shape.T) for each in policies]
        self.layers = nn.ModuleList()
        for layer, (each, plan) in enumerate(zip(policies, plans, strict=True)):
            prompt_slots = self.allocated_for(layer, shape)
            size = (shape.batch, config.n_kv_heads, prompt_slots + plan.n_slots, config.head_dim)
            self.layers.append(LayerCache(layer, size, prompt_slots, plan.max_evict, each, dtype))
        steps = list(zip(*(plan.steps for plan in plans), strict=True))  # [T][n_layers]
        self.graph_at = self.graphs(steps, max(plan.n_slots for plan in plans))
        self.register_buffer("plan", torch.tensor(steps))  # [T, n_layers, 3]
        self.register_buffer("lengths", torch.zeros(shape.batch, dtype=torch.int64))
        self.register_buffer("kept", torch.zeros(config.n_layers, shape.batch, dtype=torch.int64))
        self.used = [0] * config.n_layers  # prompt slots of each layer that a conversation has filled
        self.position = 0  # of its next token

    def allocated_for(self, layer: int, shape: Shape) -> int:
        """Prompt slots of a layer. Where whole prompts stay, a slightly longer one finds the same number."""
        slots = self.slots_for(layer, shape.lengths)
        if not shape.prompt_slots:
            return -(-slots // PROMPT_SLOTS) * PROMPT_SLOTS if slots == max(shape.lengths) else slots
        if slots > shape.prompt_slots:
            need = f"a prompt of {max(shape.lengths)} tokens needs {slots} slots, max_context is {shape.prompt_slots}"
            raise ValueError(f"{need}: raise --max-context, or shorten the prompt")
        return shape.prompt_slots

    def slots_for(self, layer: int, lengths: list[int]) -> int:
        """Slots that prompts of these lengths fill: one for each token that a head may keep."""
        most = max(self.kept_of(layer, length) for length in lengths)
        others = most - min(self.prompt.obs_window, most)
        shared = others - int(others * self.prompt.compressor.head_floor)  # what each head may lose to another
        return min(max(lengths), most + shared * (self.config.n_kv_heads - 1))

    def kept_of(self, layer: int, length: int) -> int:
        """Tokens that stay of a prompt per KV head of this layer; the mean of its heads where they differ."""
        if self.prompt.compressor.score is None:
            return length
        spread = self.prompt.compressor.spread or self.policy.strategy.spread
        return spread(self.prompt.budget, layer, self.config.n_layers, length)

    def graphs(self, steps: list, n_slots: int) -> list[tuple[bool, int]]:
        """For each step, what picks its compiled graph: whether it selects, and how many decode slots it reads.

        The full cache reads all of them, as static caches do; a pool that grows reads what it has grown to.
        """
        graphs, used = [], 0
        bucket = READ_BUCKET if self.policy.strategy.grows else n_slots
        for layers in steps:
            used = max(used, *(step.fresh + 1 for step in layers if step.reuse < 0), 0)
            graphs.append((any(step.evict for step in layers), min(-(-used // bucket) * bucket, n_slots)))
        return graphs

    @property
    def slots(self) -> tuple[list[int], list[int]]:
        """Prompt slots and decode slots of each layer."""
        prompt = [layer.prompt_slots for layer in self.layers]
        return prompt, [layer.pos.shape[2] - n for layer, n in zip(self.layers, prompt, strict=True)]

    def held(self) -> Tensor:
        """[n_layers, B] tokens held now per KV head, the mean of the heads."""
        return torch.stack([(layer.pos >= 0).sum(2).float().mean(1) for layer in self.layers])

    def decode_peak(self, t: int) -> float:
        """The most tokens beyond the prompt's that a KV head has held up to step t, the mean of the layers."""
        evict = self.plan[:t, :, 2].cpu()
        held = torch.arange(1, t + 1)[:, None] - evict.cumsum(0) + evict  # [t, n_layers], as the step attends
        return held.amax(0).float().mean().item() if t else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: K, V and what eviction needs beside them."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def positions(self) -> Tensor:
        """[n_layers, B, n_kv_heads, n_slots] int32: the token in each slot, -1 = dead; short layers end in -1."""
        n_slots = max(layer.pos.shape[2] for layer in self.layers)
        return torch.stack([pad(layer.pos, (0, n_slots - layer.pos.shape[2]), value=-1) for layer in self.layers])

    def reset(self) -> None:
        self.lengths.zero_()
        self.kept.zero_()
        self.used, self.position = [0] * len(self.layers), 0
        for layer in self.layers:
            layer.reset()

    def fills(self, lengths: list[int]) -> list:
        """Per layer, the attention of a prefill of right-padded prompts of these lengths."""
        kept = [[self.kept_of(layer.layer, length) for length in lengths] for layer in self.layers]
        self.used, self.position = [self.slots_for(layer.layer, lengths) for layer in self.layers], max(lengths)
        self.lengths.copy_(torch.tensor(lengths))
        self.kept.copy_(torch.tensor(kept))
        keeps = [None if row == lengths else self.kept[layer] for layer, row in enumerate(kept)]
        return [
            partial(layer.fill, self.lengths, keep, self.prompt) for layer, keep in zip(self.layers, keeps, strict=True)
        ]

    def now(self, t: int, reads: int) -> Now:
        """Step t, 1-based, reading that many decode slots."""
        return Now(reads, self.lengths + (t - 1), self.kept, self.plan[t - 1])

    def appends(self, now: Now) -> list:
        return [partial(layer.append, now) for layer in self.layers]

    def selects(self, now: Now) -> list:
        return [partial(layer.select, now) for layer in self.layers]

    # ---- a conversation: one row, turn after turn

    def in_use(self, steps: int) -> list[int]:
        """Decode slots of each layer that the first `steps` steps of a turn have written."""
        return (self.plan[:steps, :, 0] < 0).sum(0).tolist()

    def room(self, steps: int) -> int:
        """Prompt slots that a turn of that many steps leaves for the next one."""
        taken = zip(self.layers, self.used, self.in_use(steps), strict=True)
        return min(layer.prompt_slots - used - in_use for layer, used, in_use in taken)

    def settle(self, steps: int, position: int) -> None:
        """End a turn of that many steps: what is left of its output up to a position stays for good, with the next turn
        a new budget begins."""
        self.drop(position)
        in_use = self.in_use(steps)
        for layer, first, count in zip(self.layers, self.used, in_use, strict=True):
            layer.settle(first, count)
        self.used = [first + count for first, count in zip(self.used, in_use, strict=True)]
        self.position = position

    def joins(self, n: int) -> tuple[Tensor, list]:
        """Positions [1, n] of the next n tokens to be read, and per layer the attention that reads them."""
        asking = self.position + torch.arange(n, device=self.lengths.device)[None]
        attends = [partial(layer.join, first, asking) for layer, first in zip(self.layers, self.used, strict=True)]
        self.used = [used + n for used in self.used]
        self.position += n
        return asking, attends

    def count(self) -> None:
        """Where the output begins, and how much there is before it."""
        self.lengths.fill_(self.position)
        self.kept.copy_(self.held())

    def drop(self, position: int) -> None:
        """Forget the tokens from this position on."""
        for layer in self.layers:
            layer.pos.masked_fill_(layer.pos >= position, -1)

    def mark(self) -> Mark:
        scores = [layer.score.clone() for layer in self.layers if layer.ranks_prompt]
        return Mark(self.position, tuple(self.used), self.kept.clone(), scores)

    def rewind(self, mark: Mark) -> None:
        """Forget what came after the mark. A frozen prompt is then as it was, whatever was generated since; a pool
        that prompt and output share has lost for good the prompt tokens that it evicted."""
        self.drop(mark.position)
        self.used, self.position = list(mark.used), mark.position
        self.lengths.fill_(mark.position)
        self.kept.copy_(mark.kept)
        for layer, score in zip([layer for layer in self.layers if layer.ranks_prompt], mark.scores, strict=True):
            layer.score.copy_(score)
        if not self.policy.strategy.frozen_prompt:
            self.count()
