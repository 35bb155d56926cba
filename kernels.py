"""The tensor ops of attention, scoring and eviction: plain PyTorch that `torch.compile` fuses.

Each is readable next to a slow twin in tests/. H is n_kv_heads, G the query heads of one KV head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- prefill ----------------------------------------------------------------------------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H * G, S, head_dim], k and v [B, H, S, head_dim] -> [B, H * G, S, head_dim].

    Right-padded rows need no mask: no real token looks to its right.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


BLOCK_SCORES = 2**23  # scores held at a time: memory grows with S, never with S x S


def received_attention(q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
    """Attention probability that each prompt token receives from all of the prompt's queries, causal.

    q [B, H * G, S, head_dim], k [B, H, S, head_dim], lengths [B] -> [B, H, S] float32, summed over the queries and
    averaged over the group.
    """
    received = torch.zeros(k.shape[:3], device=k.device)
    step = max(1, BLOCK_SCORES // (q.shape[0] * q.shape[1] * q.shape[2]))
    for start in reversed(range(0, k.shape[2], step)):  # the largest block first: later ones fit into its memory
        asking = torch.arange(start, min(start + step, k.shape[2]), device=k.device)
        end = start + len(asking)  # no query of this block sees a later key, and only its own keys need a mask
        logits = scaled_scores(q[:, :, start:end], k[:, :, :end])
        logits[..., start:].masked_fill_(asking > asking[:, None], float("-inf"))
        prob = logits.softmax(-1, dtype=torch.float32)
        real = (asking < lengths[:, None]).float()[:, None, None, None]  # [B, 1, 1, 1, n]: padding asks nothing
        received[:, :, :end] += (real @ prob).squeeze(3).mean(2)
    return received


def received_from_last(q: Tensor, k: Tensor, lengths: Tensor, last: int) -> Tensor:
    """As `received_attention`, from the `last` queries of each row only."""
    asking = lengths[:, None] - last + torch.arange(last, device=k.device)  # [B, n]; negative: none
    index = asking.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    logits = scaled_scores(q.gather(2, index), k)
    unseen = torch.arange(k.shape[2], device=k.device) > asking[:, :, None]  # [B, n, S]
    prob = logits.masked_fill_(unseen[:, None, None], float("-inf")).softmax(-1, dtype=torch.float32)
    return prob.nan_to_num_(0.0).sum(3).mean(2)  # NaN: a query that is not there sees nothing


def attend_block(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, asking: Tensor) -> tuple[Tensor, Tensor]:
    """Many queries over slots in any order; each sees the live ones that are no newer than itself.

    q [B, H * G, n, head_dim], k and v [B, H, n_slots, head_dim], pos [B, H, n_slots] of the tokens there (-1: dead),
    asking [B, n] of the queries -> output [B, H * G, n, head_dim], attention received [B, H, n_slots] float32, summed
    over the queries and averaged over the group.
    """
    outputs, received = [], torch.zeros(k.shape[:3], device=k.device)
    step = max(1, BLOCK_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for queries, positions in zip(q.split(step, dim=2), asking.split(step, dim=1), strict=True):
        unseen = (pos < 0)[:, :, None] | (pos[:, :, None] > positions[:, None, :, None])  # [B, H, n, n_slots]
        logits = scaled_scores(queries, k).masked_fill_(unseen[:, :, None], float("-inf"))
        prob = logits.softmax(-1, dtype=torch.float32)  # [B, H, G, n, n_slots]
        outputs.append((prob.to(v.dtype) @ v[:, :, None]).flatten(1, 2))
        received += prob.sum(3).mean(2)
    return torch.cat(outputs, 2), received


def scaled_scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, H * G, n, head_dim], k [B, H, S, head_dim] -> [B, H, G, n, S]."""
    return q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2) * k.shape[-1] ** -0.5


# ---- decode -----------------------------------------------------------------------------------------------


