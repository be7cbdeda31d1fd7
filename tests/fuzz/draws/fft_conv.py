"""Calls of fft_conv, with filters and their spectra, and of fft_conv_step with both of its states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import iokernels

from ..case import Case
from ..draw import Draw
from ..oracles import fft_conv as oracle

BACKENDS = {"torch": 64, "triton": 16, "cuda": 8, "reference": 12}
PROMISED = {torch.float16: 1.5e-3, torch.bfloat16: 3e-3, torch.float32: 2e-6}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def draw(d: Draw) -> Case:
    backend = d.backend(BACKENDS)
    dtype = d.dtype(backend)
    d.magnitude(dtype)
    form = d.weighed({"plain": 5, "spectrum": 2, "window": 1, "lazy": 1}) if backend == "torch" else d.weighed(
        {"plain": 4, "spectrum": 1})  # fmt: skip
    slow = backend in ("triton", "cuda")
    batch, heads = d.pick((0, 1, 1, 2, 3, 5)), d.pick((1, 1, 2, 3))
    n = d.size(150 if slow else 300, (16, 32, 64, 128, 256), least=1 if form == "spectrum" else 0)
    if not slow and d.chance(0.1):
        n = d.pick((511, 512, 1000, 1025, 2048))
    a: dict[str, Any] = {"backend": backend}
    a["u"] = d.floats("u", (batch, heads, n), dtype)
    taps = _mode(d, a, n, form)
    k = d.normal(heads, taps) * d.pick((1.0, taps**-0.5))
    a["k"] = d.laid_out("k", k.to(d.pick((dtype, torch.float32, d.pick(_FLOATS)))))
    for name in ("pre_gate", "post_gate"):
        if d.chance(0.3):
            a[name] = d.laid_out(name, d.normal(batch, heads, n).to(dtype))
    if d.chance(0.3):
        a["skip"] = d.laid_out("skip", d.normal(heads).to(d.pick((dtype, torch.float32))))
    stateful = a.get("causal", True) and not a.get("freq_keep")
    if form == "window" or (stateful and d.chance(0.35)):
        name = "state" if form == "window" else "initial_state"
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        of = sums if form in ("window", "lazy") else d.pick((sums, dtype))
        past = d.normal(batch, heads, taps - 1).to(of)
        a[name] = d.laid_out(name, past, but=("expanded",) if form == "window" else ())
    if form == "plain" and d.chance(0.2):
        a["batch_invariant"] = True
    if stateful and form in ("plain", "spectrum") and d.chance(0.5):
        a["return_state"] = True
    return _case(d, a, form, dtype)


def _case(d: Draw, a: dict[str, Any], form: str, dtype: torch.dtype) -> Case:
    dtypes = {"y": dtype}
    if a.get("return_state"):
        dtypes["state"] = torch.float64 if dtype == torch.float64 else torch.float32
    names = ("u", "k", "pre_gate", "post_gate", "skip", "initial_state")
    names = names if form == "plain" else tuple(n for n in names if n != "k")
    without = form in ("window", "lazy") or d.chance(0.4)
    wanted = () if without else tuple(n for n in names if a.get(n) is not None and d.chance(0.85))
    writes = ("state",) if form == "window" else ()

    def expected(args: dict[str, Any]) -> dict[str, Tensor]:
        if form == "window":
            args = {**args, "initial_state": args["state"]}
        found = oracle.convolved(args)
        keeps_state = args.get("return_state") or form == "window"
        return found if keeps_state else {"y": found["y"]}

    run = {"plain": _plain, "spectrum": _spectrum, "window": _window, "lazy": _lazy}[form]
    d.notes["backend"] = f"{a['backend']!r}, {form}"
    return Case(
        "fft_conv", run, expected, a, d.notes, dtype, dtypes, wanted, writes=writes, rms=PROMISED, cancels=("skip",),
        sound=() if form == "plain" else ("u", "state", "pre_gate", "post_gate"),
        slack=2.0,  # of a transform every point strays, whichever input was moved
    )  # fmt: skip


def _mode(d: Draw, a: dict[str, Any], n: int, form: str) -> int:
    """Taps of a causal, circular or two-sided filter, and the share of its frequencies."""
    kind = d.pick(("causal", "causal", "causal", "circular", "two-sided"))
    if form in ("window", "lazy") or n == 0:
        kind = "causal"
    a["causal"] = kind == "causal"
    if kind == "causal":
        taps = d.pick((n, d.size(200, (8, 16, 32, 64, 128), least=1), d.size(9, least=1), n + d.size(60)))
    else:
        taps = d.pick((n, d.size(n, least=1))) if kind == "circular" else 2 * n - 1
    taps = max(taps, 1)
    if n and form not in ("window", "lazy") and taps <= 2 * n - 1 and n <= 300 and d.chance(0.15):
        a["freq_keep"] = d.pick((0.1, 0.25, 0.5, 0.9, 1.0))
        taps = min(taps, n) if kind == "causal" else taps
    return taps


def _named(found: Any) -> dict[str, Tensor]:
    return {"y": found[0], "state": found[1]} if isinstance(found, tuple) else {"y": found}


def _plain(args: dict[str, Any]) -> dict[str, Tensor]:
    return _named(iokernels.fft_conv(**args))


def _spectrum(args: dict[str, Any]) -> dict[str, Tensor]:
    """The filter transformed beforehand."""
    options = {name: args[name] for name in ("causal", "freq_keep", "backend") if name in args}
    spectrum = iokernels.kernel_spectrum(args["k"], args["u"].shape[-1], dtype=args["u"].dtype, **options)
    return _named(iokernels.fft_conv(**{**args, "k": spectrum}))


def _steps(args: dict[str, Any], state: Any) -> Tensor:
    u, gates = args["u"], [name for name in ("pre_gate", "post_gate") if args.get(name) is not None]
    found = [
        iokernels.fft_conv_step(
            u[:, :, t], args["k"], state, skip=args.get("skip"), **{name: args[name][:, :, t] for name in gates}
        )
        for t in range(u.shape[2])
    ]
    return torch.stack(found, dim=2) if found else torch.zeros_like(u)


def _window(args: dict[str, Any]) -> dict[str, Tensor]:
    return {"y": _steps(args, args["state"]), "state": args["state"].clone()}


def _lazy(args: dict[str, Any]) -> dict[str, Tensor]:
    u = args["u"]
    if not u.shape[2]:
        return {"y": torch.zeros_like(u)}
    state = iokernels.lazy_state(
        args["k"], u.shape[0], u.shape[2], dtype=u.dtype, initial_state=args.get("initial_state")
    )
    return {"y": _steps(args, state)}
