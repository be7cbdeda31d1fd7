"""``lean_attention`` in chunked PyTorch: the backend ``torch``, for any device and any dtype.

Maths. The query heads of a key head and their Nq positions are the R rows of one product. They walk the keys in chunks
of n with a running maximum M, sum L and unnormalised output A (online softmax; LeanAttention, Sanovar et al., 2024,
arXiv:2405.10480, section 3, rests on the same three being associative):

    S = scores(Q, K_j)    M' = max(M, rowmax S)    P = exp(S - M')    d = exp(M - M')
    L = d L + rowsum P    A = d A + P V_j          at the end  out = A / L,  lse = M + log L

The keys of a common prefix are walked first, with the rows of all sequences at once, so that they are read once; every
sequence then goes on from its rows' M, L and A.

On the CPU, sequences are walked one after the other, each as far as its length, and only keys that a row can see are
read. PyTorch's own kernel runs where it is the same function; it hides a score of NaN behind an output of 0, so its
statistics are looked at afterwards. A product of weights and values that are NaN or infinite is NaN even where the
weight is 0 because the key is hidden: sequences with such an output are computed again, and those values apart.

Elsewhere the lengths stay on the device: all sequences are walked together through the whole capacity, and what no row
sees is replaced before it is used. With ``schedule="invariant"`` there too one after the other, prefix included, so
that no product has a shape or an alignment that depends on the rest of the batch.

FLOPs: ``2 R Hkv B N (D + Dv)``. Bytes: the caches once, as stored; chunks of keys in half precision or quantised are
widened to float32 (float64 for float64 queries) and read again from cache. Extra memory: one chunk of keys and scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import Options, capacity, empty_lse, empty_out, per_key

_CHUNK_ELEMENTS = {"cpu": 2**20}
"""Elements of one chunk by device type: widened keys, values and scores. On a CPU they stay in its caches."""

_CHUNK_ELEMENTS_ELSEWHERE = 2**24

_ATEN_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention as :class:`Options` defines it: ``(out [B, Hq, Nq, Dv], lse [B, Hq, Nq])``."""
    out, lse = empty_out(q, v_cache), empty_lse(q)
    batch = q.shape[0]
    lengths = host_lengths(k_cache, options)
    one_by_one = options.schedule == "invariant"
    in_aten = lengths is not None and runs_in_aten(q, k_cache, v_cache, options)
    for group in range(batch) if one_by_one else range(min(batch, 1)):
        together = slice(group, group + 1) if one_by_one else slice(0, batch)
        state: State | None = None
        if options.k_prefix is not None and options.v_prefix is not None:
            state = _after_prefix(q[together], options.k_prefix, options.v_prefix, options, together)
        # Where lengths are known, one at a time; else all that share a walk.
        for member in range(together.start, together.stop) if lengths is not None else (together.start,):
            part = slice(member, member + 1) if lengths is not None else together
            length = None if lengths is None else lengths[member]
            if length and in_aten:
                _attend_in_aten(q[part], k_cache[part, :, :length], v_cache[part, :, :length], out[part], lse[part],
                                options)  # fmt: skip
                continue
            start = None if state is None else state.of(slice(part.start - together.start, part.stop - together.start))
            made = _attend(q[part], k_cache, v_cache, options, part, length, start)
            out[part].copy_(made[0])
            lse[part].copy_(made[1])
    if lengths is not None:
        _again(q, k_cache, v_cache, options, lengths, in_aten, out, lse)
    return out, lse


