"""Compiles every Triton kernel of flash_attention for one GPU model and prints what it takes, a JSON line a kernel.

A process of its own, because the tests' process interprets its kernels:
``python tests/ops/compile_flash_attention.py h100-sxm``.
"""

import json
import sys

import torch

from iokernels.autotune.resources import compiling_for
from iokernels.ops.flash_attention import triton_launch
from iokernels.ops.flash_attention.options import Needs, Options
from iokernels.runtime.device import named

BATCH, HEADS, LENGTH = 2, 4, 1024


def options(name: str) -> Options:
    """One point of the option space; together they compile every branch of the kernels."""
    bias = torch.empty(1, HEADS, LENGTH, LENGTH, dtype=torch.float32, device="meta")
    return {
        "plain": Options(),
        "causal": Options(window_right=0),
        "everything": Options(
            window_left=256,
            window_right=0,
            softcap=30.0,
            bias=bias,
            sinks=torch.empty(HEADS, device="meta"),
            mask=torch.empty(BATCH, 1, 1, LENGTH, dtype=torch.bool, device="meta"),
            alibi_slopes=torch.empty(1, HEADS, device="meta"),
            dropout_p=0.1,
            dropout_seed=torch.empty(1, dtype=torch.int64, device="meta"),
        ),
        "packed": Options(
            window_right=0,
            cu_seqlens_q=torch.empty(BATCH + 1, dtype=torch.int32, device="meta"),
            cu_seqlens_k=torch.empty(BATCH + 1, dtype=torch.int32, device="meta"),
            max_seqlen_q=LENGTH,
            max_seqlen_k=LENGTH,
        ),
    }[name]


def compile_point(gpu: str, dtype: str, width: int, value_width: int, name: str) -> None:
    """Compile the forward pass and all gradients of one point."""
    point = options(name)._replace(scale=width**-0.5)
    shape = (1, BATCH * LENGTH, HEADS) if name == "packed" else (BATCH, LENGTH, HEADS)
    q, v = (
        torch.empty(*shape, size, dtype=getattr(torch, dtype), device="meta").transpose(1, 2)
        for size in (width, value_width)
    )
    with compiling_for(named(gpu)) as compiled:
        out, lse = triton_launch.forward(q, q, v, point)
        has_bias, has_sinks = point.bias is not None, point.sinks is not None
        triton_launch.backward(out, lse, q, q, v, out, lse, point, Needs(True, True, True, has_bias, has_sinks))
    for kernel in compiled:
        print(
            json.dumps(
                {
                    "gpu": gpu, "dtype": dtype, "width": max(width, value_width), "options": name,
                    "kernel": kernel.kernel, "registers": kernel.registers, "spill_bytes": kernel.spill_bytes,
                    "shared_bytes": kernel.shared_bytes, "matrix": kernel.matrix_instructions(),
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    for width, value_width in ((64, 64), (128, 128)):
        for name in ("plain", "causal"):
            compile_point(sys.argv[1], "bfloat16", width, value_width, name)
    compile_point(sys.argv[1], "float16", 64, 64, "packed")
    compile_point(sys.argv[1], "float16", 40, 96, "everything")
    compile_point(sys.argv[1], "bfloat16", 256, 256, "causal")
    compile_point(sys.argv[1], "float32", 64, 64, "causal")
    compile_point(sys.argv[1], "float32", 256, 256, "everything")
