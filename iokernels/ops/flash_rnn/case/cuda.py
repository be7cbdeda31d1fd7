"""The CUDA kernels of flash_rnn without data: which configurations a call takes, their bytes, and compiling them."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.flash_rnn.cells import CELLS
from iokernels.ops.flash_rnn.cuda import launch as cuda
from iokernels.ops.flash_rnn.cuda.tuning import KERNELS, TUNABLES, Config, Problem, fits, problem_for, walkers
from iokernels.ops.flash_rnn.options import Forward, Needs, empty_history, empty_out, empty_state, empty_values
from iokernels.runtime.device import DeviceSpec, spec_of
from iokernels.testing.case import Compilation, Pass, Tuning
from iokernels.testing.case.accounts import Account, Accounts, Configs
from iokernels.testing.case.shape import Shape

from . import cuda_traffic as model
from .accounts import NAIVE, naive_bytes, problem_of
from .compile import TUNING as TRITON_TUNING
from .compile import meta_call
from .shapes import VOCABULARY, cell_of


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration that each kernel would be launched with."""
    gates, _, _, options = meta_call(shape, dtype)
    return {kernel: cuda.Launch(kernel, empty_out(gates), options).config for kernel in KERNELS}


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel."""
    gates, _, _, options = meta_call(shape, dtype)
    launch = cuda.Launch("flash_rnn_values_cuda", empty_out(gates), options)
    shared = walkers(launch.problem, configs["flash_rnn_values_cuda"], shape.b * shape.n)
    return model.accounts(problem_of(shape, dtype), configs, shared)


def problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Problem:
    """What the choice for one kernel depends on."""
    tensor_cores = dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    kind = CELLS[cell_of(shape)]
    return problem_for(kernel, kind, shape.d, shape.h, shape.b, dtype.itemsize, tensor_cores, device)


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors; nothing where the GPU cannot hold the matrices."""
    gates, recurrent, bias, options = meta_call(shape, dtype)
    spec, kind = spec_of(gates.device), CELLS[cell_of(shape)]
    if not all(fits(problem(shape, dtype, kernel, spec)) for kernel in KERNELS):
        return
    if which != "bwd":
        cuda.forward(gates, recurrent, bias, True, options)
    if which != "fwd":
        state, kept = empty_state(gates, kind), not options.recompute_gates
        saved = Forward(empty_out(gates), state, empty_values(gates, kind, kept), empty_history(gates, kind))
        cuda.backward(
            empty_out(gates), state if shape.state else None, None if kept else gates, recurrent, bias, saved, options,
            Needs(True, False, False, bool(shape.state)),
        )  # fmt: skip


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(text), dtype)
        for text, dtype in (
            ("d=64", torch.bfloat16),
            ("d=128,h=6", torch.bfloat16),
            ("d=64,cell=3,state=1,lengths=1,recompute=1", torch.float16),
            ("d=96,cell=1,h=8,state=1,nb=1", torch.float16),
            ("d=32,cell=2,lengths=1,cut=1,bias=0", torch.bfloat16),
            ("d=256,h=1", torch.bfloat16),
            ("d=768,h=1", torch.bfloat16),
            ("d=64,cell=1,lengths=1", torch.float32),
            ("d=21,cell=3,state=1", torch.float32),
        )
    ),
    # The forward kernel of LSTM with 128 units on a B200 and the backward one with 768 on an RTX 5090, while they load
    # the matrices, before the first step: the two halves of every pair wait in registers of their own. The forward
    # kernel with 768 units keeps two numbers of a step in memory, 8 bytes. Every other has none.
    spills=24,
)

# Every cell; tiles of 8 sequences that are not full; a width of no whole 16 bytes; a head over two blocks.
_SHAPES = (
    ("b=9,n=4,h=2,d=16", torch.bfloat16),
    ("b=3,n=7,h=1,d=24,cell=1,state=1,lengths=1", torch.float16),
    ("b=2,n=5,h=2,d=5,cell=2,bias=0,cut=1", torch.float32),
    ("b=9,n=5,h=1,d=16,cell=3,state=1,lengths=1,empty=1", torch.bfloat16),
    ("b=3,n=5,h=1,d=16,cell=1,recompute=1,lengths=1", torch.float16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs=dict.fromkeys(KERNELS, Config(blocks=1, tile=8, split=1, eighths=8, stages=2)),
)


def _kernels(shape: Shape) -> tuple[str, ...]:
    return TRITON_TUNING.kernels(shape) + (KERNELS if shape.recompute else KERNELS[:2])


def _problem(shape: Shape, dtype: torch.dtype, kernel: str, device: DeviceSpec) -> Any:
    of = problem if kernel in TUNABLES else TRITON_TUNING.problem
    return of(shape, dtype, kernel, device)


def _launch(shape: Shape, dtype: torch.dtype, kernel: str) -> None:
    if kernel in TUNABLES:
        launch(shape, dtype, "fwd" if kernel == "flash_rnn_fwd_cuda" else "bwd")
    else:
        TRITON_TUNING.launch(shape, dtype, kernel)


TUNING = Tuning(
    {**TRITON_TUNING.tunables, **TUNABLES},
    _kernels,
    _problem,
    _launch,
    {**TRITON_TUNING.leaves, **{f"{kernel}_cuda": names for kernel, names in TRITON_TUNING.leaves.items()}},
)
"""Of both backends."""
