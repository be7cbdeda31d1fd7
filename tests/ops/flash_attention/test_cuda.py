"""The CUDA kernels of flash_attention where they are not like the others: widths and alignments that they are compiled
for, every order of warps, offsets out of range, configurations, and what they refuse. That their results are right,
option by option, is held by ``test_flash_attention.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import UnsupportedError, autotune, flash_attention, flash_attention_varlen
from iokernels.nn import FlashAttention
from iokernels.ops.flash_attention.cuda import launch as cuda
from iokernels.ops.flash_attention.cuda.tuning import KERNELS, TUNABLES, Config, Problem, registers
from iokernels.ops.flash_attention.op import backward_op, forward_op
from iokernels.ops.flash_attention.options import Needs, Options
from iokernels.runtime.device import KNOWN
from iokernels.testing import inputs

from ..backends import needs_cuda
from .test_options import prove

pytestmark = pytest.mark.tiles(**dict.fromkeys(KERNELS, Config(block=16, warps=2)))


@needs_cuda
@pytest.mark.parametrize(
    ("widths", "layout", "dtype"),
    [
        ((33, 15), "padded", torch.float16),
        ((72, 128), "contiguous", torch.bfloat16),
        ((160, 40), "contiguous", torch.bfloat16),  # q is not held in registers, dk and dv take a launch each
    ],
    ids=str,
)
def test_widths(widths: tuple[int, int], layout: Any, dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs.attention(1, 1, 2, 1, 20, 37, *widths, dtype=dtype, device=device, layout=layout)
    prove("cuda", q, k, v, causal=True)


@needs_cuda
def test_softcap_with_a_window(device: str) -> None:
    q, k, v = inputs.attention(2, 1, 4, 2, 45, 37, 16, dtype=torch.float16, device=device)
    prove("cuda", q, k, v, softcap=2.0, window=(9, 4), scale=-0.3)


@needs_cuda
@pytest.mark.parametrize("tiles", [Config(16, 1), Config(32, 2), Config(64, 4)], ids=str)
def test_tiles(tiles: Config, device: str) -> None:
    q, k, v = inputs.attention(6, 2, 2, 1, 70, 90, 16, dtype=torch.float16, device=device)
    with autotune.override(**dict.fromkeys(KERNELS, tiles)):
        prove("cuda", q, k, v, causal=True, window=(40, 0))


@needs_cuda
def test_packed_against_the_reference(device: str) -> None:
    q, k, v, cu_q, cu_k = inputs.packed(8, (20, 0, 37, 5), (33, 12, 0, 9), 4, 2, 16, dtype=torch.float16, device=device)
    dout, dlse = torch.randn(62, 4, 16, device=device), torch.randn(4, 62, device=device)
    found = []
    for backend, dtype in (("cuda", torch.float16), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = flash_attention_varlen(
            *leaves, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=40, max_seqlen_k=33, causal=True,
            return_lse=True, backend=backend,
        )  # fmt: skip
        given = [dout.half().to(dtype), torch.where(lse.isfinite(), dlse.to(lse), 0.0)]
        found.append([out, lse, *torch.autograd.grad([out, lse], leaves, given)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=3e-3, atol=3e-3)


@needs_cuda
def test_offsets_out_of_range_stay_inside_the_tensors() -> None:
    """On a GPU nobody reads the offsets before the kernels do, so whatever they say must do no harm."""
    q, k, v = inputs.attention(9, 1, 2, 1, 40, 50, 16, dtype=torch.float16)
    found = []
    for rows, keys in (((0, 30, 2**31 - 1), (-5, 20, 99)), ((0, 30, 40), (0, 20, 50))):
        options = Options(
            scale=0.25, window_right=0, max_seqlen_q=35, max_seqlen_k=40,
            cu_seqlens_q=torch.tensor(rows, dtype=torch.int32), cu_seqlens_k=torch.tensor(keys, dtype=torch.int32),
        )  # fmt: skip
        out, lse = cuda.forward(q, k, v, options)
        gradients = cuda.backward(out, None, q, k, v, out, lse, options, Needs(True, True, True, False, False))
        found.append([out, lse, *(x for x in gradients if x is not None)])
    assert len(found[0]) == 5
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # Offsets that fall: a sequence without rows.
    options = options._replace(cu_seqlens_q=torch.tensor((30, 10, 40), dtype=torch.int32))
    assert cuda.forward(q, k, v, options)[0].isfinite().all()


@needs_cuda
def test_the_operators_are_what_pytorch_expects() -> None:
    tensors = [torch.randn(1, 2, n, 16).half() for n in (18, 20, 20)]
    options = tuple(Options(scale=0.25, window_right=0))
    torch.library.opcheck(forward_op, (*tensors, "cuda", *options))
    q, k, v = tensors
    out, lse = forward_op(q, k, v, "cuda", *options)
    needs = [True, True, True, False, False]
    gradients = torch.ones_like(out), torch.ones_like(lse)
    torch.library.opcheck(backward_op, (*gradients, q, k, v, out, lse, needs, "cuda", *options))


@needs_cuda
def test_the_module_trains() -> None:
    module = FlashAttention(32, 2, causal=True, backend="cuda", dtype=torch.float16)
    x = torch.randn(1, 20, 32).half()
    gradients = []
    for dtype, backend in ((torch.float16, "cuda"), (torch.float64, "reference")):
        module = module.to(dtype)
        module.backend = backend
        given = x.to(dtype).requires_grad_()
        out = module(given, given, given)
        out = out[0] if isinstance(out, tuple) else out
        gradients.append(torch.autograd.grad(out.sum(), [given, *module.parameters()]))
    for one, other in zip(*gradients, strict=True):
        assert (one.double() - other).norm() <= 5e-3 * other.norm() + 1e-6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, "its kernels have no mask"),
        ({"bias": torch.zeros(5, 5)}, "its kernels have no bias"),
        ({"alibi_slopes": torch.ones(2)}, "its kernels have no alibi_slopes"),
        ({"sinks": torch.ones(2)}, "its kernels have no sinks"),
        ({"dropout_p": 0.1}, "its kernels have no dropout_p"),
        ({"q": torch.ones(1, 2, 5, 264)}, "D is 264, and its kernels hold heads up to 256 wide"),
        ({"v": torch.ones(1, 2, 5, 257)}, "Dv is 257, and its kernels hold heads up to 256 wide"),
        ({"dtype": torch.float32}, "its kernels take float16 and bfloat16, not float32"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_it_refuses(change: dict[str, Any], reason: str) -> None:
    change = dict(change)
    dtype = change.pop("dtype", torch.float16)
    tensors = {name: change.pop(name, torch.ones(1, 2, 5, 16)) for name in "qkv"}
    tensors["k"] = torch.ones(1, 2, 5, tensors["q"].shape[3])
    given = {name: x.to(dtype) for name, x in tensors.items()}
    with pytest.raises(UnsupportedError, match=rf"backend 'cuda' .*: {reason}\. Backends that can: .*torch"):
        flash_attention(**given, **change, backend="cuda")


@pytest.mark.parametrize("device_name", KNOWN)
def test_the_default_is_in_the_space(device_name: str) -> None:
    spec = KNOWN[device_name]
    machine = (spec.sm, spec.smem_block, spec.smem_sm)
    for kernel, tunable in TUNABLES.items():
        for width in range(16, 272, 16):
            for value_width in (16, 64, 128, 176, 256):
                for length, softcap in ((1, False), (20, True), (4096, False), (4096, True)):
                    problem = Problem(kernel, width, value_width, True, *machine, 64, length, length, softcap)
                    default = tunable.default(problem)
                    assert tunable.space.refusal(problem, spec, default) is None, (problem, default)
                    assert registers(problem, default.block) <= 255
