"""The tensor ops of attention, scoring and eviction: plain PyTorch that `torch.compile` fuses.

tests/core/test_kernels.py compares each one with a slow version of it. In the shapes, H is n_kv_heads and G is the
number of query heads that share one KV head.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ---- prefill ----------------------------------------------------------------------------------------------


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H * G, S, head_dim], k and v [B, H, S, head_dim] -> [B, H * G, S, head_dim].

    Rows that are padded on the right need no mask of their own: a causal query never sees what is to its right.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


BLOCK_SCORES = 2**23  # attention scores held in memory at a time, so that memory does not grow with S x S


def received_attention(q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
    """The attention probability that each prompt token receives from all queries of the prompt, causal.

    q [B, H * G, S, head_dim], k [B, H, S, head_dim], lengths [B] -> [B, H, S] float32, summed over the queries and
    averaged over the group.
    """
    received = torch.zeros(k.shape[:3], device=k.device)
    block = max(1, BLOCK_SCORES // (q.shape[0] * q.shape[1] * q.shape[2]))
    for start in reversed(range(0, k.shape[2], block)):  # the largest block first: later ones fit into its memory
        query_positions = torch.arange(start, min(start + block, k.shape[2]), device=k.device)
        end = start + len(query_positions)  # keys from `end` on lie after all queries of this block
        logits = scaled_scores(q[:, :, start:end], k[:, :, :end])
        logits[..., start:].masked_fill_(query_positions > query_positions[:, None], float("-inf"))
        prob = logits.softmax(-1, dtype=torch.float32)
        real = (query_positions < lengths[:, None]).float()[:, None, None, None]  # [B, 1, 1, 1, n]: 0 for padding
        received[:, :, :end] += (real @ prob).squeeze(3).mean(2)
    return received


def received_from_last(q: Tensor, k: Tensor, lengths: Tensor, last: Tensor) -> Tensor:
    """`received_attention` from each row's `last` queries only; a row may have fewer. last [B] on the host: no device
    has to be waited for to know how many queries there are."""
    most = int(last.max())
    query_positions = lengths[:, None] - most + torch.arange(most, device=k.device)  # [B, most]
    first = (lengths - last.to(k.device)).clamp(min=0)[:, None]
    received = torch.zeros(k.shape[:3], device=k.device)
    block = max(1, BLOCK_SCORES // (q.shape[0] * q.shape[1] * q.shape[2]))
    for positions in query_positions.split(block, 1):
        index = positions.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        logits = scaled_scores(q.gather(2, index), k)
        unseen = torch.arange(k.shape[2], device=k.device) > positions[:, :, None]  # [B, n, S]
        prob = logits.masked_fill_(unseen[:, None, None], float("-inf")).softmax(-1, dtype=torch.float32)
        asks = (positions >= first)[:, None, None, :, None]  # a row with a shorter `last` asks with fewer queries
        received += prob.masked_fill_(~asks, 0.0).sum(3).mean(2)
    return received


def zero_weak_channels(q: Tensor, k: Tensor, pos: Tensor, lengths: Tensor, window: Tensor, share: float) -> Tensor:
    """ThinK (arXiv 2407.21018): the keys before each row's window with their weak channels set to 0.

    q [B, H * G, S, head_dim]; k [B, H, n, head_dim] at the positions pos [B, H, n] (-1: none); lengths, window [B];
    share: of the channels that stay. A channel is as strong as the product of its sums of squares, over the window's
    queries and over the keys. Queries (3, 0, 1), (4, 0, 1) and sums of keys (0.1, 9, 5): strengths 2.5, 0, 10.
    """
    start, end = (lengths - window.to(k.device))[:, None, None], lengths[:, None, None]
    asks = (slot_numbers(q) >= start) & (slot_numbers(q) < end)
    of_queries = (q.float() * asks[..., None]).square().sum(2).unflatten(1, (k.shape[1], -1)).sum(2)  # [B, H, head_dim]
    of_keys = (k.float() * (pos >= 0)[..., None]).square().sum(2)
    weak = ranks(of_queries * of_keys) >= max(1, round(share * k.shape[3]))
    return k.masked_fill(weak[:, :, None] & (pos < start)[..., None], 0.0)


def attend_block(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, query_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of many queries over slots in any order. A query sees the live tokens that are not newer than itself.

    q [B, H * G, n, head_dim], k and v [B, H, n_slots, head_dim], pos [B, H, n_slots] (-1: dead), query_positions [B, n]
    -> output [B, H * G, n, head_dim], attention received [B, H, n_slots] float32, summed over the queries and averaged
    over the group.
    """
    outputs, received = [], torch.zeros(k.shape[:3], device=k.device)
    block = max(1, BLOCK_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for queries, positions in zip(q.split(block, dim=2), query_positions.split(block, dim=1), strict=True):
        unseen = (pos < 0)[:, :, None] | (pos[:, :, None] > positions[:, None, :, None])  # [B, H, n, n_slots]
        logits = scaled_scores(queries, k).masked_fill_(unseen[:, :, None], float("-inf"))
        prob = logits.softmax(-1, dtype=torch.float32)  # [B, H, G, n, n_slots]
        outputs.append((prob.to(v.dtype) @ v[:, :, None]).flatten(1, 2))
        received += prob.sum(3).mean(2)
    return torch.cat(outputs, 2), received


def scaled_scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, H * G, n, head_dim], k [B, H, S, head_dim] -> [B, H, G, n, S]."""
    return q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2) * k.shape[-1] ** -0.5


# ---- how K and V are stored -------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Keys or values as they lie in memory: x = code * scale + low, with one scale and low for a group of channels.

    codes [B, H, n, head_dim] are x itself where a channel has 16 bits. With fewer they are words of 32 bits, [B, H, n,
    n_words]. With 8 bits and head_dim 64 there are 16 words; word 3 holds channels 3, 19, 35 and 51, the first of them
    in the lowest bits. scale, low [B, groups * H, n]: all heads of the first group, then all of the second, ...
    """

    codes: Tensor  # words have the dtype float32, but nobody uses them as numbers (see `code`)
    scale: Tensor | None = None
    low: Tensor | None = None
    bits: int = 16
    rotated: bool = False  # what is stored is rotate(x)

    @property
    def tensors(self) -> list[Tensor]:
        return [part for part in self[:3] if part is not None]

    @property
    def n_groups(self) -> int:
        return self.scale.shape[1] // self.codes.shape[1]

    def map(self, function) -> "Stored":
        """The same with `function` of each tensor."""
        return Stored(*(None if part is None else function(part) for part in self[:3]), self.bits, self.rotated)


