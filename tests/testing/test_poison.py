"""Unwritten memory is poisoned in every test, and only where there is memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from iokernels.testing.poison import poison_, poisoned_memory

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_floating_point_memory_is_nan(dtype):
    like = torch.zeros(3, 2, dtype=dtype)
    for x in (
        torch.empty(3, 2, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((3, 2), (1, 3), dtype=dtype),
        torch.empty_permuted((3, 2), (1, 0), dtype=dtype),
        like.new_empty(3, 2),
        like.new_empty_strided((3, 2), (1, 3)),
    ):
        assert x.shape == (3, 2)
        assert x.dtype == dtype
        assert x.to(torch.complex128).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integer_memory_is_large(dtype):
    assert (torch.empty(4, dtype=dtype) == torch.iinfo(dtype).max).all()
    assert torch.empty(4, dtype=torch.bool).all()


def test_leaf_tensors_can_require_gradients():
    x = torch.empty(3, requires_grad=True)
    assert x.is_leaf
    assert x.isnan().all()
    with torch.inference_mode():
        assert torch.empty(3).isnan().all()


def test_tensors_without_memory_are_left_alone():
    assert torch.empty(3, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
    with FakeTensorMode():
        assert torch.empty(3).shape == (3,)
    assert torch.empty(3, layout=torch.sparse_coo).is_sparse


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_keeps_one_graph(backend):
    def twice(x):
        out = torch.empty_like(x)
        torch.add(x, x, out=out)
        return out + x.new_empty(x.shape[0]).fill_(1.0)

    x = torch.randn(4)
    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend=backend)
    assert torch.equal(compiled(x), 2 * x + 1)
    exported = torch.export.export(_Module(twice), (x,))
    assert "nan" not in str(exported.graph), "the poison must not be exported"
    assert torch.equal(exported.module()(x), 2 * x + 1)


def test_operators_pass_opcheck():
    @torch.library.custom_op("iokernels_test::twice", mutates_args=(), device_types="cpu")
    def twice(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        assert out.isnan().all()
        return torch.add(x, x, out=out)

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    torch.library.opcheck(twice, (torch.randn(4),))
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_context_ends():
    patched = torch.empty
    with poisoned_memory():
        assert torch.empty is not patched
    assert torch.empty is patched


def test_poison_in_place_returns_its_argument():
    x = torch.zeros(2)
    assert poison_(x) is x
    assert x.isnan().all()


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 4))
def test_fixtures_allow_hypothesis(n):
    assert torch.empty(n).isnan().all()


def test_device_is_where_kernels_run(device):
    assert device in ("cpu", "cuda")
    assert torch.zeros(1, device=device).device.type == device


def test_importing_the_harness_does_not_import_triton():
    modules = ("testing.budget", "testing.inputs", "runtime.interpreter", "testing.poison", "testing.tracer")
    code = f"import sys\nfor name in {modules}: __import__('iokernels.' + name)\n"
    subprocess.run([sys.executable, "-c", code + "sys.exit('triton' in sys.modules)"], check=True, timeout=120)
