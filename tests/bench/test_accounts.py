"""The IO accounts of every operator: each kernel requests as many bytes as its model says, no more and no less."""

from __future__ import annotations

import pytest
import torch

from iokernels.bench.report import plot_io
from iokernels.ops import CASES
from iokernels.ops.flash_attention.triton.tuning import KERNELS, Config
from iokernels.testing.case import Case, dtype_name, load
from iokernels.testing.case.accounts import Account, Accounts, Bytes
from iokernels.testing.case.count import count
from iokernels.testing.case.shape import Shape

COUNTED, COUNTED_CUDA = (
    [
        pytest.param(case, accounts, shape, dtype, id=f"{case.operator} {dtype_name(dtype)} {shape}")
        for case in map(load, CASES)
        if (accounts := case.accounts if backend == "triton" else case.cuda_accounts) is not None
        for shape, dtype in accounts.shapes
    ]
    for backend in ("triton", "cuda")
)


def models(accounts: Accounts, shape: Shape, dtype: torch.dtype) -> dict[str, Bytes]:
    found = accounts.model(shape, dtype, accounts.test_configs)
    return {kernel: account.model for kernel, account in found.items()}


@pytest.mark.interpreted
@pytest.mark.parametrize(("case", "accounts", "shape", "dtype"), COUNTED)
def test_as_many_bytes_as_the_model_says(case: Case, accounts: Accounts, shape: Shape, dtype: torch.dtype) -> None:
    assert count(case, shape, dtype, accounts.test_configs) == models(accounts, shape, dtype)


@pytest.mark.gxx
@pytest.mark.parametrize(("case", "accounts", "shape", "dtype"), COUNTED_CUDA)
def test_cuda_kernels_too(case: Case, accounts: Accounts, shape: Shape, dtype: torch.dtype) -> None:
    assert count(case, shape, dtype, accounts.test_configs, backend="cuda") == models(accounts, shape, dtype)


def test_every_operator_with_kernels_has_accounts() -> None:
    for case in map(load, CASES):
        assert ("triton" in case.implementations) == (case.accounts is not None) == (case.compilation is not None)
        written = "cuda" in case.implementations
        assert written == (case.cuda_accounts is not None) == (case.cuda_compilation is not None)
    assert COUNTED


def test_flash_attention_by_hand() -> None:
    case = load("flash_attention")
    assert case.accounts is not None
    shape, dtype = case.vocabulary.parse("b=2,h=4,hkv=2,n=64,nk=96,d=32,dv=16"), torch.bfloat16
    tiles = dict.fromkeys(map(str, KERNELS), Config(16, 32, 4, 1))
    found = case.accounts.model(shape, dtype, tiles)
    q, out, lse, kv = 8 * 64 * 32 * 2, 8 * 64 * 16 * 2, 8 * 64 * 4, 4 * 96 * 48 * 2
    # 4 blocks of rows read the keys of their head; 3 blocks of keys read the rows of the 2 heads of their group.
    assert found["flash_attention_fwd_kernel"] == Account(
        "fwd", Bytes(q + kv, out + lse), Bytes(q + 4 * 2 * kv, out + lse)
    )
    assert found["flash_attention_bwd_delta_kernel"].model == Bytes(2 * out, lse)
    assert found["flash_attention_bwd_dq_kernel"].model == Bytes(q + out + 2 * lse + 4 * 2 * kv, q)
    assert found["flash_attention_bwd_dkv_kernel"].model == Bytes(kv + 3 * (q + out + 2 * lse), kv)
    assert found["flash_attention_fwd_kernel"].floor.total == case.floor_bytes(shape, dtype, "fwd")
    scores, k, v = 8 * 64 * 96 * 2, kv * 2 // 3, kv // 3
    assert case.accounts.naive_bytes(shape, dtype, "fwd") == 4 * scores + q + kv + out
    assert case.accounts.naive_bytes(shape, dtype, "bwd") == 7 * scores + 2 * out + (v + k + q) + (q + k + v)


def test_a_bias_costs_what_it_is() -> None:
    case = load("flash_attention")
    assert case.accounts is not None
    tiles = dict.fromkeys(map(str, KERNELS), Config(32, 32, 4, 1))

    def read(text: str) -> dict[str, int]:
        shape = case.vocabulary.parse(f"b=3,h=2,n=64,d=16{text}")
        assert case.accounts is not None
        return {name: account.model.read for name, account in case.accounts.model(shape, torch.float32, tiles).items()}

    plain, own, shared = read(""), read(",bias=1"), read(",bias=2")
    for kernel in ("flash_attention_fwd_kernel", "flash_attention_bwd_dq_kernel", "flash_attention_bwd_dkv_kernel"):
        # Blocks do not know that sequences share a bias: each reads it. Backward passes read the tail of the LSE as
        # often as the LSE: once where blocks own rows, and once for each of the two blocks of keys.
        tail = {"fwd": 0, "dq": 1, "dkv": 2}[kernel.split("_")[-2]] * 3 * 2 * 64 * 4
        assert own[kernel] - plain[kernel] == shared[kernel] - plain[kernel] == 3 * 2 * 64 * 64 * 4 + tail
    assert own["flash_attention_bwd_dbias_kernel"] == shared["flash_attention_bwd_dbias_kernel"]


def test_the_lower_bound_has_two_regimes_that_meet() -> None:
    case = load("flash_attention")
    assert case.accounts is not None
    assert case.accounts.on_chip is not None
    bound = case.accounts.on_chip.lower_bound
    shape = case.vocabulary.parse("b=1,h=1,n=1k,d=64")
    edge = 64 * 64 * 2  # bytes of M = d^2 elements
    at_edge = bound(shape, torch.float16, edge)
    assert at_edge.nbytes == 1024 * 1024 * 2
    assert bound(shape, torch.float16, 4 * edge).nbytes == at_edge.nbytes / 4
    below = bound(shape, torch.float16, edge // 4)
    assert below.nbytes == at_edge.nbytes * 2
    assert (at_edge.formula, below.formula) == ("N^2 d^2 / M  (M >= d^2)", "N^2 d / sqrt(M)  (M < d^2)")


def test_more_memory_never_moves_more() -> None:
    case = load("flash_attention")
    assert case.accounts is not None
    shape = case.vocabulary.parse("b=1,h=2,n=256,d=32")
    best = plot_io.best_tilings(case, shape, torch.bfloat16)
    memory, moved = zip(*best, strict=True)
    assert list(memory) == sorted(set(memory))
    assert list(moved) == sorted(set(moved), reverse=True)
    # Tiles that hold the whole sequence reach the floor.
    assert moved[-1] == case.floor_bytes(shape, torch.bfloat16, "fwd")