def _again(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options, lengths: list[int], in_aten: bool, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Compute those sequences again, with care, whose results say that NaN or infinity was met on the way."""
    if in_aten:
        shown = lse  # a row that met a NaN is 0 there, or not finite
    elif options.window_left >= 0 or (options.window_right >= 0 and q.shape[2] > 1):
        shown = out
    else:
        return  # all rows see the same keys: what one of them met, all did

    def right(x: Tensor) -> bool:
        # The remainder of a number by itself is NaN for 0, infinity and NaN. Two operations cost less than questions.
        return (torch.fmod(x, x) if in_aten else x - x).sum().item() == 0.0

    if right(shown):
        return
    for sequence, length in enumerate(lengths):
        part = slice(sequence, sequence + 1)
        if (in_aten and not length) or right(shown[part]):
            continue
        start = None
        if options.k_prefix is not None and options.v_prefix is not None:
            start = _after_prefix(q[part], options.k_prefix, options.v_prefix, options, part, careful=True)
        made = _attend(q[part], k_cache, v_cache, options, part, length, start, careful=True)
        out[part].copy_(made[0])
        lse[part].copy_(made[1])


def host_lengths(k_cache: Tensor, options: Options) -> list[int] | None:
    """The lengths, where reading them waits for no other device."""
    if k_cache.device.type != "cpu":
        return None
    most = capacity(k_cache, options)
    return [min(max(length, 0), most) for length in options.cache_seqlens.tolist()]


class State(NamedTuple):
    """What the keys so far made of rows [S, Hkv, R]: statistics [S, Hkv, R, 1] and output [S, Hkv, R, Dv]."""

    highest: Tensor
    total: Tensor
    acc: Tensor

    def of(self, sequences: slice) -> State:
        """The rows of some sequences."""
        return State(*(x[sequences] for x in self))

    def with_keys(self, scores: Tensor, v: Tensor, hidden: Tensor | None = None) -> State:
        """After more keys: their scores [S, Hkv, R, n], which are overwritten, and values [S, Hkv, n, Dv].

        ``hidden`` [S, 1, R, n], where it is given, says which values must not reach a row even if they are NaN.
        """
        raised = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        # A row without a key so far: exp(-inf - 0) is 0 where exp(-inf - -inf) is NaN.
        base = raised.masked_fill(raised == float("-inf"), 0.0)
        weights = scores.sub_(base).exp_()
        decay = torch.exp(self.highest - base)
        total = self.total * decay + weights.sum(-1, keepdim=True)
        if hidden is None or bool(torch.isfinite(v).all()):
            return State(raised, total, self.acc * decay + torch.matmul(weights, v))
        acc = self.acc * decay
        each = max(_CHUNK_ELEMENTS_ELSEWHERE // max(acc.numel(), 1), 1)
        for keys in (slice(first, first + each) for first in range(0, v.shape[2], each)):
            products = weights[..., keys, None] * v[:, :, None, keys]  # [S, Hkv, R, n, Dv]
            acc += products.masked_fill_(hidden[..., keys, None], 0.0).sum(3)
        return State(raised, total, acc)


def _start(rows: Tensor, value_dim: int, options: Options) -> State:
    """The state of rows [S, Hkv, R, D] before any key: the sink alone, if there is one."""
    shape = (*rows.shape[:3], 1)
    acc = rows.new_zeros(*rows.shape[:3], value_dim)
    if options.sinks is None:
        return State(rows.new_full(shape, float("-inf")), rows.new_zeros(shape), acc)
    kv_heads = rows.shape[1]
    group = options.sinks.shape[0] // kv_heads
    sinks = options.sinks.to(rows.dtype).view(kv_heads, group, 1).expand(-1, -1, rows.shape[2] // max(group, 1))
    highest = sinks.reshape(1, kv_heads, rows.shape[2], 1).expand(shape)
    return State(highest, (highest > float("-inf")).to(rows.dtype), acc)


def _rows(q: Tensor, kv_heads: int, options: Options) -> Tensor:
    """q [S, Hq, Nq, D] times scale and the scale of its key head: [S, Hkv, R, D], R counting heads before positions."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.to(dtype).reshape(q.shape[0], kv_heads, q.shape[1] // kv_heads * q.shape[2], q.shape[3]) * options.scale
    if options.k_scale is not None and not per_key(options.k_scale):
        rows = rows * options.k_scale.to(dtype)[:, None, None]
    return rows


def _positions(seqlens: Tensor | int, queries: int, count: int, device: torch.device) -> Tensor:
    """Where the rows stand, counted from the sequence's first own key: [S|1, 1, R, 1]."""
    steps = torch.arange(-queries, 0, device=device).repeat(count // max(queries, 1))
    if isinstance(seqlens, int):
        return (steps + seqlens)[None, None, :, None]
    return (seqlens.long()[:, None] + steps)[:, None, :, None]


def _scores(rows: Tensor, k: Tensor, factors: Tensor | None, hidden: Tensor | None, softcap: float) -> Tensor:
    """The scores [S, Hkv, R, n] of keys k [S, Hkv, n, D], -inf where hidden; ``factors`` [S, Hkv, n] multiply keys."""
    scores = torch.matmul(rows, k.transpose(2, 3))
    if factors is not None:
        scores = scores.mul_(factors.to(scores.dtype)[:, :, None])
    if softcap > 0.0:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))


def _outside(position: Tensor, keys: Tensor, options: Options) -> Tensor | None:
    """Which of ``keys`` [n] the window hides from rows at ``position``: [S, 1, R, n], or None where it has no sides."""
    hidden = None
    if options.window_left >= 0:
        hidden = keys < position - options.window_left
    if options.window_right >= 0:
        ahead = keys > position + options.window_right
        hidden = ahead if hidden is None else hidden | ahead
    return hidden


def _after_prefix(
    q: Tensor, k_prefix: Tensor, v_prefix: Tensor, options: Options, part: slice, careful: bool = False
) -> State:
    """The state of all rows after the common keys, which every chunk of the walk reads for all sequences at once."""
    sequences, queries = q.shape[0], q.shape[2]
    kv_heads, prefix, _ = k_prefix.shape
    rows = _rows(q, kv_heads, options)
    position = _positions(options.cache_seqlens[part], queries, rows.shape[2], q.device)
    count = rows.shape[2]

    def merged(x: Tensor) -> Tensor:  # [S, Hkv, R, width] as [1, Hkv, S * R, width]
        return x.transpose(0, 1).reshape(1, x.shape[1], sequences * count, x.shape[3])

    state = State(*map(merged, _start(rows, v_prefix.shape[2], options)))
    rows, position = merged(rows), merged(position)
    copied = options.schedule == "invariant"
    for keys in _chunks(0, prefix, kv_heads, rows, v_prefix.shape[2]):
        index = torch.arange(keys.start - prefix, keys.stop - prefix, device=q.device)
        k, v = (x[None, :, keys].to(rows.dtype, copy=copied) for x in (k_prefix, v_prefix))
        hidden = _outside(position, index, options)
        if hidden is not None and not careful:
            v = v.masked_fill(hidden.all(2)[..., None], 0.0)  # a weight of 0 does not undo a NaN
        state = state.with_keys(_scores(rows, k, None, hidden, options.softcap), v, hidden if careful else None)
    parted = [x.view(kv_heads, sequences, count, x.shape[3]).transpose(0, 1) for x in state]
    return State(*parted)


