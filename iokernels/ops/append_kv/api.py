"""``append_kv``: its argument contract and its choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels.ops.shared.caches import used_pages
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.offsets import readable
from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.plans import Plans, remembered

from . import reference
from .memory import check_apart, check_traced, places
from .op import append
from .options import TOP, Append, room
from .rotary import check_positions, check_table

MAX_HEAD_DIM = 256
"""Widest head of the Triton kernel, which holds a row at once."""


def _contract(first: str, per_key_scales: bool) -> Contract:
    """Of caches whose first dimensions are ``first``: sequences of N keys, or pages."""
    scale = Spec(first if per_key_scales else "Hkv", (torch.float32,), optional=True)
    counts = Spec("B", (torch.int32,), optional=True)
    return Contract(
        "append_kv",
        k_new=Spec("B Hkv Nnew D", FLOATS),
        v_new=Spec("B Hkv Nnew Dv", same_dtype_as="k_new"),
        k_cache=Spec(f"{first} D", (*FLOATS, *TOP)),
        v_cache=Spec(f"{first} Dv", same_dtype_as="k_cache"),
        cache_seqlens=Spec("B", (torch.int32,)),
        block_table=Spec("B *", (torch.int32,), optional=True),
        new_seqlens=counts,
        positions=counts,
        cos=Spec("P half", FLOATS, optional=True),
        sin=Spec("P half", same_dtype_as="cos", optional=True),
        k_scale=scale,
        v_scale=scale,
    )


_CONTRACTS = {
    (paged, per_key): _contract("pages Hkv page" if paged else "B Hkv N", per_key)
    for paged in (False, True)
    for per_key in (False, True)
}


def append_kv(
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    new_seqlens: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Write new keys and values behind those that the caches of :func:`iokernels.lean_attention` hold, in place.

    Args:
        k_new: ``[B, Hkv, Nnew, D]``, any floating dtype, any strides. Not modified.
        v_new: ``[B, Hkv, Nnew, Dv]``, dtype and device of k_new.
        k_cache: ``[B, Hkv, N, D]``, or paged ``[pages, Hkv, page, D]``: written. Any floating dtype, to which new keys
            are rounded, or float8_e4m3fn or int8, to which they are divided by their scale, rounded to nearest even
            and saturated. Any strides.
        v_cache: ``[B, Hkv, N, Dv]``, or ``[pages, Hkv, page, Dv]``: written. Dtype of k_cache.
        cache_seqlens: int32 ``[B]``: how many keys each sequence has *before* the append. Row i of a sequence is
            written at ``cache_seqlens + i``. This tensor is not advanced: ``lean_attention`` takes the length after.
        block_table: int32 ``[B, most pages]``, for paged caches. A page that is written must belong to one sequence.
        new_seqlens: int32 ``[B]``: how many of the Nnew rows each sequence has, Nnew if None. The others are not
            written (padding of prompts of different lengths).
        rotary: ``(cos, sin)``, each ``[P, rot / 2]``, any floating dtype (:func:`iokernels.rotary_table` makes them):
            keys are turned by the angles of their positions before they are written, as
            :func:`iokernels.apply_rotary` turns queries. rot is at most D; the elements past it stay as they are.
        positions: int32 ``[B]``: the position, in the rotary table, of each sequence's first new key;
            ``cache_seqlens`` if None. Where all sequences follow a common prefix of P keys it is
            ``cache_seqlens + P``.
        interleaved: rotary turns the pairs (2 j, 2 j + 1) instead of (j, j + rot / 2).
        k_scale: float32. ``[Hkv]``: what the keys of a head are divided by, read. One for each key, ``[B, Hkv, N]`` or
            ``[pages, Hkv, page]``, for quantised caches: *written*, the largest magnitude of the key over that of the
            dtype (448 or 127). None: 1.
        v_scale: float32, likewise, for the values.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or None for the rule of :mod:`iokernels.runtime.dispatch`.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit, and caches that are expanded, overlap with themselves
            or share memory (views of one tensor that lie apart are fine); the message names the argument. On the CPU
            also lengths past the capacity, page numbers and positions out of range, and two sequences that write to
            one place of a page; nothing is written then. On a GPU, and under
            ``torch.compile``, the host reads none of these: rows past the capacity or in a page that does not exist
            are not written, and positions outside the rotary table are taken to its edge.
        UnsupportedError: the named backend cannot run this call, or a gradient is asked of it: none flows through a
            cache. Call it under ``torch.no_grad()``.

    ``k_cache``, ``v_cache`` and scales for each key are modified, where rows are written and nowhere else. The bits
    are the same on every run.
    """
    cos, sin = _checked_rotary(rotary)
    tensors = (k_new, v_new, k_cache, v_cache, cache_seqlens, block_table, new_seqlens, positions, cos, sin, k_scale,
               v_scale)  # fmt: skip
    lie = places(k_cache, v_cache, k_scale, v_scale)
    chosen = remembered(
        _PLANS, _plan, (interleaved, dispatch.requested(backend), torch.is_grad_enabled(), lie), tensors
    )
    if lie is not None:
        # Rows of a negated view are the negative of what its memory holds, and rounding is symmetric.
        k_new, k_cache = _signed(k_new, k_cache)
        v_new, v_cache = _signed(v_new, v_cache)
    k_each, v_each = (x is not None and x.dim() == 3 for x in (k_scale, v_scale))
    options = Append(
        cache_seqlens, block_table, new_seqlens, positions, cos, sin, interleaved,
        None if k_each else k_scale, None if v_each else v_scale,
        k_scale if k_each else None, v_scale if v_each else None,
    )  # fmt: skip
    _check_values(k_new, k_cache, options)
    if chosen == "reference":
        reference.append(k_new, v_new, k_cache, v_cache, options)
    else:
        append(k_new, v_new, k_cache, v_cache, chosen, *options)


