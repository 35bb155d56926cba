"""The static KV cache: every buffer allocated once, then filled, appended to and evicted from in place.

    slot   0                 prompt_slots                       n_slots
           | the prompt, frozen | generated tokens, any order ... |
    pos    | 0 1 2 3 4 .. -1 -1 | 17  9 12 -1 16 ...              |    -1: dead, nothing attends to it

A token never moves. Eviction marks its slot dead, and a later token overwrites it: K and V are written
once per token and never gathered. The order of slots means nothing, because RoPE is applied before caching.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from model import ModelConfig
from scope import SCORES, Policy, schedule


class Now(NamedTuple):
    """One decode step, as tensors: nothing here is a Python number that a compiled graph would freeze."""

    position: Tensor  # [B] of the token being written
    reuse: Tensor  # the three fields of scope.Step, 0-dim
    fresh: Tensor
    evict: Tensor


class LayerCache(nn.Module):
    """One layer's slots. `fill`, `append` and `select` are what the model calls attention."""

    def __init__(self, shape: tuple[int, int, int, int], prompt_slots: int, max_evict: int, policy: Policy, dtype):
        super().__init__()
        batch, n_kv_heads, n_slots, head_dim = shape
        self.prompt_slots = prompt_slots
        self.max_evict = max_evict
        self.window = policy.strategy.window(policy)
        self.score_rule = SCORES[policy.score]
        self.register_buffer("k", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v", torch.zeros(shape, dtype=dtype))
        self.register_buffer("pos", torch.full(shape[:3], -1, dtype=torch.int32))
        scored = n_slots - prompt_slots if max_evict else 0  # only what may be evicted is ranked
        self.register_buffer("score", torch.zeros(batch, n_kv_heads, scored))
        self.register_buffer("victims", torch.zeros(batch, n_kv_heads, max_evict, dtype=torch.int64))

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.pos.fill_(-1)

    def fill(self, lengths: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Prefill: the prompt's K and V [B, H, S, head_dim] take the first S slots; padding stays dead."""
        index = torch.arange(k.shape[2], device=k.device, dtype=torch.int32)
        self.k[:, :, : k.shape[2]] = k
        self.v[:, :, : k.shape[2]] = v
        self.pos[:, :, : k.shape[2]] = torch.where(index < lengths[:, None], index, -1)[:, None]
        return kernels.causal_attention(q, k, v)

    def append(self, now: Now, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write one token, attend to everything live, itself included."""
        self.write(now, k, v)
        y, prob = kernels.attend_slots(q, self.k, self.v, self.pos >= 0)
        if self.max_evict and self.score_rule.every_step:
            self.update_score(now, prob)
        return y

    def select(self, now: Now, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `append`; then the lowest-scored generated tokens die, by the score that includes this step."""
        self.write(now, k, v)
        y, prob = kernels.attend_slots(q, self.k, self.v, self.pos >= 0)
        self.update_score(now, prob)
        self.evict(now)
        return y

    def write(self, now: Now, k: Tensor, v: Tensor) -> None:
        slot = self.next_slot(now)
        kernels.write_slots(self.k, slot, k)
        kernels.write_slots(self.v, slot, v)
        kernels.write_slots(self.pos, slot, now.position.int()[:, None, None].expand_as(slot))

    def next_slot(self, now: Now) -> Tensor:
        """[B, H, 1]: each head's own victim of the last selection, or the fresh slot they all have in common."""
        fresh = (now.fresh + self.prompt_slots).expand(*self.pos.shape[:2], 1)
        if not self.max_evict:
            return fresh
        victim = self.victims.index_select(-1, now.reuse.clamp(min=0).view(1))
        return torch.where(now.reuse >= 0, victim, fresh)

    def age(self, now: Now) -> Tensor:
        """[B, H, n_decode_slots] steps that have seen each generated token; 1 for the newest."""
        return now.position.int()[:, None, None] - self.pos[:, :, self.prompt_slots :] + 1

    def update_score(self, now: Now, prob: Tensor) -> None:
        age = self.age(now)
        inherited = torch.where(age == 1, 0.0, self.score)  # a new token starts from nothing, not from its victim
        self.score.copy_(self.score_rule.update(inherited, prob[:, :, self.prompt_slots :], age))

    def evict(self, now: Now) -> None:
        """The `now.evict` lowest-scored of the tokens older than the window die. No K or V moves."""
        pos = self.pos[:, :, self.prompt_slots :]
        evictable = (pos >= 0) & (self.age(now) > self.window)
        victims = kernels.lowest(self.score, pos, evictable, self.max_evict) + self.prompt_slots
        dies = torch.arange(self.max_evict, device=pos.device) < now.evict
        kernels.write_slots(self.pos, victims, torch.where(dies, -1, self.pos.gather(2, victims)))
        self.victims.copy_(victims)


class Cache(nn.Module):
    """All layers of one batch, for one policy and one length. The only state there is between two steps."""

    def __init__(self, config: ModelConfig, policy: Policy, batch: int, prompt_slots: int, max_new_tokens: int, dtype):
        super().__init__()
        plan = schedule(policy, max_new_tokens)
        shape = (batch, config.n_kv_heads, prompt_slots + plan.n_slots, config.head_dim)
        self.prompt_slots = prompt_slots
        self.steps = plan.steps
        self.layers = nn.ModuleList(
            LayerCache(shape, prompt_slots, plan.max_evict, policy, dtype) for _ in range(config.n_layers)
        )
        self.register_buffer("lengths", torch.zeros(batch, dtype=torch.int64))
        self.register_buffer("plan", torch.tensor(plan.steps).view(-1, 3))

    @property
    def decode_slots(self) -> int:
        return self.layers[0].pos.shape[2] - self.prompt_slots

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer: K, V and what eviction needs beside them."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def positions(self) -> Tensor:
        """[n_layers, B, n_kv_heads, n_slots] int32: the token that each slot holds, -1 = dead."""
        return torch.stack([layer.pos for layer in self.layers])

    def reset(self) -> None:
        self.lengths.zero_()
        for layer in self.layers:
            layer.reset()

    def fills(self, lengths: Tensor) -> list:
        """Per layer, the attention of a prefill of right-padded prompts of these lengths [B]."""
        self.lengths.copy_(lengths)
        return [partial(layer.fill, self.lengths) for layer in self.layers]

    def now(self, t: int) -> Now:
        """Step t, 1-based."""
        return Now(self.lengths + (t - 1), *self.plan[t - 1])

    def appends(self, now: Now) -> list:
        return [partial(layer.append, now) for layer in self.layers]

    def selects(self, now: Now) -> list:
        return [partial(layer.select, now) for layer in self.layers]
