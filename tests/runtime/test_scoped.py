"""Contexts that set something for the process: right in whichever order they end."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from iokernels import use_backend
from iokernels.autotune.select import _overrides, _watched, override
from iokernels.autotune.select import watch as watch_configs
from iokernels.runtime import device, dispatch
from iokernels.runtime.cuda import emulator
from iokernels.runtime.cuda import kernel as launch
from iokernels.runtime.interpreter import shuffled_blocks
from iokernels.runtime.scoped import Scoped
from iokernels.testing.poison import poisoned_memory
from iokernels.testing.tracer import trace


def test_the_innermost_counts_and_all_of_it_ends() -> None:
    setting: Scoped[str] = Scoped("none")
    with setting.set("outer"):
        with setting.set("inner"):
            assert setting.value == "inner"
        assert setting.value == "outer"
    assert setting.value == "none"


def test_each_context_ends_its_own_entry() -> None:
    setting: Scoped[str] = Scoped("none")
    first, second, third = (setting.set(value) for value in ("one", "two", "one"))
    for context in (first, second, third):
        context.__enter__()
    first.__exit__(None, None, None)
    assert setting.value == "one"  # the third's, not the first's
    third.__exit__(None, None, None)
    assert setting.value == "two"
    second.__exit__(None, None, None)
    assert setting.value == "none"


def test_threads_that_come_and_go_leave_nothing() -> None:
    setting: Scoped[int | None] = Scoped(None)

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(300):
            contexts = [setting.set(seed) for _ in range(3)]
            for context in contexts:
                context.__enter__()
            numbers.shuffle(contexts)
            for context in contexts:
                context.__exit__(None, None, None)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert setting.value is None


CONTEXTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any]]] = {
    "use_backend": (lambda: use_backend("reference"), lambda: dispatch.requested(None)),
    "override": (lambda: override(kernel=1), lambda: dict(_overrides.value)),
    "watch_configs": (watch_configs, lambda: _watched.value),
    "assume": (lambda: device.assume(device.named("h200")), lambda: device.spec_of(torch.device("cpu")).slug),
    "recorded": (launch.recorded, lambda: launch._record.value),
    "warp_order": (lambda: emulator.warp_order(3), lambda: emulator._order.value),
    "emulator.watch": (emulator.watch, lambda: emulator._watched.value),
    "poisoned_memory": (poisoned_memory, lambda: (torch.empty, torch.Tensor.new_empty)),
}


def _interpreter_parts() -> Any:
    from triton.runtime import interpreter as triton

    builder: Any = triton.interpreter_builder
    executor: Any = triton.GridExecutor
    return builder.set_grid_dim, builder.set_grid_idx, executor.__call__, executor._init_args_hst, triton._interpreter


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_left_in_another_order_leave_nothing(name: str) -> None:
    make, state = CONTEXTS[name]
    before = state()
    first, second = make(), make()
    first.__enter__()
    inside = state()
    second.__enter__()
    first.__exit__(None, None, None)
    if name in ("use_backend", "override", "assume", "warp_order", "poisoned_memory"):
        assert state() == inside
    second.__exit__(None, None, None)
    assert state() == before


@pytest.mark.interpreted
@pytest.mark.parametrize("make", [lambda: shuffled_blocks(0), trace], ids=["shuffled_blocks", "trace"])
def test_patches_of_the_interpreter_left_in_another_order_leave_nothing(make: Any) -> None:
    before = _interpreter_parts()
    first, second = make(), make()
    first.__enter__()
    assert _interpreter_parts() != before
    second.__enter__()
    first.__exit__(None, None, None)
    assert _interpreter_parts() != before
    second.__exit__(None, None, None)
    assert _interpreter_parts() == before


def test_overrides_left_in_another_order_keep_those_of_the_rest() -> None:
    first, second = override(a=1, b=1), override(b=2)
    first.__enter__()
    second.__enter__()
    assert _overrides.value == {"a": 1, "b": 2}
    first.__exit__(None, None, None)
    assert _overrides.value == {"b": 2}
    second.__exit__(None, None, None)
    assert _overrides.value == {}


def test_a_generator_that_is_dropped_ends_its_own_backend() -> None:
    def steps() -> Any:
        with use_backend("torch"):
            yield
            yield

    generator = steps()
    next(generator)
    with use_backend("reference"):
        assert dispatch.requested(None) == "reference"
        generator.close()
        assert dispatch.requested(None) == "reference"
    assert dispatch.requested(None) is None


def test_compiled_code_notices_a_backend_and_may_set_one() -> None:
    def asked(x: torch.Tensor) -> torch.Tensor:
        return x + len(str(dispatch.requested(None)))

    def asked_inside(x: torch.Tensor) -> torch.Tensor:
        with use_backend("triton"):
            y = asked(x)
        return y + asked(x)

    torch._dynamo.reset()
    x = torch.zeros(2)
    compiled = torch.compile(asked, backend="eager", fullgraph=True)
    assert compiled(x)[0] == len("None")
    with use_backend("reference"):
        assert compiled(x)[0] == len("reference")
    assert compiled(x)[0] == len("None")
    assert torch.compile(asked_inside, backend="eager", fullgraph=True)(x)[0] == len("triton") + len("None")
    assert dispatch.requested(None) is None