def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options, part: slice, length: int | None, state: State | None,
    careful: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The walk of the sequences ``part`` through their own keys. ``length`` is None where only the device knows it."""
    queries, kv_heads, value_dim = q.shape[2], k_cache.shape[1], v_cache.shape[3]
    rows = _rows(q, kv_heads, options)
    state = _start(rows, value_dim, options) if state is None else state
    seqlens = options.cache_seqlens[part].clamp(0, capacity(k_cache, options)) if length is None else length
    position = _positions(seqlens, queries, rows.shape[2], q.device)
    first, stop = 0, capacity(k_cache, options) if length is None else length
    if length is not None and options.window_left >= 0:
        first = max(length - queries - options.window_left, 0)
    factors = tuple(x if per_key(x) else None for x in (options.k_scale, options.v_scale))
    for keys in _chunks(first, stop, kv_heads, rows, value_dim):
        hidden = None
        index = torch.arange(keys.start, keys.stop, device=q.device)
        if length is None or _some_hidden(keys, length, queries, options):
            hidden = _outside(position, index, options)
        if isinstance(seqlens, Tensor):
            past = (index >= seqlens[:, None])[:, None, None]  # [S, 1, 1, n]
            hidden = past if hidden is None else hidden | past
        where = _Where.of(keys, index, part, options, k_cache)
        k, v = where.keys(k_cache, rows.dtype, options), where.keys(v_cache, rows.dtype, options)
        if factors[1] is not None:
            v = v * where.factors(factors[1]).to(v.dtype)[..., None]
        if isinstance(seqlens, Tensor) and hidden is not None:
            v = v.masked_fill(hidden.all(2)[..., None], 0.0)  # a weight of 0 does not undo a NaN
        k_factors = None if factors[0] is None else where.factors(factors[0])
        state = state.with_keys(_scores(rows, k, k_factors, hidden, options.softcap), v, hidden if careful else None)

    empty = state.total == 0.0
    total = state.total.masked_fill(empty, 1.0)
    out = state.acc / total
    if options.v_scale is not None and factors[1] is None:
        out = out * options.v_scale.to(out.dtype)[:, None, None]
    lse = torch.where(empty, float("-inf"), state.highest + torch.log(total))
    return out.reshape(*q.shape[:3], value_dim), lse.reshape(q.shape[:3])


def _some_hidden(keys: slice, length: int, queries: int, options: Options) -> bool:
    """Whether the window hides a key of the chunk from a row of a sequence of ``length`` keys."""
    left, right = options.window_left, options.window_right
    return (left >= 0 and keys.start < length - 1 - left) or (right >= 0 and keys.stop > length - queries + right + 1)


def _chunks(first: int, stop: int, kv_heads: int, rows: Tensor, value_dim: int) -> Iterator[slice]:
    """The keys from ``first`` to ``stop`` in chunks that bound the memory."""
    most = _CHUNK_ELEMENTS.get(rows.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    size = max(most // max(rows.shape[0] * kv_heads * (rows.shape[2] + rows.shape[3] + value_dim), 1), 64)
    for start in range(first, stop, size):
        yield slice(start, min(start + size, stop))


class _Where(NamedTuple):
    """Where a chunk of keys of some sequences lies in the caches."""

    part: slice
    slots: Any  # a slice of rows of dense caches; for paged ones, of each key the row in its page [n]
    pages: Tensor | None  # of each key [S, n]

    @classmethod
    def of(cls, keys: slice, index: Tensor, part: slice, options: Options, cache: Tensor) -> _Where:
        """The chunk ``keys``, whose numbers are ``index``. What a table says past a length is garbage, so clamped."""
        if options.block_table is None:
            return cls(part, keys, None)
        page = cache.shape[2]
        pages = options.block_table[part][:, index // page].long()
        return cls(part, index % page, pages.clamp(0, cache.shape[0] - 1))

    def keys(self, cache: Tensor, dtype: torch.dtype, options: Options) -> Tensor:
        """The chunk of k or v [S, Hkv, n, width], in ``dtype``."""
        if self.pages is None:
            # A copy is always aligned alike; a view of a cache may not be.
            return cache[self.part, :, self.slots].to(dtype, copy=options.schedule == "invariant")
        return cache[self.pages, :, self.slots].to(dtype).transpose(1, 2)

    def factors(self, scale: Tensor) -> Tensor:
        """The chunk of a scale for each key: [S, Hkv, n]."""
        if self.pages is None:
            return scale[self.part, :, self.slots]
        return scale[self.pages, :, self.slots].transpose(1, 2)


def runs_in_aten(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> bool:
    """Whether PyTorch's CPU flash kernel computes the same function of every sequence that has keys.

    All rows must see all keys; it takes rows of caches for contiguous and apart without looking at their strides.
    """
    return (
        q.device.type == "cpu"
        and options.schedule != "invariant"
        and not any(isinstance(x, Tensor) for x in options if x is not options.cache_seqlens)
        and options.softcap == 0.0
        and options.window_left == -1
        and (options.window_right == -1 or q.shape[2] == 1)
        and q.dtype == k_cache.dtype
        and q.shape[3] == v_cache.shape[3]
        and q.numel() > 0
        and all(x.stride(3) == 1 and x.stride(2) >= x.shape[3] for x in (k_cache, v_cache))
    )


def _attend_in_aten(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options) -> None:
    """Fill out and lse [1, Hq, Nq] of one sequence, whose grouped heads are rows of one call."""
    # Of q too it looks at no stride but those of heads and rows; it may be a view of anything.
    rows = q.reshape(1, k.shape[1], q.shape[1] // k.shape[1] * q.shape[2], q.shape[3]).contiguous()
    made, statistics = _ATEN_FORWARD(rows, k, v, 0.0, False, scale=options.scale)
    out.copy_(made.reshape(out.shape))
    lse.copy_(statistics.reshape(lse.shape))
