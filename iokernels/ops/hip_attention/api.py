"""``hip_attention``: select, then attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from iokernels.ops.block_sparse_attention.api import block_sparse_attention
from iokernels.ops.block_sparse_attention.arguments import keys as whole_keys
from iokernels.ops.block_sparse_attention.index import BlockIndex
from iokernels.ops.flash_attention.api import flash_attention
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import flag
from iokernels.runtime.registration.autocast import autocast

from .cache import SelectionCache
from .select import select_hip
from .select.call import MAX_HEAD_DIM, options_of

_CONTRACT = Contract(
    "hip_attention",
    q=Spec("B Hq Nq D", FLOATS),
    k=Spec("B Hkv Nk D", same_dtype_as="q"),
    v=Spec("B Hkv Nk Dv", same_dtype_as="q"),
)

Selector = Callable[[Tensor, Tensor], BlockIndex]


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int = 2048,
    sink: int = 256,
    window: int = 1024,
    causal: bool = True,
    scale: float | None = None,
    selection: BlockIndex | SelectionCache | Selector | None = None,
    heads: str = "kv",
    block_q: int = 64,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention to the keys that a hierarchical search finds, the first ``sink`` and the latest ``window``.

    :func:`select_hip` and then :func:`block_sparse_attention`: of N keys a row attends to ``budget + sink + window``.
    It is an approximation without a guarantee, for models trained with dense attention; what it loses depends on the
    model and must be measured there. Positions are not extended: rows keep those that their keys were given.

    Where these keys are all there are, ``budget + sink + window >= N`` (not causal: ``budget + sink >= N``), nothing is
    selected, and the call is :func:`iokernels.flash_attention`, bit for bit; not with a ``selection`` that is an index
    or a function.

    Args:
        q: ``[B, Hq, Nq, D]``, float16, bfloat16, float32 or float64. Any strides. Many rows are a prompt, few are a
            step of decoding: row i stands at position ``i + N - Nq``.
        k: ``[B, Hkv, N, D]``, dtype and device of q. Hkv divides Hq.
        v: ``[B, Hkv, N, Dv]``, dtype and device of q.
        budget: keys that are selected for each block of queries, beside sink and window: at least a block of 8, unless
            sink and window have room for all.
        sink: first keys that every row attends to.
        window: latest keys, its own included, that every row attends to.
        causal: row i sees the keys up to its position.
        scale: factor of ``q @ k^T``, above 0; ``D ** -0.5`` if None.
        selection: a :class:`SelectionCache`, which spreads the search over steps of decoding; a :class:`BlockIndex`
            that was selected before; a function of q and k that returns one, such as
            ``functools.partial(select_quest, budget=4096)``. With the last two, budget, sink, window, heads and
            block_q are not read: the index says them.
        heads: who shares a list, as in :func:`select_hip`: ``"kv"``, ``"all"`` or ``"query"``.
        block_q: query rows that share a list.
        return_lse: also return the log-sum-exp.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or None for the rule of :mod:`iokernels.runtime.dispatch`;
            for the search and the attention. ``"cuda"`` has the search alone, :func:`select_hip`, and is refused unless
            nothing is selected.

    Returns:
        ``out [B, Hq, Nq, Dv]`` in the dtype and memory order of q, or ``(out, lse)`` with ``lse [B, Hq, Nq]``, the
        natural log of the softmax denominator over the keys that were attended to.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified. Differentiable in q, k and v through the attention, for the lists as they are. Under
    autocast q, k and v are cast to the autocast dtype.
    """
    q, k, v = autocast(q, k, v)
    sizes = _CONTRACT.check(q=q, k=k, v=v)
    _CONTRACT.require(sizes["D"] > 0, "the heads of q are 0 wide; they must be at least 1")
    scale = _CONTRACT.number("scale", sizes["D"] ** -0.5 if scale is None else scale, above=0.0)
    flag("hip_attention", "return_lse", return_lse)
    index: Any = selection
    if selection is None or isinstance(selection, SelectionCache):
        # Checked also where nothing is selected, so that a call does not become wrong when its keys become more.
        heads, block_q, sink, window, causal = options_of("hip_attention", heads, block_q, sink, window, causal)
        budget = whole_keys("hip_attention", "budget", budget)
        if covers_all(sizes["Nk"], budget, sink, window, causal):
            return flash_attention(q, k, v, causal=causal, scale=scale, return_lse=return_lse, backend=backend)
        if dispatch.requested(backend) == "cuda":
            _refuse_cuda(q, {"D": sizes["D"], "Dv": sizes["Dv"]})
        options: dict[str, Any] = {
            "budget": budget, "sink": sink, "window": window, "heads": heads, "block_q": block_q, "backend": backend,
        }  # fmt: skip
        if selection is None:
            index = select_hip(q, k, causal=causal, **options)
        else:
            _CONTRACT.require(causal, "a SelectionCache serves causal decoding; causal is False")
            index = selection.select(q, k, **options)
    elif not isinstance(selection, BlockIndex):
        if not callable(selection):
            raise TypeError(
                f"hip_attention: selection is {type(selection).__name__}; it must be None, a SelectionCache, a "
                "BlockIndex or a function of q and k that returns one"
            )
        index = selection(q, k)
        if not isinstance(index, BlockIndex):
            raise TypeError(f"hip_attention: selection returned {type(index).__name__}; it must return a BlockIndex")
    return block_sparse_attention(
        q, k, v, index, causal=causal, scale=scale, return_lse=return_lse, backend=backend
    )  # fmt: skip


def _refuse_cuda(q: Tensor, widths: dict[str, Any]) -> None:
    """Raise UnsupportedError, before anything is searched for an attention that will not run."""
    dispatch.choose(
        "hip_attention",
        "cuda",
        q.device.type,
        {
            "triton": lambda: devices.kernel_refusal(q, widths, MAX_HEAD_DIM),
            "cuda": lambda: (
                "only its search has a CUDA kernel; give selection=select_hip(q, k, backend='cuda') to another backend"
            ),
            "torch": lambda: None,
            "reference": lambda: None,
        },
    )


def covers_all(keys: Any, budget: Any, sink: Any, window: Any, causal: Any) -> Any:
    """Whether sink, budget and window have room for all keys of every row."""
    return budget + sink + (window if causal else 0) >= keys
