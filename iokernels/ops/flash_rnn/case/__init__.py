"""flash_rnn: inputs, costs, peers and the points that prove every option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.flash_rnn.api import flash_rnn
from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.triton.tuning import MAX_WIDTH
from iokernels.ops.shared.layout import state_dtype
from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Case, Implementation, Inputs, Limit, Outputs, Pass, Point, Prepare
from iokernels.testing.case.shape import Shape, UsageError

from .accounts import ACCOUNTS, floor_bytes
from .compile import COMPILATION
from .cuda import ACCOUNTS as CUDA_ACCOUNTS
from .cuda import COMPILATION as CUDA_COMPILATION
from .cuda import TUNING
from .shapes import VOCABULARY, cell_of, lengths


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Normal values; recurrent weights keep the size of h. An initial state of sLSTM is as past steps leave it: n is
    positive, or 0 where nothing is stored."""
    if shape.empty and not shape.lengths:
        raise UsageError("shape: empty=1 goes with lengths=1 only")
    generator = torch.Generator(device).manual_seed(seed)
    kind = CELLS[cell_of(shape)]

    def normal(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(of)

    def rows(*unit: int) -> Tensor:
        if shape.nb:
            return normal(shape.n, shape.b, *unit).transpose(0, 1)
        return normal(shape.b, shape.n, *unit)

    tensors = {
        "gates": rows(kind.gates, shape.h, shape.d),
        "recurrent": (normal(kind.gates, shape.h, shape.d, shape.d, of=torch.float32) / shape.d**0.5).to(dtype),
    }
    if shape.bias:
        tensors["bias"] = normal(kind.gates, shape.h, shape.d)
    gradients = {"h": rows(shape.h, shape.d)}
    if shape.state:
        size = len(kind.states), shape.b, shape.h, shape.d
        initial = normal(*size, of=state_dtype(dtype))
        if cell_of(shape) == "slstm":
            initial[2] = 1.0 + initial[2].abs()
            initial[1:3, :1] = 0.0
        tensors["initial_state"] = initial
        gradients["state"] = normal(*size, of=state_dtype(dtype))
    options: dict[str, Any] = {
        "cell": cell_of(shape),
        "recurrent_clip": shape.clip or None,
        "recurrent_cut": bool(shape.cut),
        "recompute_gates": bool(shape.recompute),
    }
    if shape.lengths:
        options["lengths"] = torch.tensor(lengths(shape), dtype=torch.int32, device=device)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return Inputs(shape, leaves, options, gradients, seed)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The public function."""
    h, state = flash_rnn(**inputs.tensors, **inputs.options, return_state=True, backend=backend)
    return {"h": h, "state": state}


def flops(shape: Shape, which: Pass) -> int:
    """Those of the products with R: forward one, backward one for the gradient of h and one for that of R."""
    product = 2 * sum(lengths(shape)) * CELLS[cell_of(shape)].gates * shape.h * shape.d**2
    backward = 1 if shape.cut else 2
    return product * {"fwd": 1, "bwd": backward, "both": 1 + backward}[which]


def reference_bytes(shape: Shape) -> int:
    """What autograd keeps of the loop: about five float64 values of every gate, and eight of every state."""
    kind = CELLS[cell_of(shape)]
    return 8 * shape.b * shape.n * shape.h * shape.d * (5 * kind.values + 8 * len(kind.states))


def smaller(shape: Shape) -> Shape:
    """Half the steps, to about a hundred; then three sequences and two heads; then fewer steps."""
    if shape.n >= 256:
        return shape.replace(n=shape.n // 2)
    if shape.b > 3:
        return shape.replace(b=3)
    if shape.h > 2:
        return shape.replace(h=2)
    return shape.replace(n=shape.n // 2) if shape.n >= 32 else shape


LIMITS = {torch.float16: 3e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def limit(name: str, dtype: torch.dtype) -> Limit:
    """Relative RMS error over a whole tensor. float32 whose products are rounded to TF32 is held to float16's."""
    allowed = LIMITS[dtype]
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and torch.cuda.is_available():
        allowed = LIMITS[torch.float16]
    return Limit(allowed, 0)


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """Two loops that users write; torch's networks, where they are the same function; and flashrnn."""
    found: dict[str, Prepare | str] = {"loop": _loop, "loop-bmm": _loop_bmm, "torch-rnn": _torch_rnn}
    if find_spec("flashrnn") is None:
        return found | {"flashrnn": "flashrnn is not installed"}
    return found | {"flashrnn": "its kernels run on GPUs only" if device.type != "cuda" else _flashrnn}


def _plain(inputs: Inputs) -> None:
    shape = inputs.shape
    if shape.lengths or shape.clip or shape.cut:
        raise UnsupportedError("it has no equivalent of lengths, clip or cut here")


def _loop(inputs: Inputs) -> Callable[[], Outputs]:
    """The equations, written down: a step is an einsum, two additions and the cell, under autograd.

    The inputs' gates are taken apart by unbind: the gradient of ``gates[:, t]`` would cost a tensor of all steps, at
    every step.
    """
    _plain(inputs)
    gates, recurrent = inputs.tensors["gates"], inputs.tensors["recurrent"]
    bias, initial = inputs.tensors.get("bias"), inputs.tensors.get("initial_state")
    wide, cell = state_dtype(gates.dtype), cell_of(inputs.shape)

    def call() -> Outputs:
        states, outs = _start(gates, initial, cell), []
        for x in gates.unbind(1):
            s = torch.einsum("bhi,ghoi->bgho", states[0].to(gates.dtype), recurrent).to(wide)
            if bias is not None:
                s = s + bias
            states = _EQUATIONS[cell](x, s, states)
            outs.append(states[0])
        return {"h": torch.stack(outs, 1).to(gates.dtype), "state": torch.stack(states)}

    return call


def _loop_bmm(inputs: Inputs) -> Callable[[], Outputs]:
    """The same with care: the matrices are laid out once, and a step is one batched product of all heads and gates."""
    _plain(inputs)
    gates, recurrent = inputs.tensors["gates"], inputs.tensors["recurrent"]
    bias, initial = inputs.tensors.get("bias"), inputs.tensors.get("initial_state")
    wide, cell = state_dtype(gates.dtype), cell_of(inputs.shape)

    def call() -> Outputs:
        weights = recurrent.transpose(0, 1).flatten(1, 2).transpose(1, 2)  # [H, D, G D]
        states, outs = _start(gates, initial, cell), []
        for x in gates.unbind(1):
            s = torch.bmm(states[0].to(gates.dtype).transpose(0, 1), weights)
            s = s.unflatten(2, (-1, recurrent.shape[3])).permute(1, 2, 0, 3).to(wide)
            if bias is not None:
                s = s + bias
            states = _EQUATIONS[cell](x, s, states)
            outs.append(states[0])
        return {"h": torch.stack(outs, 1).to(gates.dtype), "state": torch.stack(states)}

    return call


def _start(gates: Tensor, initial: Tensor | None, cell: str) -> tuple[Tensor, ...]:
    """The states before the first step."""
    if initial is not None:
        return initial.unbind(0)
    size = len(CELLS[cell].states), gates.shape[0], *gates.shape[3:]
    return gates.new_zeros(size, dtype=state_dtype(gates.dtype)).unbind(0)


_States = tuple[Tensor, ...]


def _lstm(x: Tensor, s: Tensor, states: _States) -> _States:
    i, f, z, o = (x + s).unbind(1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Tensor, s: Tensor, states: _States) -> _States:
    r, z = torch.sigmoid(x[:, :2] + s[:, :2]).unbind(1)
    n = torch.tanh(x[:, 2] + r * s[:, 2])
    return ((1 - z) * n + z * states[0],)


def _elman(x: Tensor, s: Tensor, states: _States) -> _States:
    return (torch.tanh(x + s).squeeze(1),)


def _slstm(x: Tensor, s: Tensor, states: _States) -> _States:
    i, f, z, o = (x + s).unbind(1)
    _, c, n, m = states
    f = torch.nn.functional.logsigmoid(f)
    past = m.detach().masked_fill(n == 0, float("-inf"))  # nothing is stored yet
    m = torch.maximum(f + past, i).detach()
    i, f = torch.exp(i - m), torch.exp(f + past - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


_EQUATIONS = {"lstm": _lstm, "gru": _gru, "elman": _elman, "slstm": _slstm}


def _torch_rnn(inputs: Inputs) -> Callable[[], Outputs]:
    """``torch.lstm``, ``gru`` or ``rnn_tanh``. It takes no gates, so it multiplies them with an identity matrix."""
    _plain(inputs)
    shape, cell = inputs.shape, cell_of(inputs.shape)
    if shape.h > 1 or cell == "slstm":
        raise UnsupportedError("torch has one head, and no sLSTM")
    gates, recurrent = inputs.tensors["gates"], inputs.tensors["recurrent"]
    bias, initial = inputs.tensors.get("bias"), inputs.tensors.get("initial_state")
    kind, rows = CELLS[cell], recurrent.shape[0] * recurrent.shape[3]
    identity = torch.eye(rows, dtype=gates.dtype, device=gates.device)
    no_bias = identity.new_zeros(rows)
    function: Any = {"lstm": torch.lstm, "gru": torch.gru, "elman": torch.rnn_tanh}[cell]

    def call() -> Outputs:
        weights = [identity, recurrent.view(rows, -1)]
        if bias is not None:
            weights += [no_bias, bias.view(rows)]
        states = gates.new_zeros(len(kind.states), 1, shape.b, shape.d)
        if initial is not None:
            states = initial.to(gates.dtype).transpose(1, 2)
        hx = tuple(states.unbind(0)) if cell == "lstm" else states[0]
        out, *last = function(gates.flatten(2), hx, weights, bias is not None, 1, 0.0, True, False, True)
        state = torch.stack(last).transpose(1, 2).to(state_dtype(gates.dtype))
        return {"h": out.unsqueeze(2), "state": state}

    return call


def _flashrnn(inputs: Inputs) -> Callable[[], Outputs]:
    """NX-AI's kernels, with states and pointwise work in the dtype of the inputs, as they come."""
    _plain(inputs)
    if cell_of(inputs.shape) == "gru" or inputs.shape.state or not inputs.shape.bias:
        raise UnsupportedError("its GRU has four biases, its state the inputs' dtype, and its bias is no option")
    from flashrnn import flashrnn  # pyright: ignore[reportMissingImports]

    dtype = str(inputs.dtype).removeprefix("torch.")
    gates, recurrent, bias = (inputs.tensors[name] for name in ("gates", "recurrent", "bias"))

    def call() -> Outputs:
        states, last = flashrnn(
            gates, recurrent, bias, function=cell_of(inputs.shape), backend="cuda_fused", dtype=dtype
        )
        return {"h": states[0], "state": last[:, :, 0].float()}

    return call


def _point(name: str, *, quick: bool = False, **given: Any) -> Point:
    return Point(name, VOCABULARY.shape(**({"b": 3, "h": 2, "n": 20, "d": 16} | given)), quick)


_ALL: dict[str, Any] = {"lengths": 1, "empty": 1, "state": 1, "clip": 0.3, "recompute": 1, "nb": 1}


def check_points() -> tuple[Point, ...]:
    """Every cell, every option alone, its edges, and together; widths and batches around the kernels' tiles."""
    return (
        _point("lstm", quick=True),
        _point("gru", cell=1, quick=True),
        _point("elman", cell=2),
        _point("slstm", cell=3, quick=True),
        *(_point(f"state of cell {cell}", cell=cell, state=1) for cell in range(4)),
        _point("no bias", bias=0),
        _point("no bias, gru", bias=0, cell=1),
        _point("lengths", lengths=1),
        _point("lengths, one of them 0", lengths=1, empty=1, state=1, cell=3),
        _point("recomputed", recompute=1, quick=True),
        _point("recomputed gru", recompute=1, cell=1, state=1),
        _point("clipped", clip=0.2),
        _point("cut", cut=1, cell=3),
        _point("tensors [n, b, ...]", nb=1),
        _point("one step", n=1, b=1, state=1),
        _point("two steps", n=2, cell=1),
        _point("17 steps", n=17, cell=3, h=1),
        _point("one sequence", b=1),
        _point("eight sequences", b=8, cell=1),
        _point("17 sequences", b=17, n=6),
        _point("12 heads", h=12, n=6, cell=3),
        _point("8 units", d=8),
        _point("24 units", d=24, cell=1),
        _point("32 units", d=32, cell=3, h=1),
        _point("64 units", d=64, h=1, n=8),
        _point("96 units", d=96, h=1, n=4, cell=2),
        _point("128 units", d=128, h=1, n=4, cell=1),
        _point("all options", **_ALL, quick=True),
        *(_point(f"all options, cell {cell}", **_ALL, cell=cell) for cell in (1, 2, 3)),
    )


def _shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(VOCABULARY.parse(text) for text in texts)


SUITES: Mapping[str, tuple[Shape, ...]] = {
    # A second or two on two CPU cores.
    "quick": _shapes("b=4,n=64,h=4,d=32", "b=4,n=64,h=4,d=32,cell=3", "b=4,n=64,h=1,d=64,cell=1"),
    # 768 units in heads of several widths, as FlashRNN's figures have them; then every cell, and one wide head.
    "train": _shapes(
        *(f"b=16,n=1k,h={768 // d},d={d}" for d in (16, 32, 64, 128)),
        *(f"b=16,n=1k,h=12,d=64,cell={cell}" for cell in (1, 2, 3)),
        "b=16,n=1k,h=12,d=64,recompute=1",
        "b=16,n=1k,h=12,d=64,lengths=1",
        "b=16,n=1k,h=1,d=128",
    ),
    # On a CPU, beside the loop under autograd.
    "cpu": _shapes(*(f"b=16,n=1k,h=12,d=64,cell={cell}" for cell in (0, 3))),
}

_HALVES = (torch.float16, torch.bfloat16)

CASE = Case(
    operator="flash_rnn",
    functions=("flash_rnn",),
    vocabulary=VOCABULARY,
    implementations={
        "reference": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "torch": Implementation((*_HALVES, torch.float32, torch.float64), "any"),
        "triton": Implementation((*_HALVES, torch.float32), f"1-{MAX_WIDTH[2]} (fp32: {MAX_WIDTH[4]}), by the GPU"),
        "cuda": Implementation((*_HALVES, torch.float32), "by the GPU, H and B"),
    },
    suites=SUITES,
    make_inputs=make_inputs,
    run=run,
    flops=flops,
    floor_bytes=floor_bytes,
    reference_bytes=reference_bytes,
    smaller=smaller,
    check_points=check_points,
    peers=peers,
    accounts=ACCOUNTS,
    compilation=COMPILATION,
    cuda_accounts=CUDA_ACCOUNTS,
    cuda_compilation=CUDA_COMPILATION,
    tuning=TUNING,
    limit=limit,
)
