"""The public function of decode attention, its argument contract and its choice of backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.caches import used_pages
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.contracts.offsets import readable
from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .op import attend
from .options import Options, capacity

QUANTISED = (torch.float8_e4m3fn, torch.int8)
"""Dtypes that a cache may have beside that of the queries."""

_COMMON = {
    "cache_seqlens": Spec("B", (torch.int32,)),
    "block_table": Spec("B *", (torch.int32,), optional=True),
    "sinks": Spec("Hq", FLOATS, optional=True),
    "k_prefix": Spec("Hkv P D", same_dtype_as="k_cache", optional=True),
    "v_prefix": Spec("Hkv P Dv", same_dtype_as="v_cache", optional=True),
}


def _contract(first: str, per_key_scales: bool) -> Contract:
    """Of caches whose first dimensions are ``first``: sequences of N keys, or pages."""
    scale = Spec(first if per_key_scales else "Hkv", (torch.float32,), optional=True)
    caches = (*FLOATS, *QUANTISED)
    return Contract(
        "lean_attention",
        q=Spec("B Hq Nq D", FLOATS),
        k_cache=Spec(f"{first} D", caches),
        v_cache=Spec(f"{first} Dv", caches, same_dtype_as="k_cache"),
        k_scale=scale,
        v_scale=scale,
        **_COMMON,
    )


_CONTRACTS = {
    (paged, per_key): _contract("pages Hkv page" if paged else "B Hkv N", per_key)
    for paged in (False, True)
    for per_key in (False, True)
}

MAX_HEAD_DIM = 256
"""Widest head that the kernels hold on chip."""

CUDA_DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes of q that the kernel in CUDA C++ takes."""

MAX_QUERIES = 16
"""Most query rows of a sequence: more are a prompt, and ``flash_attention`` is made for those."""


