"""The public functions of exact softmax attention, their argument contract and their choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.contracts.offsets import check_offsets
from iokernels.runtime.contracts.plain import integral, whole
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .dropout import draw_seed
from .op import attend
from .options import Options

_SCORES = "B|1 Hq|1 Nq|1 Nk|1"
_OPTIONAL = {
    "mask": Spec(_SCORES, (torch.bool,), optional=True),
    "bias": Spec(_SCORES, FLOATS, optional=True),
    "alibi_slopes": Spec("B|1 Hq", (torch.float32,), optional=True),
    "sinks": Spec("Hq", FLOATS, optional=True),
}
DENSE = Contract(
    "flash_attention",
    q=Spec("B Hq Nq D", FLOATS),
    k=Spec("B Hkv Nk D", same_dtype_as="q"),
    v=Spec("B Hkv Nk Dv", same_dtype_as="q"),
    **_OPTIONAL,
)
VARLEN = Contract(
    "flash_attention_varlen",
    q=Spec("Tq Hq D", FLOATS),
    k=Spec("Tk Hkv D", same_dtype_as="q"),
    v=Spec("Tk Hkv Dv", same_dtype_as="q"),
    cu_seqlens_q=Spec("B+1", (torch.int32,)),
    cu_seqlens_k=Spec("B+1", (torch.int32,)),
    **_OPTIONAL,
)

MAX_HEAD_DIM = 256
"""Widest head that the kernels hold on chip."""

_LEAST, _MOST = 1e-30, 1e30
"""Magnitudes that scale and softcap may have in float32, with room for each other and log2 e."""

CUDA_DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes that the kernels in CUDA C++ take."""


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """Exact attention, ``softmax(scale * q @ k^T + ...) @ v``, without writing the N x N matrix to memory.

    FlashAttention-2 (Dao, 2023, arXiv:2307.08691). Query row i and key j are aligned at the end of both sequences:
    with ``off = Nk - Nq``, row i stands at position ``i + off`` of the keys.

    Args:
        q: ``[B, Hq, Nq, D]``, float16, bfloat16, float32 or float64; D up to 256 on ``triton``. Any strides: pass
            a ``[B, N, H, D]`` tensor as ``x.transpose(1, 2)``, it is not copied.
        k: ``[B, Hkv, Nk, D]``, dtype and device of q. Hkv divides Hq; query head h reads key head ``h // (Hq/Hkv)``.
        v: ``[B, Hkv, Nk, Dv]``, dtype and device of q.
        causal: row i sees the keys up to ``i + off``.
        window: ``(left, right)``: row i sees the keys from ``i + off - left`` to ``i + off + right``; -1 is
            unbounded. With ``causal`` the right side is 0 at most.
        scale: factor of ``q @ k^T``; ``D ** -0.5`` if None.
        softcap: replaces a score s by ``softcap * tanh(s / softcap)``; 0 turns it off.
        mask: bool, broadcastable to ``[B, Hq, Nq, Nk]``; True attends.
        bias: added to the scores (after scale and softcap), broadcastable to ``[B, Hq, Nq, Nk]``, any floating dtype.
            Differentiable; memory for its gradient is that of its own shape.
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``; adds ``-slope * |i + off - j|``. Not differentiable: express
            learnable slopes as ``bias``. A parameter is taken where no gradients are recorded.
        sinks: ``[Hq]``, any floating dtype: a logit per head that takes part in the softmax and has no value.
            Differentiable.
        dropout_p: probability in [0, 1) with which an attention weight is dropped; survivors are scaled by
            ``1 / (1 - dropout_p)``. Always applied: pass 0 in evaluation. The seed comes from torch's generator of the
            device, so ``torch.manual_seed`` repeats it; the same seed drops the same weights on every backend.
        return_lse: also return the log-sum-exp.
        deterministic: accepted for the callers of other libraries. Every backend here gives the same bits on every
            run, forward and backward, so True and False mean the same.
        backend: ``"triton"``, ``"cuda"``, ``"torch"``, ``"reference"``, or None for the rule of
            :mod:`iokernels.runtime.dispatch`, which never takes ``"cuda"``. That one takes float16 and bfloat16, and
            neither mask, bias, alibi_slopes, sinks nor dropout_p.

    Returns:
        ``out [B, Hq, Nq, Dv]`` in the dtype and memory order of q, or ``(out, lse)`` with ``lse [B, Hq, Nq]`` the
        natural log of the softmax denominator (sink included), float32 (float64 for float64 inputs), differentiable.
        A row that sees no key has out 0, lse -inf (the sink, if any) and zero gradients.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified. Under autocast q, k and v are cast to the autocast dtype. Gradients can be taken once;
    ``backend="reference"`` supports higher orders.
    """
    q, k, v = autocast(q, k, v)
    plan = remembered(
        _PLANS,
        _dense_plan,
        (causal, window, scale, softcap, dropout_p, deterministic, dispatch.requested(backend)),
        (q, k, v, mask, bias, alibi_slopes, sinks),
    )
    mask, bias, alibi_slopes = _four_dims(mask), _four_dims(bias), _two_dims(alibi_slopes)
    out, lse = _run(plan, q, k, v, bias, sinks, mask, alibi_slopes)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """:func:`flash_attention` of B sequences packed one after the other, each attending to its own keys.

    Args:
        q: ``[total_q, Hq, D]``; sequence b holds the rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``.
        k: ``[total_k, Hkv, D]``, likewise by ``cu_seqlens_k``.
        v: ``[total_k, Hkv, Dv]``.
        cu_seqlens_q: int32 ``[B + 1]`` on the device of q, not decreasing, from 0 to at most total_q. On a GPU its
            values are never read by the host: offsets out of range are clamped to the tensors, and a sequence of
            negative length is empty. On the CPU they are checked.
        cu_seqlens_k: int32 ``[B + 1]``.
        max_seqlen_q: an upper bound on the query lengths, >= 0. Rows past it in a longer sequence are not computed
            (zero on a GPU; refused on the CPU).
        max_seqlen_k: an upper bound on the key lengths.
        mask, bias: broadcastable to ``[B, Hq, max_seqlen_q, max_seqlen_k]``, indexed from each sequence's start.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``.

    The other arguments, and the errors, are those of :func:`flash_attention`. Sequences may be empty.

    Returns:
        ``out [total_q, Hq, Dv]``, or ``(out, lse)`` with ``lse [Hq, total_q]``. Rows that belong to no sequence have
        out 0 and lse -inf.
    """
    q, k, v = autocast(q, k, v)
    max_seqlen_q, max_seqlen_k = _python_int(max_seqlen_q), _python_int(max_seqlen_k)
    plan = remembered(
        _PLANS,
        _varlen_plan,
        (causal, window, scale, softcap, dropout_p, deterministic, dispatch.requested(backend),
         max_seqlen_q, max_seqlen_k),
        (q, k, v, mask, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k),
    )  # fmt: skip
    _check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    _check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = _run(
        plan,
        q,
        k,
        v,
        _four_dims(bias),
        sinks,
        _four_dims(mask),
        _two_dims(alibi_slopes),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
    )
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


