"""A result never depends on how its arguments lie in memory: strides, offsets, gaps, expansion and the bits of views.

Every path of every operator (:mod:`.layout_paths`) is called with each argument in turn in each layout, then with
layouts that hypothesis draws for all of them, and beside that with equal tensors that are contiguous.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from iokernels.runtime.cuda import emulator
from iokernels.testing.layouts import LAYOUTS, storage_of, written_elsewhere

from ..tiers import examples
from .backends import CUDA
from .layout_paths import PATHS, Path

EXAMPLES = {"torch": 8, "triton": 2, "cuda": 2}

Results = dict[str, Tensor]
LIMIT = {torch.float32: 2e-5, torch.float16: 4e-3}
"""Of the largest element. Two paths may take a sum in two orders; none may take another element."""

_RUNS = [
    pytest.param(path, backend, id=f"{path}-{backend}", marks=CUDA.marks if backend == "cuda" else ())
    for path in PATHS
    for backend in path.backends
]


@pytest.mark.parametrize("path", [path for path in PATHS if "torch" in path.backends], ids=str)
def test_a_result_does_not_depend_on_the_layout_of_one_argument(path: Path) -> None:
    """The others contiguous, as a path that asks for some of the tensors has it."""
    of_plain: Results = {}
    for name in _tensors(path):
        for layout in _layouts(path, name):
            _check(path, "torch", {name: (layout, 0)}, of_plain)


@pytest.mark.parametrize(("path", "backend"), _RUNS)
def test_a_result_does_not_depend_on_the_layout(path: Path, backend: str) -> None:
    of_plain: Results = {}
    layout = {
        name: st.tuples(st.sampled_from(_layouts(path, name)), st.integers(0, 3)) for name in _tensors(path)
    }  # fmt: skip

    @settings(
        max_examples=examples(EXAMPLES[backend]), deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow],
        phases=(Phase.explicit, Phase.generate),  # to shrink a failure of an interpreted kernel takes minutes
    )  # fmt: skip
    @given(layouts=st.fixed_dictionaries(layout))
    def holds(layouts: dict[str, tuple[str, int]]) -> None:
        _check(path, backend, layouts, of_plain)

    holds()


def _check(path: Path, backend: str, layouts: dict[str, tuple[str, int]], of_plain: Results) -> None:
    """Call with the arguments laid out, and contiguous. ``of_plain`` keeps the results of the unchanged values."""
    torch.manual_seed(0)
    dtype = torch.float16 if backend == "cuda" else torch.float32
    plain = {name: _cast(path, name, x, dtype) for name, x in path.arguments().items()}
    laid_out = dict(plain)
    for name, (layout, gaps) in layouts.items():
        laid_out[name] = LAYOUTS[layout](plain[name], random.Random(gaps))
    before = {name: storage_of(x) for name, x in laid_out.items() if isinstance(x, Tensor)}
    # Expanding changes values: then the same call is made with what they are now.
    same = all(torch.equal(x, laid_out[name]) for name, x in plain.items() if isinstance(x, Tensor))
    with emulator.warp_order(0):
        expected = of_plain if same else {}
        expected |= expected or _results(path, backend, {name: _copy(x) for name, x in laid_out.items()})
        try:
            found = _results(path, backend, laid_out)
        except ValueError as error:
            # A tensor that is written to may be refused for its negative bit, and for nothing else.
            if any(laid_out[name].is_neg() and name in str(error) for name in path.writes):
                return
            raise
    for name, x in expected.items():
        _close(f"{name} with {layouts}", found[name], x, LIMIT[dtype])
    for name, bytes_before in before.items():
        if name in path.writes:
            assert not written_elsewhere(laid_out[name], bytes_before), f"wrote beside {name} with {layouts}"
        else:
            assert torch.equal(storage_of(laid_out[name]), bytes_before), f"modified {name} with {layouts}"


def _tensors(path: Path) -> dict[str, Tensor]:
    return {name: x for name, x in path.arguments().items() if isinstance(x, Tensor)}


def _layouts(path: Path, name: str) -> list[str]:
    """The layouts that an argument may have, the most unusual first: hypothesis begins with that of all arguments."""
    if path.operator == "linear_attention_step" and name == "state":
        return ["contiguous", "offset"]  # it must be contiguous
    found = ["strided", *(layout for layout in LAYOUTS if layout != "strided")]
    return found if _may_expand(path, name, _tensors(path)[name]) else [n for n in found if n != "expanded"]


def _may_expand(path: Path, name: str, x: Tensor) -> bool:
    """Nothing can be written to an expanded tensor, and numbers that say where things lie stay as they are."""
    return name not in path.writes and (x.is_floating_point() or bool((x == x.flatten()[0]).all()))


def _cast(path: Path, name: str, x: Any, dtype: torch.dtype) -> Any:
    of_state = name == "initial_state" and path.operator in ("linear_attention", "flash_rnn")  # float32 always
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 and not of_state else x


def _copy(x: Any) -> Any:
    return x.resolve_neg().clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x


def _results(path: Path, backend: str, arguments: dict[str, Any]) -> Results:
    """What a call gives, what it writes, and the gradients of its sum of squares."""
    leaves = {}
    if path.gradients:
        differentiable = ("q", "k", "v", "bias", "sinks", "u", "x", "weight", "gates", "recurrent", "beta", "skip",
                          "initial_state", "log_decay", "pre_gate", "post_gate")  # fmt: skip
        leaves = {n: arguments[n].detach().requires_grad_() for n in differentiable if n in arguments}
    with torch.set_grad_enabled(path.gradients):
        found = path.call(**{**arguments, **leaves}, backend=backend)
    outputs = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
    results = {f"result {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        loss = sum(torch.where(x.isfinite(), x, 0.0).float().square().sum() for x in outputs)
        assert isinstance(loss, Tensor)
        pulled: Iterable[Tensor] = torch.autograd.grad(loss, list(leaves.values()))
        results |= {f"gradient of {name}": x for name, x in zip(leaves, pulled, strict=True)}
    return results | {name: arguments[name] for name in path.writes}


def _close(name: str, found: Tensor, expected: Tensor, limit: float) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite()), f"{name} is finite elsewhere"
    error = (torch.where(finite, found - expected, 0.0)).abs().max().item()
    largest = torch.where(finite, expected, 0.0).abs().max().item()
    assert error <= limit * largest, f"{name} differs by {error:.3g}; its largest element is {largest:.3g}"
