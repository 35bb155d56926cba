"""The tensor ops of attention and eviction: plain PyTorch that `torch.compile` fuses.

Each is readable next to a slow twin in `tests/oracle.py`. H is n_kv_heads, G the query heads of one KV head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H * G, S, head_dim], k and v [B, H, S, head_dim] -> [B, H * G, S, head_dim].

    Right-padded rows need no mask: no real token looks to its right.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def attend_slots(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """One query per row over the live slots, in whatever order they lie: RoPE is already in the keys.

    q [B, H * G, 1, head_dim], k and v [B, H, n_slots, head_dim], live [B, H, n_slots] bool
    -> output [B, H * G, 1, head_dim], probability [B, H, n_slots] float32, averaged over the group.
    """
    grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, H, G, head_dim]: K is read once per group
    logits = (grouped @ k.transpose(-1, -2)).float() * k.shape[-1] ** -0.5  # [B, H, G, n_slots]
    prob = logits.masked_fill(~live[:, :, None], float("-inf")).softmax(-1)
    return (prob.to(v.dtype) @ v).flatten(1, 2).unsqueeze(2), prob.mean(2)


def write_slots(buffer: Tensor, slots: Tensor, values: Tensor) -> None:
    """buffer [B, H, n_slots, ...], slots [B, H, n], values [B, H, n, ...]: in place, n slots of each head.

    Indexed assignment, not `scatter_`: the compiler turns only this one back into a write in place.
    """
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
    buffer[rows, heads, slots] = values


def lowest(score: Tensor, pos: Tensor, evictable: Tensor, count: int) -> Tensor:
    """The `count` slots to evict first, [B, H, count]: lowest score first, of equal scores the older token.

    score float32, pos int32, evictable bool, each [B, H, n_slots]. Score and position make one integer: a float's
    bits order like the float (negative ones after a flip), so they fill the high half and the position the low.
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = torch.where(evictable, (bits.long() << 32) | pos.long(), torch.iinfo(torch.int64).max)
    if count == 1:
        return key.argmin(-1, keepdim=True)
    return key.topk(count, largest=False, sorted=True).indices