def encode(x: Tensor, bits: int, n_groups: int, minimum: bool, rotated: bool = False) -> Stored:
    """x [B, H, n, head_dim] -> codes that `decode` turns back into x, up to half a scale.

    8 bits, (63.5, -32, 16, 0.5): scale 0.5, codes 127, -64, 32, 1. 4 bits with a minimum, (-1, 0, 2, 6.5): low -1,
    scale 0.5, codes 0, 2, 6, 15.
    """
    if bits == 16:
        return Stored(x)
    grouped = (rotate(x.float()) if rotated else x.float()).unflatten(-1, (n_groups, -1))
    # First the scale is rounded to its dtype, then x is divided by it: rounded later it would cost as much as 8 bits.
    low = grouped.amin(-1).to(x.dtype) if minimum else None  # [B, H, n, n_groups]
    span = grouped.amax(-1) - low.float() if minimum else grouped.abs().amax(-1)
    most = 2**bits - 1 if minimum else 2 ** (bits - 1) - 1
    scale = (span / most).to(x.dtype)
    steps = (grouped - low.float()[..., None] if minimum else grouped) / scale.float().clamp(min=1e-30)[..., None]
    codes = steps.round().clamp(0 if minimum else -most, most).int()
    parts = codes.flatten(-2).unflatten(-1, (32 // bits, -1)).unbind(-2)  # the codes of a word are one of each part
    words = sum((part & 2**bits - 1) << bits * j for j, part in enumerate(parts))
    scale, low = (None if part is None else part.movedim(-1, 1).flatten(1, 2) for part in (scale, low))
    return Stored(words.int().view(torch.float32), scale, low, bits, rotated)


def rotate(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of [..., head_dim] float32, in blocks of a power of two; twice is x again.

    It keeps every product q . k and spreads over all channels what a single one holds, so that no channel needs a wide
    range (QuaRot, arXiv 2404.00456). (8, 0, 0, 0) becomes (4, 4, 4, 4), and (1, 2, 3, 4) becomes (5, -1, -2, 0).
    """
    size = x.shape[-1] & -x.shape[-1]  # the largest power of two that divides it
    for step in range(size.bit_length() - 1):
        a, b = x.unflatten(-1, (-1, 2, 2**step)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
    return x * size**-0.5


def code(x: Stored, j: int) -> Tensor:
    """Code j of each word, [B, H, n, n_words] float32. They belong to channels j * n_words to (j + 1) * n_words - 1.

    Reading a float32 as the int32 of the same bits costs nothing; a vector that is loaded as int32 goes through memory
    once more, which takes three times as long (PyTorch 2.11 to 2.13 with AVX2).
    """
    words = x.codes.view(torch.int32)
    if x.low is not None:
        return (words >> x.bits * j & 2**x.bits - 1).float()
    return (words << 32 - x.bits * (j + 1) >> 32 - x.bits).float()  # the highest bit of a code is its sign


def groups(x: Stored) -> list[tuple[list[Tensor], Tensor, Tensor | None]]:
    """For each group of channels: its codes, n_words channels at a time, its scale [B, H, n] and its low."""
    n = 32 // x.bits // x.n_groups  # codes of a word that belong to one group
    codes = [[code(x, j) for j in range(group * n, group * n + n)] for group in range(x.n_groups)]
    scale = x.scale.float().chunk(x.n_groups, 1)
    low = [None] * x.n_groups if x.low is None else x.low.float().chunk(x.n_groups, 1)
    return list(zip(codes, scale, low, strict=True))


def decode(x: Stored, dtype: torch.dtype) -> Tensor:
    """A copy in the model's dtype. Attention makes none in a compiled step: scale and low are folded into products."""
    if x.scale is None:
        return x.codes
    found = []
    for codes, scale, low in groups(x):
        channels = torch.cat(codes, -1) * scale[..., None]
        found.append(channels if low is None else channels + low[..., None])
    channels = torch.cat(found, -1)
    return (rotate(channels) if x.rotated else channels).to(dtype)


# ---- decode -----------------------------------------------------------------------------------------------


def fuses(x: Tensor) -> bool:
    """True inside a compiled CPU graph. There a sum of products becomes one loop that reads at memory speed.

    A matrix library spends most of a call with few rows on packing and dispatch: it reads 10 GB/s, the loop 27 GB/s.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def compiler_options(bits: int, head_dim: int) -> dict:
    """What inductor is told on a CPU. bits: the fewest that a channel of K or V is stored in.

    reads, opcount: it stores every operand of a sum of products. Otherwise it computes the norm before a linear layer
    again for each output channel. But words of codes must be unpacked inside of the sum, in 40 ops at most: what is
    stored would be a copy of the cache. simdlen: the bits of a vector. 8 words of 4-bit codes leave half of AVX-512's
    lanes empty, so AVX2 is faster for them. It is set for all formats, because torch's cache of compiled graphs does
    not note the CPU, and two CPUs may share its folder. size_asserts: Dynamo compares all shapes before each step, so
    the graph need not. vec_isa_ok: do not test what /proc/cpuinfo says (3 s).
    """
    widths = {"AVX2": 256, "AVX512": 256 if bits * head_dim < 512 else 512}
    return {
        "realize_reads_threshold": 1,
        "realize_opcount_threshold": 40 if bits < 16 else 6,
        "cpp.simdlen": widths.get(torch.backends.cpu.get_cpu_capability()),  # None: the compiler chooses
        "size_asserts": False,
        "cpp.vec_isa_ok": True,
    }


# Up to 4 rows the compiler fuses the rows' sums, so that each weight is read once for all of them. With more rows
# compute is the bottleneck, not memory, and the matrix library is faster.
FEW_ROWS = 4
# A CPU without bf16 arithmetic takes eight times as long for 512 rows in bf16 as in float32, weights copied each time.
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    n_rows = x.shape[:-1].numel()
    if n_rows > FEW_ROWS and x.dtype is torch.bfloat16 and x.device.type == "cpu" and not HAS_BF16:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if n_rows > FEW_ROWS or not fuses(x):
        return F.linear(x, weight, bias)
    # One sum per row, because a single sum over [out, rows, in] is not vectorized and takes ten times as long. Each sum
    # runs over two halves of the weight in one loop: two accumulators hide the latency of the add.
    rows, halves = x.flatten(0, -2).float(), weight.chunk(2)
    y = torch.stack([torch.cat([(half.float() * row).sum(-1) for half in halves]) for row in rows])
    y = y.to(x.dtype).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class Part(NamedTuple):
    """Slots of some buffer, as attention reads them. A dead slot has live = False."""

    k: Stored  # [B, H, n, head_dim]
    v: Stored
    live: Tensor  # [B, H, n] bool


def attend_slots(q: Tensor, *parts: Part) -> tuple[Tensor, list[Tensor]]:
    """Attention of one query per row over the live slots. Their order means nothing: RoPE is already in the keys.

    q [B, H * G, 1, head_dim]. One softmax runs over all parts. A part with fewer rows than B is shared: rows 0 to 3 of
    a B of 8 read its row 0, rows 4 to 7 its row 1, and each of its rows is read once for all four.
    -> output [B, H * G, 1, head_dim], probability of each part's slots, [B, H, n] float32, averaged over the group.
    """
    grouped = q.unflatten(1, (parts[0].live.shape[1], -1)).squeeze(3)  # [B, H, G, head_dim]: K is read once per group
    logits = [attention_logits(grouped, part.k, part.live) for part in parts]
    prob = (logits[0] if len(parts) == 1 else torch.cat(logits, -1)).softmax(-1)  # [B, H, G, slots of all parts]
    probs = prob.split([part.live.shape[2] for part in parts], -1)
    first, *others = (attention_output(p, part.v, q.dtype) for p, part in zip(probs, parts, strict=True))
    y = sum(others, first)  # and not from 0: the compiler would add that 0 in each row of the layer that follows
    return y.to(q.dtype).flatten(1, 2).unsqueeze(2), [p.mean(2) for p in probs]


def attention_logits(q: Tensor, k: Stored, live: Tensor) -> Tensor:
    """q [B, H, G, head_dim], k of B rows or fewer -> [B, H, G, n] float32, -inf where a slot is dead."""
    rows = together(q, live.shape[0])
    logits = dot(rows, k) if folds(rows, k) else matmul(rows, decode(k, q.dtype).transpose(-1, -2)).float()
    logits = (logits * q.shape[-1] ** -0.5).masked_fill(~live[:, :, None], float("-inf"))
    return apart(logits, q.shape[0])


def attention_output(prob: Tensor, v: Stored, dtype: torch.dtype) -> Tensor:
    """prob [B, H, G, n], v of B rows or fewer -> [B, H, G, head_dim], in float32 where it is one compiled loop."""
    rows = together(prob, v.codes.shape[0])
    y = weighted_sum(rows, v) if folds(rows, v) else matmul(rows.to(dtype), decode(v, dtype))
    return apart(y, prob.shape[0])


# Queries per KV head that one loop serves. Only answers that share a prompt have more. Then arithmetic takes longer
# than reading, and the matrix library is faster, although it needs the layer's prompt in float32.
MOST_SUMS = 8


def folds(x: Tensor, stored: Stored) -> bool:
    """Whether the product with x [B, H, G, n] is written as sums that compile into one loop, which unpacks codes."""
    many = x.shape[2] > MOST_SUMS and x.device.type == "cpu"
    return not many and (fuses(x) or torch.compiler.is_compiling() and stored.scale is not None)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, on a CPU without bf16 arithmetic by way of float32, which is five times as fast there."""
    if a.dtype is torch.bfloat16 and a.device.type == "cpu" and not HAS_BF16:
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def together(x: Tensor, rows: int) -> Tensor:
    """[B, H, G, n] -> [rows, H, B / rows * G, n]: the queries that share a row are one large group."""
    return x if x.shape[0] == rows else x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)


def apart(x: Tensor, B: int) -> Tensor:
    """The inverse: [rows, H, B / rows * G, n] -> [B, H, G, n]."""
    return x if x.shape[0] == B else x.unflatten(2, (B // x.shape[0], -1)).transpose(1, 2).flatten(0, 1)


def dot(q: Tensor, k: Stored) -> Tensor:
    """q [B, H, G, head_dim] times stored keys -> [B, H, G, n] float32.

    One sum per query, as in `linear`: the compiler fuses them into one loop that reads each key once. With packed keys
    such a loop is slower. Their scale is folded in: q . (code * scale + low) = (q . code) * scale + sum(q) * low.
    """
    # Two halves make the compiler store q as float32. A bf16 q it would convert again for each key.
    q = torch.cat([half.float() for half in q.chunk(2, -1)], -1)
    if k.scale is None:
        return torch.stack([(one[:, :, None] * k.codes.float()).sum(-1) for one in q.unbind(2)], 2)
    q = rotate(q) if k.rotated else q
    total = 0.0
    for part, (codes, scale, low) in zip(q.chunk(k.n_groups, -1), groups(k), strict=True):
        pairs = zip(part.chunk(len(codes), -1), codes, strict=True)
        products = sum(channels[:, :, :, None] * code[:, :, None] for channels, code in pairs)
        total = total + products.sum(-1) * scale[:, :, None]
        if low is not None:
            total = total + part.sum(-1, keepdim=True) * low[:, :, None]
    return total


VECTOR = 32  # channels of V that one vectorized loop adds up


def weighted_sum(prob: Tensor, v: Stored) -> Tensor:
    """prob [B, H, G, n_slots] times stored values [B, H, n_slots, head_dim] -> [B, H, G, head_dim] float32.

    One sum per query, as in `dot`. Each is split by channels: a single sum would read V once per 32 channels, wherever
    V is a prefix of the slots.
    """
    if v.scale is None:
        parts = v.codes.split(VECTOR, -1)
        sums = [(one[..., None] * part.float()).sum(2) for one in prob.unbind(2) for part in parts]
        return torch.cat(sums, -1).unflatten(-1, (prob.shape[2], -1))
    sums = []
    for codes, scale, low in groups(v):
        weight = (prob * scale[:, :, None])[..., None]
        offset = 0.0 if low is None else (prob * low[:, :, None]).sum(-1, keepdim=True)
        sums += [(weight * code[:, :, None]).sum(3) + offset for code in codes]
    return rotate(torch.cat(sums, -1)) if v.rotated else torch.cat(sums, -1)


def write_slots(buffer: Tensor, slots: Tensor, values: Tensor) -> None:
    """Write n slots of each head in place: buffer [B, H, n_slots, ...], slots [B, H, n], values [B, H, n, ...].

    Indexed assignment and not `scatter_`: the compiler makes a copy of the buffer for `scatter_`, but not for this.
    """
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    heads = torch.arange(slots.shape[1], device=slots.device)[None, :, None]
    buffer[rows, heads, slots] = values


def slot_numbers(k: Tensor) -> Tensor:
    """[B, H, n, ...] -> the numbers 0 to n - 1 for each head, [B, H, n] int32."""
    return torch.arange(k.shape[2], device=k.device, dtype=torch.int32).expand(k.shape[:3])


# ---- scores -----------------------------------------------------------------------------------------------


def cosine_to_mean(k: Tensor, live: Tensor) -> Tensor:
    """Cosine between each key and the mean direction of the live ones: k [B, H, n, head_dim], live [B, H, n].

    Keys (1, 0), (1, 0), (0, 1): the mean direction is (2/3, 1/3), and the cosines are 0.894, 0.894 and 0.447. Of two
    keys both have the same cosine, so three decimals are kept: no rounding error decides between them.
    """
    norm = k.float().norm(dim=-1).clamp(min=1e-30)
    mean = ((live / norm)[..., None] * k).sum(2, keepdim=True)
    cosine = (k * mean).sum(-1) / (norm * mean.norm(dim=-1).clamp(min=1e-30))
    return (cosine * 1000).round() / 1000


def gap(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How far the mean of the tokens in a lies from that of those in b: squared, over the variance of b.

    x [B, H, n, head_dim], a and b [B, H, n] bool -> [B, H, 1]. Tokens (1, 0), (3, 0) and (2, 6), a the first two, b
    all: the means are (2, 0) and (2, 2), their squared distance is 4, the variance is 26 / 3, and the gap is 0.46.
    """
    x = x.float()
    a, b = (tokens / tokens.sum(-1, keepdim=True).clamp(min=1) for tokens in (a, b))
    mean, square = (b[..., None] * x).sum(2), (b * x.square().sum(-1)).sum(-1, keepdim=True)
    variance = square * (1 + 1e-5) - mean.square().sum(-1, keepdim=True)  # of equal tokens only rounding would be left
    return ((a - b)[..., None] * x).sum(2).square().sum(-1, keepdim=True) / variance.clamp(min=1e-30)


def squared_norm(x: Tensor, G: Tensor) -> Tensor:
    """|x G|^2 of each token: x [B, H, n, head_dim], G [B, H, head_dim, m] -> [B, H, n]."""
    return (x @ G.to(x.dtype)).float().square().sum(-1)


def uniform(number: Tensor) -> Tensor:
    """A number between 0 and 1, both excluded, for each whole number from 0 on: noise that any run repeats."""
    x = number.long() + 0x9E3779B9 & 0xFFFFFFFF  # 32 bits, in int64, where no product overflows
    for _ in range(2):
        x = (x ^ x >> 16) * 0x45D9F3B & 0xFFFFFFFF
    return (((x ^ x >> 16) & 0x7FFFFF).float() + 0.5) / 2**23


def token_numbers(pos: Tensor, first_head: int, n_heads: int) -> Tensor:
    """[B, H, n] int64: another number for each position and head. The H heads are `first_head` and those after it, of
    `n_heads` in all: position 5 has the numbers 40 to 47 in 8 heads, in whichever process they lie. -1 is read as 0."""
    head = torch.arange(first_head, first_head + pos.shape[1], device=pos.device)[:, None]
    return pos.clamp(min=0).long() * n_heads + head


def exponential(number: Tensor) -> Tensor:
    """Exponential noise, above 0, for each whole number from 0 on."""
    return -uniform(number).log()


def gaussian(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Normal noise for each seed from 0 on, [B, H] -> [B, H, rows, columns]: the Box-Muller transform."""
    number = torch.arange(2 * rows * columns, device=seed.device).view(2, rows, columns)
    u = uniform(seed[..., None, None, None].long() * number.numel() + number)
    return (-2 * u[:, :, 0].log()).sqrt() * (2 * torch.pi * u[:, :, 1]).cos()


# ---- ranking ----------------------------------------------------------------------------------------------


def rank_key(score: Tensor, pos: Tensor) -> Tensor:
    """One int64 per token that sorts by score, then by position. score float32, pos int32, of any one shape.

    The bits of a float sort like the float, once those of negative floats are flipped. They fill the high 32 bits, the
    position the low 32. Scores 0.5, 0.25, 0.25 at positions 7, 9, 3 sort as (0.25, 3), (0.25, 9), (0.5, 7).
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) | pos.long()


def lowest(score: Tensor, pos: Tensor, evictable: Tensor, count: int) -> Tensor:
    """The `count` slots to evict, [B, H, count]: the lowest score first, among equal scores the older token first.

    score float32, pos int32, evictable bool, each [B, H, n_slots].
    """
    key = torch.where(evictable, rank_key(score, pos), torch.iinfo(torch.int64).max)
    if count > 1:
        return key.topk(count, largest=False, sorted=True).indices
    # ~ reverses the order. argmin would be wrong in AVX2 code on a CPU with AVX-512: what g++ 12 makes there of
    # PyTorch's minimum of a few int64 is 2**63 - 1, whatever they are.
    return (~key).argmax(-1, keepdim=True)


def highest(score: Tensor, lengths: Tensor, budget: Tensor, floor: Tensor, n_slots: int) -> Tensor:
    """The prompt tokens to keep: positions [B, H, n_slots] in ascending order, -1 where a slot stays empty.

    score [B, H, S]; lengths, budget, floor [B]. Each head keeps its best `floor` tokens. The heads of a row compete for
    the other H * (budget - floor) places. Example with 2 heads, budget 2, floor 1: scores (9, 8, 7) and (3, 2, 1).
    Token 0 of each head is safe; 8 and 7 win the two places left. Head 0 keeps 0, 1, 2 and head 1 keeps 0.
    """
    B, H, S = score.shape
    pos = slot_numbers(score)
    in_prompt = pos < lengths[:, None, None]
    key = torch.where(in_prompt, rank_key(score, pos), torch.iinfo(torch.int64).min)
    rank_in_head = ranks(key)
    key = torch.where(rank_in_head < floor[:, None, None], torch.iinfo(torch.int64).max, key)  # safe: ahead of all
    rank_in_row = ranks(key.flatten(1)).view(B, H, S)
    kept = (rank_in_row < H * budget[:, None, None]) & in_prompt
    positions = torch.where(kept, pos, S).sort(-1).values[:, :, :n_slots]
    return torch.where(positions < S, positions, -1)


def ranks(key: Tensor) -> Tensor:
    """The place of each entry along the last dimension, 0 for the largest: (30, 50, 40) -> (2, 0, 1)."""
    return key.argsort(stable=True, dim=-1, descending=True).argsort(-1)


# ---- sampling ---------------------------------------------------------------------------------------------


BROKEN = -2


class Sampler(nn.Module):
    """Chooses each row's next token and notes which rows have stopped. It runs on the device, in the compiled step."""

    def __init__(self, options, stop_ids: list[int]):
        super().__init__()
        tiny = torch.finfo(torch.float32).tiny  # below it, what is above 0 for Python is 0 on the device
        self.temperature = max(options.temperature, tiny) if options.temperature else 0.0
        self.top_k = options.top_k
        self.top_p = max(options.top_p, tiny)
        self.register_buffer("stop_ids", torch.tensor(stop_ids, dtype=torch.int64))

    def forward(self, logits: Tensor, noise: Tensor, stopped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits [B, vocab], noise and stopped [B] -> the token to feed next, the token to show, stopped.

        The token to show is -1 for a row that has stopped, and BROKEN where a logit is NaN or infinite.
        """
        token = self.sample(logits, noise)
        shown = torch.where(logits.isfinite().all(-1), token, BROKEN)
        return token, torch.where(stopped, -1, shown), stopped | torch.isin(token, self.stop_ids)

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Walk along the likeliest tokens until their summed probability passes the noise, uniform in [0, 1).

        Probabilities 0.5, 0.3, 0.2 and top_p 0.7: tokens 0 and 1 stay, with edges 0.5 and 0.8. Noise 0.6 is scaled to
        0.6 * 0.8 = 0.48, which is below the first edge: token 0. Noise 0.7 gives 0.56: token 1.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        vocab = logits.shape[-1]
        top, ids = logits.float().topk(min(self.top_k or vocab, vocab))  # sorted
        prob = ((top - top[:, :1]) / self.temperature).softmax(-1)  # at most 0, so a tiny temperature overflows to -inf
        prob = torch.where(prob.cumsum(-1) - prob < self.top_p, prob, 0)  # the token that crosses top_p stays
        edges = prob.cumsum(-1)
        choice = (edges <= noise[:, None] * edges[:, -1:]).sum(-1, keepdim=True)
        return ids.gather(-1, choice.clamp(max=ids.shape[-1] - 1)).squeeze(-1)


def draw_noise(options, indexes: list[int]) -> Tensor:
    """[T, B] uniform numbers, one per token, for all samples of each prompt: sample 2 draws as seed + 2 does alone.

    They are drawn before the run, so no graph holds a random state."""
    seeds = [(options.seed + s) * 1_000_003 + index for index in indexes for s in range(options.samples)]
    if options.temperature == 0:
        return torch.zeros(options.max_new_tokens, len(seeds), device="cpu")
    generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
    return torch.stack([torch.rand(options.max_new_tokens, generator=g, device="cpu") for g in generators], dim=1)


# ---- ranks: processes that share out the heads of one model -----------------------------------------------
#
# These are PyTorch's functional collectives: they return a new tensor, so a compiled graph holds them like any other
# op. Each call is one message. Where there is one rank, no graph has any of them.


def sum_over_ranks(x: Tensor, n_ranks: int) -> Tensor:
    """The sum of all ranks' x, to the bit the same on each of them."""
    if n_ranks == 1:
        return x
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", dist.group.WORLD.group_name))


def gather_over_ranks(x: Tensor, n_ranks: int, dim: int) -> Tensor:
    """The x of all ranks side by side along `dim`, rank 0's first."""
    if n_ranks == 1:
        return x
    ops = torch.ops._c10d_functional
    stacked = ops.all_gather_into_tensor(x.contiguous(), n_ranks, dist.group.WORLD.group_name)
    return torch.cat(ops.wait_tensor(stacked).chunk(n_ranks), dim)