def lean_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    schedule: str | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of a few new positions to long caches of keys and values, as in autoregressive decoding.

    LeanAttention (Sanovar et al., 2024, arXiv:2405.10480): the keys of all sequences and heads are one line of tiles,
    of which every thread block takes an equal share, whatever the lengths are; partial results are merged by the
    associativity of the online softmax. Lengths are read on the device, so that a captured CUDA graph may be replayed
    with other lengths.

    Args:
        q: ``[B, Hq, Nq, D]``, float16, bfloat16, float32 or float64; Nq from 1 to 16 (several where speculated tokens
            are verified), D up to 256 on ``triton`` and ``cuda`` (which takes float16 and bfloat16). Its rows are the
            last Nq positions of each sequence, whose keys are in the cache already (:func:`iokernels.append_kv`). Any
            strides.
        k_cache: ``[B, Hkv, N, D]``, or paged ``[pages, Hkv, page, D]``. The dtype of q, float8_e4m3fn or int8. Hkv
            divides Hq; query head h reads key head ``h // (Hq/Hkv)``. Any strides, any page size.
        v_cache: ``[B, Hkv, N, Dv]``, or ``[pages, Hkv, page, Dv]``, dtype and device of k_cache.
        cache_seqlens: int32 ``[B]``: how many keys each sequence has, new ones included, 0 to the capacity. On a GPU
            its values are never read by the host, and lengths out of range are clamped. On the CPU they are checked.
            Memory past a length is never read, nor are keys behind a window: NaN there does no harm.
        block_table: int32 ``[B, most pages]``, for paged caches: entry i of a sequence is the page of its keys
            ``i * page`` to ``(i + 1) * page``. Entries of keys past its length, or behind the window of all its rows,
            are never read. The others are checked on the CPU; on a GPU, and under ``torch.compile``, a number out of
            range is taken to the nearest page, so that nothing outside the caches is read.
        causal: row i of Nq sees the keys up to its own, ``len - Nq + i``.
        window: ``(left, right)``: row i sees the keys from ``len - Nq + i - left`` to ``len - Nq + i + right``; -1 is
            unbounded. With ``causal`` the right side is 0 at most.
        scale: factor of ``q @ k^T``; ``D ** -0.5`` if None.
        softcap: replaces a score s by ``softcap * tanh(s / softcap)``; 0 turns it off.
        sinks: ``[Hq]``, any floating dtype: a logit per head that takes part in the softmax and has no value.
        k_scale: float32, multiplies the keys: one for each head ``[Hkv]``, or for each key, ``[B, Hkv, N]`` or
            ``[pages, Hkv, page]``. None: 1. For every cache dtype.
        v_scale: float32, multiplies the values, likewise.
        k_prefix: ``[Hkv, P, D]``, dtype of k_cache: keys common to all sequences, which stand before each sequence's
            own (a system prompt, say). They are read once, not once for each sequence. ``cache_seqlens`` does not
            count them. A ``k_scale`` of heads applies to them too; one of keys cannot go with a prefix.
        v_prefix: ``[Hkv, P, Dv]``; both or neither.
        return_lse: also return the log-sum-exp.
        batch_invariant: a row's bits depend on neither the rest of the batch nor the GPU's number of SMs.
        schedule: how a GPU divides the work: ``"lean"`` (equal shares), ``"split"`` (a fixed number of parts for each
            sequence and a second kernel that combines them), or None for what tuning found better.
        backend: ``"triton"``, ``"cuda"``, ``"torch"``, ``"reference"``, or None for the rule of
            :mod:`iokernels.runtime.dispatch`.

    Returns:
        ``out [B, Hq, Nq, Dv]`` in the dtype and memory order of q, or ``(out, lse)`` with ``lse [B, Hq, Nq]`` the
        natural log of the softmax denominator (sink included), float32 (float64 for float64 queries). A row that sees
        no key has out 0 and lse -inf (the sink, if any).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call, or a gradient is asked of one other than
            ``reference``: decoding has none.

    No argument is modified. The bits are the same on every run. Under autocast q is cast to the autocast dtype, and
    caches keep theirs.
    """
    (q,) = autocast(q)
    tensors = (q, k_cache, v_cache, cache_seqlens, block_table, sinks, k_scale, v_scale, k_prefix, v_prefix)
    plan = remembered(
        _PLANS,
        _plan,
        (causal, window, scale, softcap, batch_invariant, schedule, dispatch.requested(backend),
         torch.is_grad_enabled()),
        tensors,
    )  # fmt: skip
    options = Options(
        cache_seqlens, block_table, sinks, k_scale, v_scale, k_prefix, v_prefix, plan.scale, softcap=plan.softcap,
        window_left=plan.window_left, window_right=plan.window_right, schedule=plan.schedule,
    )  # fmt: skip
    _check_values(q, k_cache, options)
    if plan.backend == "reference":
        out, lse = reference.attend(q, k_cache, v_cache, options)
    else:
        out, lse = attend(q, k_cache, v_cache, plan.backend, *options)
    return (out, lse) if return_lse else out


class Plan(NamedTuple):
    """What validation makes of a call: a function of metadata alone, so it is remembered."""

    backend: str
    scale: float
    window_left: int
    window_right: int
    softcap: float
    schedule: str


_PLANS: Plans[Plan] = Plans()


def _plan(
    causal: Any, window: Any, scale: Any, softcap: Any, batch_invariant: Any, schedule: Any, backend: str | None,
    grad: bool, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Any, sinks: Any,
    k_scale: Any, v_scale: Any, k_prefix: Any, v_prefix: Any,
) -> Plan:  # fmt: skip
    scales = [x for x in (k_scale, v_scale) if isinstance(x, Tensor)]
    per_key = len(scales) > 0 and scales[0].dim() == 3
    contract = _CONTRACTS[block_table is not None, per_key]
    sizes = contract.check(
        q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens, block_table=block_table, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, k_prefix=k_prefix, v_prefix=v_prefix,
    )  # fmt: skip
    if k_cache.dtype != q.dtype and k_cache.dtype not in QUANTISED:
        raise TypeError(
            f"lean_attention: k_cache is {short(k_cache.dtype)}; it must be {short(q.dtype)}, as q is, "
            f"or {' or '.join(short(dtype) for dtype in QUANTISED)}"
        )
    heads, kv_heads = sizes["Hq"], sizes["Hkv"]
    contract.require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"q has {heads} heads and k_cache has {kv_heads}; the heads of k_cache must divide those of q",
    )
    contract.require(
        sizes["D"] > 0 and sizes["Dv"] > 0,
        f"head widths are {sizes['D']} and {sizes['Dv']}; they must be at least 1",
    )
    contract.require(
        1 <= sizes["Nq"] <= MAX_QUERIES,
        f"q has {sizes['Nq']} rows; it must have 1 to {MAX_QUERIES} (flash_attention takes more)",
    )
    if block_table is not None:
        contract.require(sizes["page"] > 0, "k_cache has pages of 0 keys; they must hold at least 1")
    contract.require(
        (k_prefix is None) == (v_prefix is None), "k_prefix and v_prefix go together: give both or neither"
    )
    contract.require(
        k_prefix is None or not per_key, "a prefix cannot go with scales for each key; scale by heads, or not at all"
    )
    for name, value in (("causal", causal), ("batch_invariant", batch_invariant)):
        contract.flag(name, value)
    left, right = contract.window(window)
    return Plan(
        backend=_backend(backend, grad, sizes, (q, k_cache, v_cache, sinks, k_scale, v_scale, k_prefix, v_prefix)),
        scale=contract.number("scale", sizes["D"] ** -0.5 if scale is None else scale),
        window_left=left,
        window_right=0 if causal else right,
        softcap=contract.number("softcap", softcap, least=0.0),
        schedule=_schedule(contract, schedule, batch_invariant),
    )


def _backend(backend: str | None, grad: bool, sizes: dict[str, Any], tensors: tuple[Tensor | None, ...]) -> str:
    differentiated = grad and any(x is not None and x.requires_grad for x in tensors)
    q = tensors[0]
    assert q is not None
    if differentiated and backend is None:
        raise UnsupportedError(
            "lean_attention: an input requires a gradient, and decoding has none. Call it under torch.no_grad(), train "
            "with flash_attention, or name backend='reference'."
        )
    widths = {name: sizes[name] for name in ("D", "Dv")}
    no_gradient = "it computes no gradients, and an input requires one" if differentiated else None
    return dispatch.choose(
        "lean_attention",
        backend,
        q.device.type,
        {
            "triton": lambda: no_gradient or devices.kernel_refusal(q, widths, MAX_HEAD_DIM),
            "cuda": lambda: no_gradient or _cuda_refusal(q, widths),
            "torch": lambda: no_gradient,
            "reference": lambda: None,
        },
    )


def _cuda_refusal(q: Tensor, widths: dict[str, Any]) -> str | None:
    """Why the kernel in CUDA C++ cannot run a call, as the end of a sentence, or None when it can."""
    if q.dtype not in CUDA_DTYPES:
        return f"its kernel takes queries of float16 and bfloat16, not {short(q.dtype)}"
    for name, width in widths.items():
        if width > MAX_HEAD_DIM:
            return f"{name} is {width}, and its kernel holds heads up to {MAX_HEAD_DIM} wide"
    return devices.cuda_refusal(q.device)


def _schedule(contract: Contract, schedule: Any, batch_invariant: bool) -> str:
    if schedule not in (None, "lean", "split"):
        raise ValueError(f"{contract.operator}: schedule is {schedule!r}; it must be None, 'lean' or 'split'")
    if not batch_invariant:
        return schedule or "auto"
    contract.require(
        schedule != "lean", "schedule is 'lean', whose shares depend on the whole batch; batch_invariant needs another"
    )
    return "invariant"


def _check_values(q: Tensor, k_cache: Tensor, options: Options) -> None:
    """Check lengths and page numbers, where reading them costs no synchronisation."""
    seqlens, table = options.cache_seqlens, options.block_table
    if not readable(seqlens):
        return
    most, page = capacity(k_cache, options), k_cache.shape[2]
    lengths = seqlens.tolist()
    for sequence, length in enumerate(lengths):
        if not 0 <= length <= most:
            raise ValueError(
                f"lean_attention: cache_seqlens[{sequence}] is {length}; it must be 0 to {most}, the cache's capacity"
            )
    if table is not None:
        hidden = q.shape[2] + options.window_left if options.window_left >= 0 else most
        used = [range(max(length - hidden, 0) // page, -(-length // page)) for length in lengths]
        used_pages("lean_attention", table, k_cache.shape[0], used)
