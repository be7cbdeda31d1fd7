"""The IO accounts of every operator: each kernel requests as many bytes as its model says, no more and no less."""

from __future__ import annotations

import pytest
import torch

from iokernels.bench.accounts import Account, count
from iokernels.bench.case import Case, dtype_name, load
from iokernels.bench.shape import Shape
from iokernels.ops import OPERATORS
from iokernels.runtime import device as devices

interpreted = pytest.mark.skipif(not devices.INTERPRET, reason="the tracer watches Triton's interpreter")

COUNTED = [
    pytest.param(case, shape, dtype, id=f"{case.operator} {dtype_name(dtype)} {shape}")
    for case in map(load, OPERATORS)
    if case.accounts is not None
    for shape, dtype in case.accounts.shapes
]


def model(case: Case, shape: Shape, dtype: torch.dtype) -> dict[str, Account]:
    assert case.accounts is not None
    return dict(case.accounts.model(shape, dtype, case.accounts.test_configs))


@interpreted
@pytest.mark.parametrize(("case", "shape", "dtype"), COUNTED)
def test_as_many_bytes_as_the_model_says(case: Case, shape: Shape, dtype: torch.dtype) -> None:
    assert case.accounts is not None
    counted = count(case, shape, dtype, case.accounts.test_configs)
    assert counted == {kernel: account.model for kernel, account in model(case, shape, dtype).items()}


def test_every_operator_with_triton_kernels_has_accounts() -> None:
    for case in map(load, OPERATORS):
        assert ("triton" in case.implementations) == (case.accounts is not None) == (case.compilation is not None)
    assert COUNTED
