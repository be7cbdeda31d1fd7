"""The public function of block-sparse attention, its argument contract and its choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import flag
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .arguments import too_long
from .index import BlockIndex, bounded
from .op import attend
from .options import Options
from .values import check_values

_LISTS = {
    "indices": Spec("B Hm Mq S", (torch.int32,)),
    "counts": Spec("B Hm Mq", (torch.int32,)),
    "cache_seqlens": Spec("B", (torch.int32,), optional=True),
}
_DENSE = Contract(
    "block_sparse_attention",
    q=Spec("B Hq Nq D", FLOATS),
    k=Spec("B Hkv Nk D", same_dtype_as="q"),
    v=Spec("B Hkv Nk Dv", same_dtype_as="q"),
    **_LISTS,
)
_PAGED = Contract(
    "block_sparse_attention",
    q=Spec("B Hq Nq D", FLOATS),
    k=Spec("pages Hkv page D", same_dtype_as="q"),
    v=Spec("pages Hkv page Dv", same_dtype_as="q"),
    block_table=Spec("B table", (torch.int32,)),
    **_LISTS,
)

MAX_HEAD_DIM = 256
"""Widest head that the Triton kernels hold on chip."""


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Softmax attention of each block of queries to the key blocks that ``index`` lists for it.

    Equal to dense attention with ``index.to_mask(causal=causal)``, at a cost that grows with the lists and not with
    the keys. Each key counts once, also where it is listed, in the sink and in the window at the same time. The lists
    are read on the device, so that a captured CUDA graph may be replayed with other lists.

    Args:
        q: ``[B, Hq, Nq, D]``, float16, bfloat16, float32 or float64; D up to 256 on ``triton``. Any strides. Few rows
            (decoding) are one block of queries, whose list is divided among thread blocks.
        k: ``[B, Hkv, Nk, D]``, dtype and device of q, or paged ``[pages, Hkv, page, D]``. Hkv divides Hq; query head h
            reads key head ``h // (Hq/Hkv)``. Any strides.
        v: ``[B, Hkv, Nk, Dv]`` or ``[pages, Hkv, page, Dv]``, dtype and device of q.
        index: which keys a row sees: :class:`BlockIndex` of ``q_len = Nq`` rows and ``kv_len = Nk`` keys (paged: at
            most ``block_table.shape[1] * page``), with lists for 1, Hkv or Hq heads. A constant to autograd.
        causal: row i sees the keys up to its position, ``i + Nk - Nq``.
        scale: factor of ``q @ k^T``; ``D ** -0.5`` if None.
        return_lse: also return the log-sum-exp.
        block_table: int32 ``[B, most pages]``, for paged caches: entry i of a sequence is the page of its keys
            ``i * page`` to ``(i + 1) * page``. Entries of pages that no row attends to are never read.
        cache_seqlens: int32 ``[B]``: how many of the ``kv_len`` keys each sequence has, where they differ: positions
            align with its own length, and nothing past it is read. On a GPU the host never reads it, and lengths out
            of range are clamped. None: all have ``kv_len``.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or None for the rule of :mod:`iokernels.runtime.dispatch`.

    Returns:
        ``out [B, Hq, Nq, Dv]`` in the dtype and memory order of q, or ``(out, lse)`` with ``lse [B, Hq, Nq]`` the
        natural log of the softmax denominator, float32 (float64 for float64 inputs), differentiable. A row that sees
        no key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument. On a CPU also values
            of tensors that name what is not there: counts past the lists, a block named twice, lengths past
            ``kv_len``, and pages that some row attends to; the message names the entry.
        UnsupportedError: the named backend cannot run this call, or a gradient is asked of one other than
            ``reference`` with a ``block_table`` or ``cache_seqlens``, which are for inference.

    No argument is modified. The bits are the same on every run. Under autocast q, k and v are cast to the autocast
    dtype. Gradients can be taken once; ``backend="reference"`` supports higher orders.
    """
    if not isinstance(index, BlockIndex):
        raise TypeError(f"block_sparse_attention: index is {type(index).__name__}; it must be a BlockIndex")
    q, k, v = autocast(q, k, v)
    plan = remembered(
        _PLANS,
        _plan,
        (
            causal,
            scale,
            return_lse,
            dispatch.requested(backend),
            index.block_q,
            index.q_len,
            index.kv_len,
            torch.is_grad_enabled(),
        ),
        (q, k, v, index.indices, index.counts, block_table, cache_seqlens),
    )
    sink, sink_heads = _split(index.sink)
    window, window_heads = _split(index.window)
    options = Options(
        index.indices, index.counts, sink_heads, window_heads, block_table, cache_seqlens, bounded(index.block_q),
        index.block_k, sink, window, index.kv_len, plan.scale, plan.causal,
    )  # fmt: skip
    if plan.backend == "reference":
        check_values(q, k, options)
        out, lse = reference.attend(q, k, v, options)
    else:
        out, lse = attend(q, k, v, plan.backend, options)
    return (out, lse) if return_lse else out


