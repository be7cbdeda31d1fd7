"""Calls of linear_attention and of gated_delta_rule alike, for tests of what holds for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import gated_delta_rule, gated_delta_rule_step, linear_attention, linear_attention_step

from ..backends import CUDA, usual

LINEAR, DELTA = "linear_attention", "gated_delta_rule"
OPERATORS = (
    *((LINEAR, backend) for backend in ("reference", "torch", "triton")),
    pytest.param(LINEAR, "cuda", marks=CUDA.marks),
    *((DELTA, backend) for backend in ("reference", "torch", "triton")),
)
"""Parameters ``operator, backend``."""

Given = dict[str, Any]


def given(
    operator: str, backend: str, batch: int = 2, heads: int = 2, length: int = 5, width: int = 4, *,
    packed: bool = False, state: bool = True, seed: int = 0,
) -> Given:  # fmt: skip
    """Arguments of a call in the widest dtype of the backend; ``packed``: the rows in two sequences."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lead = (length, heads) if packed else (batch, heads, length)
    dtype = usual(backend)
    made: Given = {name: normal(*lead, width).to(dtype) for name in "qkv"}
    made["k"] = torch.nn.functional.normalize(made["k"], dim=-1)
    if operator == DELTA:
        made["beta"] = normal(*lead).sigmoid()
    made["log_decay"] = -normal(*lead).abs()
    sequences = 2 if packed else batch
    if state:
        made["initial_state"] = normal(sequences, heads, width, width)
    if packed:
        made["cu_seqlens"] = torch.tensor([0, length // 2, length], dtype=torch.int32)
    return made


def call(operator: str, backend: str, arguments: Given) -> tuple[Tensor, Tensor]:
    """(out, state)."""
    run: Callable[..., Any] = linear_attention if operator == LINEAR else gated_delta_rule
    return run(**arguments, return_state=True, backend=backend)


def step(operator: str, backend: str, arguments: Given, state: Tensor) -> Tensor:
    """The next tokens, dense, with ``state`` in place; backend ``cuda`` has none, and ``torch`` stands in."""
    run: Callable[..., Any] = linear_attention_step if operator == LINEAR else gated_delta_rule_step
    tokens = {name: x for name, x in arguments.items() if name not in ("initial_state", "cu_seqlens")}
    with torch.no_grad():
        return run(**tokens, state=state, backend="torch" if backend == "cuda" else backend)


def leaves(arguments: Given) -> dict[str, Tensor]:
    """The floating-point arguments by name, as leaves that require gradients, in the memory that they have."""
    return {
        name: x.detach().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def gradients(operator: str, backend: str, arguments: Given, lay: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """out, state and the gradients of all arguments; ``lay`` puts the incoming gradients into their memory."""
    own = leaves(arguments)
    results = call(operator, backend, arguments | own)
    generator = torch.Generator().manual_seed(1)
    incoming = [lay(torch.randn(x.shape, generator=generator).to(x.dtype)) for x in results]
    found = torch.autograd.grad(results, list(own.values()), incoming, allow_unused=True)
    named = {f"d{name}": x for name, x in zip(own, found, strict=True) if x is not None}
    return {"out": results[0].detach(), "state": results[1].detach(), **named}
