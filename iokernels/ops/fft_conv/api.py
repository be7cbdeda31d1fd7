"""The public function of long convolution, its argument contract and its choice of backend."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.shared.layout import state_dtype
from iokernels.ops.shared.sizes import whole
from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, short
from iokernels.runtime.plans import Plans, remembered
from iokernels.runtime.registration.autocast import autocast

from . import reference
from .op import backend_module, convolve
from .options import CAUSAL, CIRCULAR, TWO_SIDED, KernelSpectrum, Options, reach

CONTRACT = Contract(
    "fft_conv",
    u=Spec("B H N", FLOATS),
    k=Spec("H Nk", FLOATS),
    pre_gate=Spec("B H N", same_dtype_as="u", optional=True),
    post_gate=Spec("B H N", same_dtype_as="u", optional=True),
    skip=Spec("H", FLOATS, optional=True),
    initial_state=Spec("B H Past", FLOATS, optional=True),
)
SPECTRUM = Contract("kernel_spectrum", k=Spec("H Nk", FLOATS))


def fft_conv(
    u: Tensor,
    k: Tensor | KernelSpectrum,
    *,
    causal: bool = True,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    freq_keep: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """Long convolution of every channel with its own filter, ``post_gate * (k * v + skip * v)``, ``v = pre_gate * u``.

    FlashFFTConv (Fu et al., 2023, arXiv:2311.05908): the Fourier transforms are matrix products that stay on chip.

    Args:
        u: ``[B, H, N]``, float16, bfloat16, float32 or float64. Any strides.
        k: ``[H, Nk]``, any floating dtype, or what :func:`kernel_spectrum` made of it. Causal: tap j weighs the input
            j steps back, and Nk is any number from 1 on. Not causal: up to N taps are a circular filter of period N;
            ``2 N - 1`` taps are a two-sided one, whose tap ``N - 1`` weighs the input of the same step.
        causal: see k.
        pre_gate: ``[B, H, N]``, dtype of u: a factor of the input.
        post_gate: ``[B, H, N]``, dtype of u: a factor of the output.
        skip: ``[H]``, any floating dtype: adds ``skip * v`` before the post gate, as a tap of lag 0.
        freq_keep: in (0, 1]: keep this share of the filter's frequencies, from 0 on. Those of the transform of length N
            if circular, else of the least power of two that is no less than ``2 N``; a causal filter then reaches a
            little into the future. None keeps all.
        initial_state: ``[B, H, Nk - 1]``, any floating dtype: the gated inputs ``v`` before the first, the latest last.
            Causal only, without ``freq_keep``.
        return_state: also return the state after the last step, so that the call can be continued. Likewise.
        batch_invariant: the result for a sequence has the same bits whatever else is in the batch. Otherwise the
            kernels transform two sequences as the parts of one complex one, which shows in the last bits, and where one
            of the two holds a NaN or an infinity, in the other one. Costs about half of the arithmetic again.
        backend: ``"triton"``, ``"cuda"``, ``"torch"``, ``"reference"``, or None for the rule of
            :mod:`iokernels.runtime.dispatch`.

    Returns:
        ``y [B, H, N]`` in the dtype of u, contiguous; with ``return_state`` a pair of it and the state, ``[B, H,
        Nk - 1]``, float32 (float64 for float64 inputs). Both are differentiable.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified. Sums are float32, products of float16 and bfloat16 inputs too; on ``triton`` and ``cuda``
    the values between two steps of a transform are float16. Under autocast u and the gates are cast to the autocast
    dtype. Gradients can be taken once; ``backend="reference"`` supports higher orders. A :class:`KernelSpectrum` has
    none.
    """
    u, pre_gate, post_gate = autocast(u, pre_gate, post_gate)
    spectrum = k if isinstance(k, KernelSpectrum) else None
    taps: Any = k if spectrum is None else spectrum.taps
    plan = remembered(
        _PLANS,
        _plan,
        (causal, freq_keep, return_state, batch_invariant, dispatch.requested(backend),
         None if spectrum is None else (spectrum.n, spectrum.causal, spectrum.keep, spectrum.dtype, spectrum.backend)),
        (u, taps, pre_gate, post_gate, skip, initial_state),
    )  # fmt: skip
    past = None if initial_state is None else initial_state.to(state_dtype(u.dtype))
    options = Options(pre_gate, post_gate, skip, past, plan.mode, plan.keep, batch_invariant)
    if plan.backend == "reference":
        y = reference.convolve(u, taps, options)
    else:
        known = [] if spectrum is None else spectrum.transform if past is None else spectrum.with_state
        y = convolve(u, taps, known, plan.backend, options)
    return (y, _state_after(u, taps.shape[1] - 1, options)) if return_state else y


def kernel_spectrum(
    k: Tensor,
    n: int,
    *,
    causal: bool = True,
    freq_keep: float | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> KernelSpectrum:
    """Transform a filter once, for many calls of :func:`fft_conv` on inputs of length ``n``: inference.

    Args:
        k: ``[H, Nk]``, as :func:`fft_conv` takes it.
        n: the N of those calls.
        causal: as in those calls; so is ``freq_keep``.
        freq_keep: as :func:`fft_conv`.
        dtype: of the u of those calls; that of k if None.
        backend: on which they run; None for the rule of :mod:`iokernels.runtime.dispatch`.

    Returns:
        What is accepted as ``k``. It holds a detached reference to k and has no gradient. A later change of k in place
        does not reach the transform. Calls with ``initial_state`` take it too: taps beyond ``n`` reach an output only
        there, so that a causal filter of more taps than ``n`` is transformed twice, with them and without.

    Raises:
        TypeError, ValueError, UnsupportedError: as :func:`fft_conv`.
    """
    n = whole(SPECTRUM, "n", n, least=0)
    SPECTRUM.check(k=k)
    dtype = k.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"kernel_spectrum: dtype is {dtype!r}; it must be {' or '.join(map(short, FLOATS))}")
    mode = _mode(SPECTRUM, causal, n, k.shape[1])
    keep = _keep(SPECTRUM, freq_keep)
    chosen = dispatch.choose("kernel_spectrum", dispatch.requested(backend), k.device.type,
                             _refusals(k.device, dtype, n, k.shape[1], mode, keep))  # fmt: skip
    taps = k.detach()
    options = Options(mode=mode, keep=keep)
    made = _transform(taps, n, dtype, options, chosen)
    with_state = made
    if mode == CAUSAL and keep == 1.0 and k.shape[1] > n:
        # Of the state its shape alone counts.
        past = torch.empty(1, k.shape[0], k.shape[1] - 1, dtype=state_dtype(dtype), device="meta")
        refused = _refusals(k.device, dtype, n, k.shape[1], mode, keep, True)[chosen]() is not None
        with_state = [] if refused else _transform(taps, n, dtype, options._replace(initial_state=past), chosen)
    return KernelSpectrum(taps, made, with_state, n, causal, keep, dtype, chosen)


@torch.no_grad()
def _transform(taps: Tensor, n: int, dtype: torch.dtype, options: Options, backend: str) -> list[Tensor]:
    """What the backend makes of a filter, or an empty list, for which it makes it in each call."""
    if backend == "reference" or n == 0 or taps.shape[0] == 0:
        return []
    return backend_module(backend).transform(taps, n, dtype, options)


class Plan(NamedTuple):
    """What validation makes of a call: a function of metadata alone, so it is remembered."""

    backend: str
    mode: str
    keep: float


_PLANS: Plans[Plan] = Plans()


def _plan(
    causal: Any, freq_keep: Any, return_state: Any, batch_invariant: Any, backend: str | None, cached: Any,
    u: Tensor, k: Tensor, pre_gate: Any, post_gate: Any, skip: Any, initial_state: Any,
) -> Plan:  # fmt: skip
    sizes = CONTRACT.check(u=u, k=k, pre_gate=pre_gate, post_gate=post_gate, skip=skip, initial_state=initial_state)
    n, taps = sizes["N"], sizes["Nk"]
    mode = _mode(CONTRACT, causal, n, taps)
    for name, value in (("return_state", return_state), ("batch_invariant", batch_invariant)):
        CONTRACT.flag(name, value)
    keep = _keep(CONTRACT, freq_keep)
    for name, wanted in (("initial_state", initial_state is not None), ("return_state", return_state)):
        CONTRACT.require(not wanted or mode == CAUSAL, f"{name} needs causal=True: other filters have no past to keep")
        CONTRACT.require(
            not wanted or keep == 1.0, f"{name} does not go with freq_keep, under which a filter has no finite past"
        )
    if initial_state is not None:
        CONTRACT.require(
            initial_state.shape[2] == taps - 1,
            f"initial_state has {initial_state.shape[2]} steps; it must have Nk - 1 = {taps - 1}",
        )
    if cached is not None:
        _check_spectrum(cached, u, causal, keep)
        backend = cached[4] if backend is None else backend
    backend = dispatch.choose(
        "fft_conv", backend, u.device.type, _refusals(u.device, u.dtype, n, taps, mode, keep, initial_state is not None)
    )
    if cached is not None:
        CONTRACT.require(
            cached[4] == backend, f"k is a spectrum of the backend {cached[4]!r}; the call runs on {backend!r}"
        )
    return Plan(backend, mode, keep)


def _check_spectrum(cached: tuple[Any, ...], u: Tensor, causal: Any, keep: float) -> None:
    n, was_causal, kept, dtype, _ = cached
    CONTRACT.require(n == u.shape[2], f"k is a spectrum for N = {n}; u has N = {u.shape[2]}")
    CONTRACT.require(was_causal == causal, f"k is a spectrum made with causal={was_causal}; the call has {causal}")
    CONTRACT.require(kept == keep, f"k is a spectrum made with freq_keep={kept}; the call has {keep}")
    CONTRACT.require(dtype == u.dtype, f"k is a spectrum for {short(dtype)} inputs; u is {short(u.dtype)}")


def _mode(contract: Contract, causal: Any, n: Any, taps: Any) -> str:
    causal = contract.flag("causal", causal)
    contract.require(taps >= 1, "k has no taps; it must have at least one")
    if causal:
        return CAUSAL
    if taps == 2 * n - 1:
        return TWO_SIDED
    contract.require(
        taps <= n or n == 0,  # of no steps, on which no filter does anything
        f"k has {taps} taps and N is {n}; without causal it must have up to N (circular) or 2 N - 1 (two-sided)",
    )
    return CIRCULAR


def _keep(contract: Contract, freq_keep: Any) -> float:
    if freq_keep is None:
        return 1.0
    keep = contract.number("freq_keep", freq_keep, above=0.0)
    contract.require(keep <= 1.0, f"freq_keep is {freq_keep}; it must be above 0 and at most 1")
    return keep


def _refusals(
    device: torch.device, dtype: torch.dtype, n: Any, taps: Any, mode: str, keep: float, state: bool = False
) -> dict[str, dispatch.Refusal]:
    return {
        "triton": partial(_triton_refusal, device, dtype, n, taps, mode, keep, state),
        "cuda": partial(_cuda_refusal, device, dtype, n, taps, mode, keep, state),
        "torch": lambda: None,
        "reference": lambda: None,
    }


def _triton_refusal(
    device: torch.device, dtype: torch.dtype, n: Any, taps: Any, mode: str, keep: float, state: bool
) -> str | None:
    if dtype == torch.float64:
        return "its kernels take float16, bfloat16 and float32, not float64"
    mode, taps = reach(n, taps, mode, keep, state and taps > 1)
    from .triton.tuning import (
        tiling_refusal,
    )  # with it comes the tuning layer, which importing the library does not need

    return devices.triton_refusal(device) or tiling_refusal(n, taps, mode, state and taps > 1, dtype.itemsize)


def _cuda_refusal(
    device: torch.device, dtype: torch.dtype, n: Any, taps: Any, mode: str, keep: float, state: bool
) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels take float16 and bfloat16, not {short(dtype)}"
    mode, taps = reach(n, taps, mode, keep, state and taps > 1)
    from .cuda.tuning import refusal

    return devices.cuda_refusal(device) or refusal(
        n, taps, mode, state and taps > 1, devices.spec_of(device).smem_block
    )


def _state_after(u: Tensor, width: int, options: Options) -> Tensor:
    """The last ``width`` gated inputs, with those of the initial state (or 0) before them."""
    n = u.shape[2]
    first = max(n - width, 0)
    v = u[:, :, first:].to(state_dtype(u.dtype))
    if options.pre_gate is not None:
        v = v * options.pre_gate[:, :, first:]
    if width <= n:
        return v.clone() if options.pre_gate is None and u.dtype == v.dtype else v
    past = options.initial_state
    past = v.new_zeros(*u.shape[:2], width - n) if past is None else past[:, :, n:]
    return torch.cat([past, v], dim=2)
