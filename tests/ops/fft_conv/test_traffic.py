"""The tracer on the kernels of fft_conv: whatever the call, no byte outside the tensors is touched.

That they request as many bytes as their model says is held by ``tests/bench/test_accounts.py``, for every operator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from iokernels.ops.fft_conv.case import CASE
from iokernels.ops.fft_conv.options import CAUSAL, CIRCULAR, TWO_SIDED, Needs, Options
from iokernels.ops.fft_conv.triton import launch as triton_launch
from iokernels.ops.fft_conv.triton.tuning import Config, OuterConfig
from iokernels.testing.case.count import count
from iokernels.testing.inputs import poisoned_view
from iokernels.testing.tracer import trace

from ...tiers import examples

pytestmark = pytest.mark.interpreted


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, layouts and options of one call."""
    n = draw(st.integers(1, 330))
    mode = draw(st.sampled_from([CAUSAL, CAUSAL, CIRCULAR, TWO_SIDED]))
    taps = {CAUSAL: st.integers(1, 340), CIRCULAR: st.integers(1, n), TWO_SIDED: st.just(2 * n - 1)}[mode]
    keep = draw(st.sampled_from([1.0, 1.0, 0.3]))
    return {
        "batch": draw(st.integers(1, 3)), "heads": draw(st.integers(1, 2)), "n": n, "taps": draw(taps), "mode": mode,
        "keep": keep, "state": mode == CAUSAL and keep == 1.0 and draw(st.booleans()),
        "gates": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())), "invariant": draw(st.booleans()),
        "layout": draw(st.sampled_from(["contiguous", "padded", "strided", "bnhd"])),
        "dtype": draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        "needs": draw(st.tuples(*[st.booleans()] * 6)),
    }  # fmt: skip


@pytest.mark.parametrize("part", range(2))  # parts, so that workers can share them
def test_no_byte_outside_the_tensors(part: int) -> None:
    @seed(part)
    @settings(max_examples=examples(8), deadline=None, database=None, suppress_health_check=(HealthCheck.too_slow,))
    @given(calls())
    def check(call: dict[str, Any]) -> None:
        shape = (call["batch"], call["heads"], call["n"])

        def signal() -> torch.Tensor:
            return poisoned_view(torch.randn(shape).to(call["dtype"]), call["layout"])

        pre, post, skip = call["gates"]
        state = poisoned_view(torch.randn(*shape[:2], call["taps"] - 1)) if call["state"] and call["taps"] > 1 else None
        options = Options(
            signal() if pre else None, signal() if post else None, torch.randn(shape[1]) if skip else None, state,
            call["mode"], call["keep"], call["invariant"],
        )  # fmt: skip
        u, k = signal(), poisoned_view(torch.randn(shape[1], call["taps"]))
        with trace():
            y = triton_launch.forward(u, k, [], options)
            grads = triton_launch.backward(signal(), u, k, [], options, Needs(*call["needs"]))
        assert y.isfinite().all()
        assert all(x is None or x.isfinite().all() for x in grads)

    check()


def test_the_sizes_on_chip_move_little_more_than_they_must() -> None:
    """FlashFFTConv's shapes: 1.03 of the least bytes with gates, 1.05 without."""
    for n in (256, 1024, 4096):
        for gated, most in ((1, 1.03), (0, 1.05)):
            shape = CASE.vocabulary.shape(b=64, h=768, n=n, gated=gated)
            assert CASE.accounts is not None
            account = CASE.accounts.model(shape, torch.bfloat16, CASE.accounts.configs(shape, torch.bfloat16))
            forward = account["fft_conv_fwd_kernel"]
            assert 1.0 <= forward.model.total / forward.floor.total <= most


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_passes_of_their_own_move_what_the_model_says(keep: float) -> None:
    """Long transforms, whose gradients do not fit the registers together: one launch for each of dv, dk and dpost."""
    assert CASE.accounts is not None
    shape, dtype = CASE.vocabulary.shape(b=2, h=1, n=2048, gated=1, keep=keep), torch.float16
    configs = CASE.accounts.configs(shape, dtype)
    model = CASE.accounts.model(shape, dtype, configs)
    assert configs["fft_conv_bwd"].length == 4096
    assert count(CASE, shape, dtype, configs) == {name: account.model for name, account in model.items()}


THROUGH = Config(length=256, units=2, num_warps=4, num_stages=1, outer=16)
TILES = {
    "one": OuterConfig(rows=16, columns=64, depth=16, num_warps=4, num_stages=1),
    "several": OuterConfig(rows=16, columns=128, depth=32, num_warps=4, num_stages=1),
}


@pytest.mark.parametrize(
    ("text", "dtype", "outer", "tile"),
    [
        ("b=3,h=1,n=700,gated=1,skip=1", torch.bfloat16, 16, "one"),
        ("b=1,h=2,n=2000,nk=900,state=1,gated=1", torch.float16, 16, "one"),
        ("b=2,h=1,n=3000,nk=5999,causal=0", torch.float16, 32, "several"),
        ("b=2,h=1,n=4096,nk=600,causal=0", torch.float32, 16, "one"),
        ("b=2,h=1,n=3000,nk=900,causal=0,gated=1", torch.float16, 16, "one"),
        ("b=1,h=1,n=6000,nk=500,state=1,gated=1", torch.float16, 16, "one"),
        ("b=2,h=1,n=1024,nk=500", torch.float16, 32, "several"),
    ],
)
def test_transforms_through_memory_move_what_the_model_says(
    text: str, dtype: torch.dtype, outer: int, tile: str
) -> None:
    """Zero rows, a past, the far end of a circle, many blocks with a gradient apart, dropped frequencies."""
    assert CASE.accounts is not None
    config = replace(THROUGH, outer=outer)
    configs = {"fft_conv_fwd": config, "fft_conv_bwd": config, "fft_conv_outer": TILES[tile]}
    shape = CASE.vocabulary.parse(text)
    model = CASE.accounts.model(shape, dtype, configs)
    assert count(CASE, shape, dtype, configs) == {name: account.model for name, account in model.items()}