class Plan(NamedTuple):
    """What validation makes of a call: a function of metadata alone, so it is remembered."""

    backend: str
    scale: float
    causal: bool


_PLANS: Plans[Plan] = Plans()


def _plan(
    causal: Any, scale: Any, return_lse: Any, backend: str | None, block_q: Any, q_len: Any, kv_len: Any, grad: bool,
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block_table: Any, cache_seqlens: Any,
) -> Plan:  # fmt: skip
    contract = _DENSE if block_table is None else _PAGED
    tables = {} if block_table is None else {"block_table": block_table}
    sizes = contract.check(q=q, k=k, v=v, indices=indices, counts=counts, cache_seqlens=cache_seqlens, **tables)
    heads, kv_heads, lists = sizes["Hq"], sizes["Hkv"], sizes["Hm"]
    contract.require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"q has {heads} heads and k has {kv_heads}; the heads of k must divide those of q",
    )
    contract.require(
        any(lists == count for count in (1, kv_heads, heads)),  # Dynamo finds no symbol with ``in``
        f"index has lists for {lists} heads; it must have them for 1, for the {kv_heads} of k or for the {heads} of q",
    )
    contract.require(
        sizes["D"] > 0 and sizes["Dv"] > 0, f"head widths are {sizes['D']} and {sizes['Dv']}; they must be at least 1"
    )
    # Not require(): torch.compile cannot format a symbol, and would have to for the message.
    if q_len != sizes["Nq"]:
        raise ValueError(f"block_sparse_attention: index has q_len {q_len}; q has {sizes['Nq']} rows")
    if block_table is None and kv_len != sizes["Nk"]:
        raise ValueError(f"block_sparse_attention: index has kv_len {kv_len}; k has {sizes['Nk']} keys")
    if block_table is not None and kv_len > sizes["table"] * sizes["page"]:
        raise ValueError(
            f"block_sparse_attention: index has kv_len {kv_len}; block_table has room for "
            f"{sizes['table'] * sizes['page']} keys"
        )
    for name, value in (("causal", causal), ("return_lse", return_lse)):
        flag("block_sparse_attention", name, value)
    scale = contract.number("scale", sizes["D"] ** -0.5 if scale is None else scale)
    inference = None
    if grad and (q.requires_grad or k.requires_grad or v.requires_grad):
        if block_table is not None:
            inference = "its gradients do not reach paged caches; call it without block_table, or under torch.no_grad()"
        elif cache_seqlens is not None:
            inference = "its gradients take no cache_seqlens; call it without them, or under torch.no_grad()"
    widths = {"D": sizes["D"], "Dv": sizes["Dv"]}
    chosen = dispatch.choose(
        "block_sparse_attention",
        backend,
        q.device.type,
        {
            "triton": lambda: (
                inference or too_long(kv_len) or partial(devices.kernel_refusal, q, widths, MAX_HEAD_DIM)()
            ),
            "torch": lambda: inference,
            "reference": lambda: None,
        },
    )
    return Plan(chosen, scale, causal)


def _split(value: int | Tensor) -> tuple[Any, Tensor | None]:
    """A number for all heads, and a tensor where heads differ."""
    return (0, value) if isinstance(value, Tensor) else (bounded(value), None)