class Plan(NamedTuple):
    """What validation makes of a call: a function of metadata alone, so it is remembered."""

    operator: str
    backend: str
    scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float


_PLANS: Plans[Plan] = Plans()


def _run(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, bias: Any, sinks: Any, mask: Any, alibi_slopes: Any,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        # Not a matter of the plan, which knows no grad mode.
        raise ValueError(
            f"{plan.operator}: alibi_slopes requires a gradient, which is not computed; pass learnable slopes as bias"
        )
    seed = draw_seed(q.device) if plan.dropout_p > 0.0 else None
    options = Options(
        bias, sinks, mask, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, plan.scale, softcap=plan.softcap,
        window_left=plan.window_left, window_right=plan.window_right, dropout_p=plan.dropout_p,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    if plan.backend == "reference":
        return reference.attend(q, k, v, options)
    return attend(q, k, v, plan.backend, options)


def _dense_plan(
    causal: bool, window: Any, scale: Any, softcap: Any, dropout_p: Any, deterministic: Any, backend: str | None,
    q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, alibi_slopes: Any, sinks: Any,
) -> Plan:  # fmt: skip
    sizes = DENSE.check(
        q=q, k=k, v=v, mask=_four_dims(mask), bias=_four_dims(bias), alibi_slopes=_two_dims(alibi_slopes), sinks=sinks
    )
    changes = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    return _plan(DENSE, q, sizes, causal, window, scale, softcap, dropout_p, deterministic, changes, backend)


def _varlen_plan(
    causal: bool, window: Any, scale: Any, softcap: Any, dropout_p: Any, deterministic: Any, backend: str | None,
    max_seqlen_q: Any, max_seqlen_k: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, alibi_slopes: Any,
    sinks: Any, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
) -> Plan:  # fmt: skip
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        hint = f": pass {name}.item()" if isinstance(value, Tensor) else ""
        whole(VARLEN.operator, name, value, hint=hint)
        if torch.compiler.is_compiling():
            torch._check(value >= 0)  # a symbol that a traced .item() made cannot be asked, only told
        elif whole(VARLEN.operator, name, value, least=0) >= 2**63:
            raise ValueError(f"{VARLEN.operator}: {name} does not fit 64 bits; it must be below 2 ** 63")
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if isinstance(offsets, Tensor) and offsets.dim() == 1:
            if offsets.dtype == torch.int64:
                raise TypeError(f"{VARLEN.operator}: {name} is int64; it must be int32: pass {name}.int()")
            VARLEN.require(
                offsets.shape[0] >= 1, f"{name} is empty; it must have one entry more than there are sequences"
            )
    sizes = VARLEN.check(
        {"Nq": max_seqlen_q, "Nk": max_seqlen_k},
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, mask=_four_dims(mask),
        bias=_four_dims(bias), alibi_slopes=_two_dims(alibi_slopes), sinks=sinks,
    )  # fmt: skip
    changes = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    return _plan(VARLEN, q, sizes, causal, window, scale, softcap, dropout_p, deterministic, changes, backend)


def _plan(
    contract: Contract, q: Tensor, sizes: dict[str, Any], causal: bool, window: Any, scale: Any, softcap: Any,
    dropout_p: Any, deterministic: Any, changes: dict[str, Tensor | None], backend: str | None,
) -> Plan:  # fmt: skip
    heads, kv_heads, width = sizes["Hq"], sizes["Hkv"], sizes["D"]
    contract.require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"q has {heads} heads and k has {kv_heads}; the heads of k must divide those of q",
    )
    contract.require(
        width > 0 and sizes["Dv"] > 0, f"head widths are {width} and {sizes['Dv']}; they must be at least 1"
    )
    causal = contract.flag("causal", causal)
    deterministic = contract.flag("deterministic", deterministic, optional=True)
    left, right = contract.window(window)
    if causal:
        right = 0
    single = q.dtype != torch.float64
    if scale is None:
        scale = contract.number("scale", width**-0.5)
    else:
        scale = contract.number("scale", scale)
        if single and not -_MOST <= scale <= _MOST:
            raise ValueError(f"{contract.operator}: scale is {scale}; it must be within +-{_MOST} (float32)")
    softcap = contract.number("softcap", softcap, least=0.0)
    if single and softcap != 0.0 and not _LEAST <= softcap <= _MOST:
        raise ValueError(
            f"{contract.operator}: softcap is {softcap}; it must be 0, or from {_LEAST} to {_MOST} (float32)"
        )
    dropout_p = contract.number("dropout_p", dropout_p, least=0.0, below=1.0)
    widths = {"D": sizes["D"], "Dv": sizes["Dv"]}
    backend = dispatch.choose(
        contract.operator,
        backend,
        q.device.type,
        {
            "triton": partial(devices.kernel_refusal, q, widths, MAX_HEAD_DIM),
            "cuda": lambda: _cuda_refusal(q, widths, {**changes, "dropout_p": dropout_p if dropout_p > 0.0 else None}),
            "torch": lambda: None,
            "reference": lambda: None,
        },
    )
    return Plan(contract.operator, backend, scale, left, right, softcap, dropout_p)


def _cuda_refusal(q: Tensor, widths: dict[str, Any], changes: dict[str, Any]) -> str | None:
    """Why the kernels in CUDA C++ cannot run a call, as the end of a sentence, or None when they can."""
    if q.dtype not in CUDA_DTYPES:
        return f"its kernels take float16 and bfloat16, not {short(q.dtype)}"
    for name, width in widths.items():
        if width > MAX_HEAD_DIM:
            return f"{name} is {width}, and its kernels hold heads up to {MAX_HEAD_DIM} wide"
    for name, given in changes.items():
        if given is not None:
            return f"its kernels have no {name}"
    return devices.cuda_refusal(q.device)


def _check_offsets(name: str, offsets: Tensor, total: int, longest: int) -> None:
    """Check the values of cumulative lengths, where reading them costs no synchronisation."""
    lengths = check_offsets(VARLEN, name, offsets, total)
    if lengths is not None:
        most = max(lengths, default=0)
        VARLEN.require(
            most <= longest, f"max_seqlen_{name[-1]} is {longest}, and the longest sequence of {name} has {most} rows"
        )


def _python_int(x: Any) -> Any:
    """A whole number as an int; whatever else, as it is."""
    return x if type(x) is int or (found := integral(x)) is None else found


def _four_dims(x: Any) -> Any:
    """Add leading dimensions of size 1, as broadcasting does."""
    if x is None or not isinstance(x, Tensor):
        return x
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x


def _two_dims(x: Any) -> Any:
    return x if x is None or not isinstance(x, Tensor) or x.dim() != 1 else x.unsqueeze(0)
