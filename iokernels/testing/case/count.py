"""How many bytes the kernels of an operator do move: the count that is held against :mod:`.accounts`."""

from __future__ import annotations

import torch

from iokernels import autotune
from iokernels.testing.case import Case, Inputs
from iokernels.testing.case.accounts import Bytes, Configs
from iokernels.testing.case.shape import Shape


def count(
    case: Case, shape: Shape, dtype: torch.dtype, configs: Configs, seed: int = 0, backend: str = "triton"
) -> dict[str, Bytes]:
    """The bytes that every launched kernel requests in a forward and a backward pass (if any), by the kernel's name.

    The kernels run on the CPU: those of ``triton`` in Triton's interpreter, under the tracer, and those of ``cuda`` in
    the emulator.

    Raises:
        RuntimeError: Triton compiles its kernels in this process, or is not installed.
        iokernels.testing.tracer.OutOfBounds, iokernels.runtime.errors.KernelFault: a kernel touched a byte outside its
            tensors.
    """
    from iokernels.runtime.cuda.emulator import watch
    from iokernels.testing.tracer import trace

    inputs = case.make_inputs(shape, dtype, torch.device("cpu"), seed)
    counted: dict[str, Bytes] = {}
    with autotune.override(**configs), watch() if backend == "cuda" else trace() as watched:
        _all_passes(case, inputs, backend)
    for kernel in watched if isinstance(watched, list) else watched.kernels:
        old = counted.get(kernel.name, Bytes(0, 0))
        moved = kernel.arguments.values()
        # An atomic reads what it writes.
        counted[kernel.name] = Bytes(
            old.read + sum(one.read + one.atomic for one in moved),
            old.written + sum(one.written + one.atomic for one in moved),
        )
    return counted


def _all_passes(case: Case, inputs: Inputs, backend: str) -> None:
    if not case.differentiates(backend):
        with torch.no_grad():
            case.run(inputs, backend)
        return
    outputs = case.run(inputs, backend)
    names = [name for name in outputs if name in inputs.output_gradients]
    torch.autograd.backward([outputs[name] for name in names], [inputs.output_gradients[name] for name in names])