def fuses(x: Tensor) -> bool:
    """Inside a CPU graph, where sums of products compile into one pass over memory at its full bandwidth.

    A matrix library called with a few rows packs and dispatches for longer than it reads: 10 against 27 GB/s.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu"


# Up to here the compiler fuses the rows' sums, so that each weight is read once; beyond, arithmetic is short.
FEW_ROWS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    if not (fuses(x) and x.shape[:-1].numel() <= FEW_ROWS):
        return F.linear(x, weight, bias)
    # A sum per row: one sum over [out, rows, in] is not vectorized, and takes ten times as long. Two halves of
    # the weight share a loop: a sum alone waits for its own last addition.
    rows, halves = x.flatten(0, -2).float(), weight.chunk(2)
    y = torch.stack([torch.cat([(half.float() * row).sum(-1) for half in halves]) for row in rows])
    y = y.to(x.dtype).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def attend_slots(q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """One query per row over the live slots, in whatever order they lie: RoPE is already in the keys.

    q [B, H * G, 1, head_dim], k and v [B, H, n_slots, head_dim], live [B, H, n_slots] bool
    -> output [B, H * G, 1, head_dim], probability [B, H, n_slots] float32, averaged over the group.
    """
    grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, H, G, head_dim]: K is read once per group
    if fuses(q):
        logits = (grouped[:, :, :, None].float() * k[:, :, None].float()).sum(-1)
    else:
        logits = (grouped @ k.transpose(-1, -2)).float()
    logits = (logits * k.shape[-1] ** -0.5).masked_fill(~live[:, :, None], float("-inf"))
    prob = logits.softmax(-1)  # [B, H, G, n_slots]
    y = weighted_sum(prob, v) if fuses(q) else prob.to(v.dtype) @ v
    return y.flatten(1, 2).unsqueeze(2), prob.mean(2)


VECTOR = 32  # channels of V that a CPU adds up at once


def weighted_sum(prob: Tensor, v: Tensor) -> Tensor:
    """prob [B, H, G, n_slots], v [B, H, n_slots, head_dim] -> [B, H, G, head_dim], as sums that compile into one pass.

    One sum over all channels is compiled to a sweep of V for each vector of them where V is a prefix of the slots.
    """
    sums = [(prob[..., None] * part[:, :, None].float()).sum(3) for part in v.split(VECTOR, -1)]
    return torch.cat(sums, -1).to(v.dtype)


def write_slots(buffer: Tensor, slots: Tensor, values: Tensor) -> None:
    """buffer [B, H, n_slots, ...], slots [B, H, n], values [B, H, n, ...]: in place, n slots of each head.

    Indexed assignment, not `scatter_`: the compiler turns only this one back into a write in place.
    """
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
    buffer[rows, heads, slots] = values


def slot_numbers(k: Tensor) -> Tensor:
    """[B, H, n, ...] -> 0 .. n - 1, as [B, H, n] int32."""
    return torch.arange(k.shape[2], device=k.device, dtype=torch.int32).expand(k.shape[:3])


# ---- ranking ----------------------------------------------------------------------------------------------


def rank_key(score: Tensor, pos: Tensor) -> Tensor:
    """One int64 that orders by score, and of equal scores the older token lower. score float32, pos int32.

    A float's bits order like the float (negative ones after a flip): they fill the high half, the position the low.
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) | pos.long()


def lowest(score: Tensor, pos: Tensor, evictable: Tensor, count: int) -> Tensor:
    """The `count` slots to evict first, [B, H, count]: lowest score first, of equal scores the older token.

    score float32, pos int32, evictable bool, each [B, H, n_slots].
    """
    key = torch.where(evictable, rank_key(score, pos), torch.iinfo(torch.int64).max)
    if count == 1:
        return key.argmin(-1, keepdim=True)
    return key.topk(count, largest=False, sorted=True).indices


def highest(score: Tensor, lengths: Tensor, budget: Tensor, floor: Tensor, n_slots: int) -> Tensor:
    """The prompt tokens to keep: positions [B, H, n_slots] in ascending order, -1 where a slot stays empty.

    score [B, H, S], lengths [B]. Each head keeps its best `floor` [B] tokens; the heads of a row share what is left of
    H * `budget` [B] among their best others.
    """
    B, H, S = score.shape
    pos = slot_numbers(score)
    key = torch.where(pos < lengths[:, None, None], rank_key(score, pos), torch.iinfo(torch.int64).min)
    rank = key.argsort(-1, descending=True).argsort(-1)  # within the head, 0 = best
    shared = torch.where(rank < floor[:, None, None], torch.iinfo(torch.int64).max, key)
    overall = shared.flatten(1).argsort(stable=True, dim=-1, descending=True).argsort(-1).view(B, H, S)
    kept = (overall < H * budget[:, None, None]) & (pos < lengths[:, None, None])
    positions = torch.where(kept, pos, S).sort(-1).values[:, :, :n_slots]
    return torch.where(positions < S, positions, -1)