_PLANS: Plans[str] = Plans()


def _signed(new: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """New rows and a cache that is no negated view, which together mean the same."""
    return (new.neg(), torch.ops.aten._neg_view(cache)) if cache.is_neg() else (new, cache)


def _checked_rotary(rotary: Any) -> tuple[Tensor | None, Tensor | None]:
    if rotary is None:
        return None, None
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2 or not all(isinstance(x, Tensor) for x in rotary):
        raise TypeError(f"append_kv: rotary is {type(rotary).__name__}; it must be None or two tensors, (cos, sin)")
    return rotary[0], rotary[1]


def _plan(
    interleaved: Any, backend: str | None, grad: bool, lie: Any, k_new: Tensor, v_new: Tensor, k_cache: Tensor,
    v_cache: Tensor, cache_seqlens: Tensor, block_table: Any, new_seqlens: Any, positions: Any, cos: Any, sin: Any,
    k_scale: Any, v_scale: Any,
) -> str:  # fmt: skip
    """The backend of a call that is right: a function of metadata and of where memory lies, so it is remembered."""
    scales = [x for x in (k_scale, v_scale) if isinstance(x, Tensor)]
    per_key = len(scales) > 0 and scales[0].dim() == 3
    contract = _CONTRACTS[block_table is not None, per_key]
    sizes = contract.check(
        k_new=k_new, v_new=v_new, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens,
        block_table=block_table, new_seqlens=new_seqlens, positions=positions, cos=cos, sin=sin, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    contract.flag("interleaved", interleaved)
    contract.require(
        sizes["D"] > 0 and sizes["Dv"] > 0,
        f"head widths are {sizes['D']} and {sizes['Dv']}; they must be at least 1",
    )
    if block_table is not None:
        contract.require(sizes["page"] > 0, "k_cache has pages of 0 keys; they must hold at least 1")
    contract.require(
        not per_key or k_cache.dtype in TOP,
        f"scales for each key are computed for quantised caches, and k_cache is {k_cache.dtype}; scale by heads",
    )
    contract.require(cos is not None or positions is None, "positions are those of rotary, which is not given")
    if cos is not None:
        check_table(contract, sizes)
    written = {"k_cache": k_cache, "v_cache": v_cache}
    written |= {"k_scale": k_scale, "v_scale": v_scale} if per_key else {}
    (check_apart if lie is not None else check_traced)(**written)
    given = (k_new, v_new, k_cache, v_cache, cos, sin, k_scale, v_scale)
    if grad and any(x is not None and x.requires_grad for x in given):
        raise UnsupportedError(
            "append_kv: an input requires a gradient, and none flows through a cache. Call it under torch.no_grad()."
        )
    return dispatch.choose(
        "append_kv",
        backend,
        k_new.device.type,
        {
            "triton": lambda: _triton_refusal(k_new, k_cache, sizes),
            "torch": lambda: None,
            "reference": lambda: None,
        },
    )


def _triton_refusal(k_new: Tensor, k_cache: Tensor, sizes: dict[str, Any]) -> str | None:
    if torch.float64 in (k_new.dtype, k_cache.dtype):
        return "its kernel takes float16, bfloat16 and float32, not float64"
    for name in ("D", "Dv"):
        if sizes[name] > MAX_HEAD_DIM:
            return f"{name} is {sizes[name]}, and its kernel holds heads up to {MAX_HEAD_DIM} wide"
    return devices.triton_refusal(k_new.device)


def _check_values(k_new: Tensor, k_cache: Tensor, options: Append) -> None:
    """Check lengths, page numbers and positions, where reading them costs no synchronisation."""
    seqlens, table = options.cache_seqlens, options.block_table
    if not readable(seqlens):
        return
    most, page, rows = room(k_cache, table), k_cache.shape[2], k_new.shape[2]
    lengths = seqlens.tolist()
    counts = [rows] * len(lengths) if options.new_seqlens is None else options.new_seqlens.tolist()
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if not 0 <= count <= rows:
            raise ValueError(
                f"append_kv: new_seqlens[{sequence}] is {count}; it must be 0 to {rows}, the rows of k_new"
            )
        if not 0 <= length <= most - count:
            raise ValueError(
                f"append_kv: cache_seqlens[{sequence}] is {length}; with {count} new keys it must be 0 to "
                f"{most - count}, since the cache holds {most}"
            )
    if table is not None:
        spans = [range(at // page, -(-(at + n) // page) if n else 0) for at, n in zip(lengths, counts, strict=True)]
        pages = used_pages("append_kv", table, k_cache.shape[0], spans)
        _check_owners(pages, spans, lengths, counts, page)
    if options.cos is not None:
        first = lengths if options.positions is None else options.positions.tolist()
        contract = _CONTRACTS[table is not None, False]
        check_positions(contract, first, counts, options.cos.shape[0])


def _check_owners(pages: list[list[int]], spans: list[range], lengths: list[int], counts: list[int], page: int) -> None:
    """Refuse that two sequences write to one row of a page, where one of them would be lost."""
    owners: dict[int, list[tuple[int, int, int]]] = {}
    for sequence, span in enumerate(spans):
        start, stop = lengths[sequence], lengths[sequence] + counts[sequence]
        for entry, number in zip(span, pages[sequence], strict=True):
            low, high = max(start - entry * page, 0), min(stop - entry * page, page)
            for other, other_low, other_high in owners.setdefault(number, []):
                if max(low, other_low) < min(high, other_high):
                    raise ValueError(
                        f"append_kv: sequences {other} and {sequence} both write to row {max(low, other_low)} of page "
                        f"{number} of block_table; a page that is written must belong to one sequence"
                    )
            owners[number].append((sequence, low, high))
