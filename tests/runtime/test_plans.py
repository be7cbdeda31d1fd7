"""What is remembered of a call, and when it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iokernels.runtime import plans
from iokernels.runtime.plans import is_concrete, remembered


class Maker:
    """Counts how often a plan is made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any) -> int:
        self.calls += 1
        return self.calls


def test_equal_metadata_is_one_plan() -> None:
    store: dict[Any, int] = {}
    make = Maker()
    for x in (torch.zeros(2, 3), torch.ones(2, 3), torch.ones(3, 2).t()):
        assert remembered(store, make, (1.0,), (x, None)) == 1
    assert make.calls == 1


@pytest.mark.parametrize(
    ("arguments", "tensor"),
    [
        ((2.0,), torch.zeros(2, 3)),
        ((1.0, None), torch.zeros(2, 3)),
        ((1.0,), torch.zeros(3, 2)),
        ((1.0,), torch.zeros(2, 3, dtype=torch.float16)),
        ((1.0,), torch.zeros(2, 3, device="meta")),
        ((1.0,), torch.zeros(2, 3, requires_grad=True)),
        ((1.0,), None),
    ],
)
def test_any_difference_is_another_plan(arguments: tuple[Any, ...], tensor: torch.Tensor | None) -> None:
    store: dict[Any, int] = {}
    make = Maker()
    remembered(store, make, (1.0,), (torch.zeros(2, 3),))
    assert remembered(store, make, arguments, (tensor,)) == 2


def test_arguments_of_different_types_are_different() -> None:
    # True == 1 == 1.0 in Python: a call that was accepted must not vouch for one that is to be refused.
    store: dict[Any, int] = {}
    make = Maker()
    plans = [remembered(store, make, (value,), (torch.zeros(1),)) for value in (True, 1, 1.0)]
    assert len(set(plans)) == 3


def test_two_makers_do_not_mix() -> None:
    store: dict[Any, int] = {}
    first, second = Maker(), Maker()
    remembered(store, first, (), (torch.zeros(1),))
    remembered(store, second, (), (torch.zeros(1),))
    assert second.calls == 1


def test_errors_are_not_remembered() -> None:
    store: dict[Any, int] = {}

    def refuse(*_: Any) -> int:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            remembered(store, refuse, (), (torch.zeros(1),))
    assert store == {}


@pytest.mark.parametrize(("arguments", "tensor"), [(([1],), torch.zeros(1)), ((1,), "not a tensor")])
def test_what_cannot_be_a_key_is_made_every_time(arguments: tuple[Any, ...], tensor: Any) -> None:
    store: dict[Any, int] = {}
    make = Maker()
    remembered(store, make, arguments, (tensor,))
    assert remembered(store, make, arguments, (tensor,)) == 2
    assert store == {}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST_PLANS", 4)
    store: dict[Any, int] = {}
    make = Maker()
    for n in range(20):
        remembered(store, make, (), (torch.zeros(n),))
        assert len(store) <= 4
    assert remembered(store, make, (), (torch.zeros(19),)) == 20


def test_nothing_is_remembered_while_compiling() -> None:
    store: dict[Any, Any] = {}

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * remembered(store, lambda x: x.shape[0] * 2, (), (x,))

    compiled = torch.compile(doubled, backend="eager", fullgraph=True, dynamic=True)
    for n in (3, 5):
        assert torch.equal(compiled(torch.ones(n)), torch.full((n,), 2.0 * n))
    assert store == {}


def test_is_concrete() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert is_concrete(torch.zeros(1))
    assert is_concrete(torch.nn.Parameter(torch.zeros(1)))
    assert not is_concrete(torch.zeros(1, device="meta"))
    with FakeTensorMode():
        assert not is_concrete(torch.zeros(1))


def test_a_plan_does_not_vouch_for_equal_tuples_of_other_types() -> None:
    store: dict[Any, int] = {}
    make = Maker()
    made = [remembered(store, make, (pair,), ()) for pair in ((1, 0), (True, False), (1.0, 0), (1, 0))]
    assert made == [1, 2, 3, 1]


def test_a_plan_does_not_vouch_for_another_layout() -> None:
    store: dict[Any, int] = {}
    make = Maker()
    x = torch.ones(2, 2)
    assert remembered(store, make, (), (x,)) != remembered(store, make, (), (x.to_sparse(),))
