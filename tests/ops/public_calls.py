"""One small call of every public function that runs an operator: what is promised of all of them is tested on these.

``CALLS[name].run(tensors, backend)`` returns tensors; ``tensors`` makes the arguments, in any dtype that the operator
takes, and ``of_reals`` names those that have derivatives. A step returns its output and the state that it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import iokernels as io
from iokernels.runtime.device import cuda_refusal

Tensors = dict[str, Tensor]


class Call(NamedTuple):
    """``shapes``: of the real arguments. ``integers``: the others. ``single``: arguments that are float32 at most."""

    run: Callable[[Tensors, str | None], Any]
    shapes: dict[str, tuple[int, ...]]
    integers: Mapping[str, list[int]] = MappingProxyType({})
    states: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("torch", "triton", "cuda")
    writes: tuple[str, ...] = ()

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        """New arguments: reals in ``dtype``, states in float32 at least, integers as int32."""
        torch.manual_seed(1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        made = {}
        for name, shape in self.shapes.items():
            x = torch.randn(shape, dtype=torch.float64)
            x = -x.abs() if name in self.negative else x
            made[name] = x.to(device=device, dtype=wide if name in self.states else dtype)
        for name, values in self.integers.items():
            made[name] = torch.tensor(values, dtype=torch.int32, device=device)
        return made


def _flash(x: Tensors, backend: str | None) -> Any:
    return io.flash_attention(
        x["q"], x["k"], x["v"], causal=True, softcap=3.0, bias=x["bias"], sinks=x["sinks"], return_lse=True,
        backend=backend,
    )  # fmt: skip


def _plain_flash(x: Tensors, backend: str | None) -> Any:
    return io.flash_attention(x["q"], x["k"], x["v"], backend=backend)


def _varlen(x: Tensors, backend: str | None) -> Any:
    return io.flash_attention_varlen(
        x["q"], x["k"], x["v"], cu_seqlens_q=x["cu"], cu_seqlens_k=x["cu"], max_seqlen_q=4, max_seqlen_k=4, causal=True,
        backend=backend,
    )  # fmt: skip


def _lean(x: Tensors, backend: str | None) -> Any:
    return io.lean_attention(x["q"], x["k"], x["v"], cache_seqlens=x["lengths"], return_lse=True, backend=backend)


def _append(x: Tensors, backend: str | None) -> Any:
    io.append_kv(x["k_new"], x["v_new"], x["k"], x["v"], cache_seqlens=x["lengths"], backend=backend)
    return x["k"], x["v"]


def _sparse(x: Tensors, backend: str | None) -> Any:
    index = io.BlockIndex(x["indices"].view(1, 1, 2, 1), x["counts"].view(1, 1, 2), 16, 8, 0, 4, 24, 24)
    return io.block_sparse_attention(x["q"], x["k"], x["v"], index, return_lse=True, backend=backend)


def _hip(x: Tensors, backend: str | None) -> Any:
    return io.hip_attention(x["q"], x["k"], x["v"], budget=8, sink=0, window=8, block_q=16, backend=backend)


def _linear(x: Tensors, backend: str | None) -> Any:
    return io.linear_attention(
        x["q"], x["k"], x["v"], log_decay=x["decay"], initial_state=x["state"], return_state=True, backend=backend
    )


def _plain_linear(x: Tensors, backend: str | None) -> Any:
    return io.linear_attention(x["q"], x["k"], x["v"], backend=backend)


def _linear_step(x: Tensors, backend: str | None) -> Any:
    return io.linear_attention_step(x["q"], x["k"], x["v"], x["state"], log_decay=x["decay"], backend=backend), x[
        "state"
    ]


def _delta(x: Tensors, backend: str | None) -> Any:
    return io.gated_delta_rule(
        x["q"], x["k"], x["v"], x["beta"], log_decay=x["decay"], initial_state=x["state"], return_state=True,
        backend=backend,
    )  # fmt: skip


def _delta_step(x: Tensors, backend: str | None) -> Any:
    out = io.gated_delta_rule_step(x["q"], x["k"], x["v"], x["beta"], x["state"], log_decay=x["decay"], backend=backend)
    return out, x["state"]


def _fft(x: Tensors, backend: str | None) -> Any:
    return io.fft_conv(
        x["u"], x["k"], pre_gate=x["pre"], post_gate=x["post"], skip=x["skip"], initial_state=x["past"], backend=backend
    )


def _short(x: Tensors, backend: str | None) -> Any:
    return io.short_conv(
        x["x"], x["weight"], bias=x["bias"], activation="silu", initial_state=x["past"], return_state=True,
        backend=backend,
    )  # fmt: skip


def _short_step(x: Tensors, backend: str | None) -> Any:
    return io.short_conv_step(x["x"], x["weight"], x["past"], bias=x["bias"], backend=backend), x["past"]


def _rnn(cell: str) -> Callable[[Tensors, str | None], Any]:
    def run(x: Tensors, backend: str | None) -> Any:
        return io.flash_rnn(
            x["gates"], x["recurrent"], x["bias"], cell=cell, initial_state=x["state"], return_state=True,
            backend=backend,
        )  # fmt: skip

    return run


_QKV = {"q": (1, 2, 8, 16), "k": (1, 1, 8, 16), "v": (1, 1, 8, 16)}
_HEADS = {"q": (1, 2, 8, 16), "k": (1, 2, 8, 16), "v": (1, 2, 8, 16)}
_ONE = dict.fromkeys(("q", "k", "v"), (1, 2, 1, 16))
_WITHOUT_CUDA = ("torch", "triton")

CALLS: dict[str, Call] = {
    "flash_attention": Call(_plain_flash, _QKV),
    "flash_attention with options": Call(_flash, {**_QKV, "bias": (1, 2, 8, 8), "sinks": (2,)}, backends=_WITHOUT_CUDA),
    "flash_attention_varlen": Call(
        _varlen, {"q": (6, 2, 16), "k": (6, 1, 16), "v": (6, 1, 16)}, integers={"cu": [0, 4, 6]}
    ),
    "lean_attention": Call(_lean, {**_QKV, "q": (1, 2, 2, 16)}, integers={"lengths": [7]}),
    "append_kv": Call(
        _append,
        {"k": (1, 1, 8, 16), "v": (1, 1, 8, 16), "k_new": (1, 1, 2, 16), "v_new": (1, 1, 2, 16)},
        integers={"lengths": [3]},
        backends=_WITHOUT_CUDA,
        writes=("k", "v"),
    ),
    "block_sparse_attention": Call(
        _sparse,
        {"q": (1, 1, 24, 16), "k": (1, 1, 24, 16), "v": (1, 1, 24, 16)},
        integers={"indices": [0, 1], "counts": [1, 1]},
        backends=_WITHOUT_CUDA,
    ),
    "hip_attention": Call(
        _hip, {"q": (1, 1, 24, 16), "k": (1, 1, 24, 16), "v": (1, 1, 24, 16)}, backends=_WITHOUT_CUDA
    ),
    "linear_attention": Call(_plain_linear, _HEADS),
    "linear_attention with a state": Call(
        _linear, {**_HEADS, "decay": (1, 2, 8), "state": (1, 2, 16, 16)}, states=("state",), negative=("decay",)
    ),
    "linear_attention_step": Call(
        _linear_step,
        {**_ONE, "decay": (1, 2, 1), "state": (1, 2, 16, 16)},
        states=("state",),
        negative=("decay",),
        backends=_WITHOUT_CUDA,
        writes=("state",),
    ),
    "gated_delta_rule": Call(
        _delta,
        {**_HEADS, "beta": (1, 2, 8), "decay": (1, 2, 8), "state": (1, 2, 16, 16)},
        states=("state",),
        negative=("decay",),
        backends=_WITHOUT_CUDA,
    ),
    "gated_delta_rule_step": Call(
        _delta_step,
        {**_ONE, "beta": (1, 2, 1), "decay": (1, 2, 1), "state": (1, 2, 16, 16)},
        states=("state",),
        negative=("decay",),
        backends=_WITHOUT_CUDA,
        writes=("state",),
    ),
    "fft_conv": Call(
        _fft,
        {"u": (1, 2, 16), "k": (2, 5), "pre": (1, 2, 16), "post": (1, 2, 16), "skip": (2,), "past": (1, 2, 4)},
        states=("past",),
    ),
    "short_conv": Call(
        _short, {"x": (1, 4, 8), "weight": (4, 3), "bias": (4,), "past": (1, 4, 2)}, backends=_WITHOUT_CUDA
    ),
    "short_conv_step": Call(
        _short_step,
        {"x": (1, 4), "weight": (4, 3), "bias": (4,), "past": (1, 4, 2)},
        backends=_WITHOUT_CUDA,
        writes=("past",),
    ),
    **{
        f"flash_rnn {cell}": Call(
            _rnn(cell),
            {
                "gates": (1, 3, gates, 1, 16),
                "recurrent": (gates, 1, 16, 16),
                "bias": (gates, 1, 16),
                "state": (states, 1, 1, 16),
            },
            states=("state",),
        )
        for cell, gates, states in (("lstm", 4, 2), ("gru", 3, 1), ("slstm", 4, 4))
    },
}

NAMES = tuple(CALLS)
PURE = tuple(name for name, call in CALLS.items() if not call.writes)
RUNS = tuple(
    (name, backend)
    for name, call in CALLS.items()
    for backend in call.backends
    if backend != "cuda" or cuda_refusal(torch.device("cpu")) is None
)
"""Every call on every backend that runs it here."""

STEPS = tuple(name for name, call in CALLS.items() if call.writes)


def usual(backend: str | None) -> torch.dtype:
    """A dtype that the backend takes for every call that it runs."""
    return torch.float16 if backend == "cuda" else torch.float32


def results(made: Any) -> tuple[Tensor, ...]:
    """The results of a call as a tuple."""
    return made if isinstance(made, tuple) else (made,)
