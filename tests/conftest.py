"""What every test runs under: kernels interpreted or emulated where there is no GPU, unwritten memory full of NaN, a
fixed seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads its variable when it is first imported, so this comes before any import of iokernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("IOKERNELS_EMULATE", "1")
    # Every launch of every test, from the same memory to the same bits.
    os.environ.setdefault("IOKERNELS_EMULATE_ORDERS", "20")

from iokernels.runtime import interpreter
from iokernels.testing.poison import poisoned_memory

interpreter.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already.
    torch.set_num_threads(1)


@pytest.fixture
def device() -> str:
    """Where kernels run in this session: "cuda", or "cpu" where Triton interprets or there is no GPU."""
    return "cuda" if torch.cuda.is_available() and not interpreter.active() else "cpu"


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield
