"""The kernels of linear_attention request as many bytes as their model says, and none outside their tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels import autotune, linear_attention, linear_attention_state, linear_attention_step
from iokernels.ops.linear_attention.case import traffic as io
from iokernels.ops.linear_attention.triton.tuning import Config
from iokernels.testing.case.accounts import Bytes
from iokernels.testing.tracer import Trace, trace

from .calls import draw, tiles

pytestmark = pytest.mark.interpreted


def counted(traced: Trace) -> dict[str, Bytes]:
    found = {}
    for name in dict.fromkeys(kernel.name for kernel in traced.kernels):
        traffic = traced.bytes(name)
        assert traffic.atomic == 0
        found[name] = Bytes(traffic.read, traffic.written)
    return found


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head, state, gradient of it": {"decay": "head", "state": True, "dstate": True},
    "token": {"decay": "token"},
    "token, cut": {"decay": "token", "segments": 3, "state": True},
    "none, cut, grouped, slices": {"segments": 2, "key_heads": 1, "widths": (40, 36)},
    "normalized": {"decay": "token", "normalize": True, "state": True, "dstate": True, "widths": (20, 40)},
    "normalized, cut": {"decay": "head", "normalize": True, "segments": 3, "state": True},
    "taylor": {"taylor": True, "widths": (6, 40)},
    "taylor, normalized": {
        "taylor": True, "decay": "token", "normalize": True, "state": True, "dstate": True, "widths": (6, 20),
    },
    "taylor, cut, normalized": {"taylor": True, "decay": "head", "normalize": True, "segments": 2, "widths": (6, 20)},
    "packed": {"packed": (20, 0, 1, 9), "decay": "token", "state": True},
    "packed, cut, normalized": {"packed": (20, 0, 1, 30), "decay": "token", "segments": 4, "normalize": True},
    "packed, cut, taylor": {"packed": (20, 0, 30), "decay": "head", "segments": 3, "taylor": True, "widths": (6, 20)},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_as_many_bytes_as_the_model_says(name: str) -> None:
    call, dtype = dict(CALLS[name]), torch.bfloat16
    segments, dstate, packed = call.pop("segments", 1), call.pop("dstate", False), call.pop("packed", None)
    widths, state = call.pop("widths", (16, 24)), call.pop("state", False)
    heads, key_heads = 2, call.pop("key_heads", 2)
    length = sum(packed) + 3 if packed else 40
    given = draw(1 if packed else 2, heads, length, *widths, dtype=dtype, key_heads=key_heads, **call)
    if packed:
        given |= {n: given[n].squeeze(0).transpose(0, 1).contiguous() for n in ("q", "k", "v")}
        if given.get("log_decay") is not None and given["log_decay"].dim() == 3:
            given["log_decay"] = given["log_decay"].squeeze(0).transpose(0, 1)
        given["cu_seqlens"] = torch.tensor([0, *packed], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if state:
        given["initial_state"] = linear_attention_state(
            len(packed) if packed else 2, heads, *widths, feature_map=given["feature_map"], normalize=given["normalize"]
        )
    given: dict[str, Any] = {n: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
             for n, x in given.items()}  # fmt: skip
    configs = tiles(segments=segments)
    with autotune.override(**configs), trace() as traced:
        out, final = linear_attention(**given, return_state=True, backend="triton")
        results = [out, final] if dstate else [out]
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    problem = io.Problem(
        lengths=packed or (length, length),
        heads=heads,
        key_heads=key_heads,
        key_width=widths[0],
        value_width=widths[1],
        itemsize=dtype.itemsize,
        decay_form=call.get("decay") or "none",
        crossing=call.get("decay") is not None,
        packed=packed is not None,
        total=length,
        normalize=given["normalize"],
        taylor=given["feature_map"] is not None,
        initial_state=state,
        dstate=dstate,
    )
    accounts = io.accounts(problem, configs)
    assert counted(traced) == {kernel: account.model for kernel, account in accounts.items()}
    for account in accounts.values():
        assert account.floor.read <= account.model.read
        assert account.floor.written <= account.model.written


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [None, "head", "token"])
def test_a_step_moves_the_state_twice(decay: str | None, normalize: bool, taylor: bool) -> None:
    given = draw(3, 4, 2, 6, 20, key_heads=2, dtype=torch.bfloat16, decay=decay, normalize=normalize, taylor=taylor)
    state = linear_attention_state(3, 4, 6, 20, feature_map=given["feature_map"], normalize=normalize)
    config = Config(1, 8, 4, 1)
    with autotune.override(linear_attention_step=config), trace() as traced:
        linear_attention_step(state=state, **given, backend="triton")
    problem = io.Problem(
        (2, 2, 2), 4, 2, 6, 20, 2, decay_form=decay or "none", normalize=normalize, taylor=taylor  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    assert counted(traced) == {"linear_attention_step_kernel": io.step(problem, config).model}


def test_bytes_of_the_issue() -> None:
    """At d = 128 in bfloat16 1,024 bytes a token and head, and 1,536 where sequences are cut; states come on top."""
    n, d = 16384, 128
    problem = io.Problem((n,), 1, 1, d, d, 2, decay_form="head")
    configs = dict.fromkeys(tiles(), Config(64, 128, 8, 2))
    whole = io.forward(problem, configs)
    state, decay = 4 * d * d, 4
    assert sum(x.model.total for x in whole.values()) == 1024 * n + state + decay
    cut = io.forward(problem, configs | {"linear_attention_fwd": Config(64, 128, 8, 2, segments=8)})
    # Each segment's state is written, scanned and read; the final one is written.
    assert sum(x.model.total for x in cut.values()) == 1536 * n + 8 * (4 * state + 2 * decay + 16 * 4 + 4) + state
