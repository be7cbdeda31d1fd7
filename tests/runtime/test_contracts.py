"""Contracts: what they accept, and that every refusal names the argument, what it got and what it takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from iokernels.runtime.contracts import FLOATS, Contract, Spec, short

CONTRACT = Contract(
    "op",
    q=Spec("B H N D", FLOATS),
    k=Spec("B H M D", same_dtype_as="q"),
    mask=Spec("B|1 H|1 N|1 M|1", (torch.bool,), optional=True),
    offsets=Spec("B+1", (torch.int32, torch.int64), optional=True),
    table=Spec("B *"),
)


def tensors(**changes: Any) -> dict[str, Any]:
    return {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 5, 8), **changes}


def test_sizes_are_named() -> None:
    assert CONTRACT.check(**tensors()) == {"B": 2, "H": 3, "N": 4, "D": 8, "M": 5}


def test_known_sizes_are_kept_and_enforced() -> None:
    assert CONTRACT.check({"N": 4}, **tensors())["N"] == 4
    with pytest.raises(ValueError, match=r"op: q has shape \[2, 3, 4, 8\]; its dimension 2 \(N\) must be 7"):
        CONTRACT.check({"N": 7}, **tensors())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (2, 1, 1, 5)])
def test_one_is_broadcast_where_the_contract_says_so(shape: tuple[int, ...]) -> None:
    CONTRACT.check(**tensors(mask=torch.ones(shape, dtype=torch.bool)))


def test_optional_none_is_skipped() -> None:
    CONTRACT.check(**tensors(mask=None, offsets=None))


def test_star_takes_any_size() -> None:
    for size in (0, 1, 9):
        CONTRACT.check(**tensors(table=torch.zeros(2, size)))


def test_plus_one() -> None:
    CONTRACT.check(**tensors(offsets=torch.zeros(3, dtype=torch.int32)))
    with pytest.raises(
        ValueError, match=r"op: offsets has shape \[2\]; its dimension 0 \(B\+1\) must be 3, from the B"
    ):
        CONTRACT.check(**tensors(offsets=torch.zeros(2, dtype=torch.int32)))


def test_plus_one_can_set_the_size() -> None:
    contract = Contract("op", offsets=Spec("B+1"), x=Spec("B"))
    assert contract.check(offsets=torch.zeros(4), x=torch.zeros(3)) == {"B": 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": [1.0]}, TypeError, r"op: k is list; it must be a torch\.Tensor"),
        (
            {"k": torch.zeros(2, 3, 5)},
            ValueError,
            r"op: k has 3 dimensions, shape \[2, 3, 5\]; it must have 4: \[B, H, M",
        ),
        ({"k": torch.zeros(2, 3, 5, 9)}, ValueError, r"op: k has .*dimension 3 \(D\) must be 8, from the D of q"),
        ({"k": torch.zeros(2, 3, 5, 8).half()}, TypeError, r"op: k is float16; it must be float32, as q is"),
        ({"q": torch.zeros(2, 3, 4, 8).int()}, TypeError, r"op: q is int32; it must be float16 or bfloat16 or float32"),
        ({"k": torch.zeros(2, 3, 5, 8, device="meta")}, ValueError, r"op: k is on meta; it must be on cpu, as q is"),
        ({"mask": torch.zeros(2, 3, 4, 5)}, TypeError, r"op: mask is float32; it must be bool"),
        ({"mask": torch.zeros(2, 3, 4, 6).bool()}, ValueError, r"op: mask .*\(M\|1\) must be 5, from the M of k"),
        ({"mask": torch.zeros(2, 2, 4, 5).bool()}, ValueError, r"op: mask .*\(H\|1\) must be 3, from the H of q"),
        ({"offsets": torch.zeros(3)}, TypeError, r"op: offsets is float32; it must be int32 or int64"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CONTRACT.check(**tensors(**change))


def test_missing_required_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"op: q is None; it must be a torch\.Tensor"):
        CONTRACT.check(**tensors(q=None))


@pytest.mark.parametrize("value", [0.5, 1, 0])
def test_number_is_a_float(value: float) -> None:
    got = CONTRACT.number("p", value, least=0.0, below=2.0)
    assert isinstance(got, float)
    assert got == value


@pytest.mark.parametrize("value", ["1", None, True, [1.0], torch.tensor(1.0)])
def test_number_of_a_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"op: p is {type(value).__name__}; it must be a number"):
        CONTRACT.number("p", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.0])
def test_number_out_of_bounds(value: float) -> None:
    with pytest.raises(ValueError, match=rf"op: p is {value}; it must be finite, at least 0\.0, below 1\.0"):
        CONTRACT.number("p", value, least=0.0, below=1.0)


def test_number_above_is_exclusive() -> None:
    with pytest.raises(ValueError, match=r"it must be finite, above 0\.0"):
        CONTRACT.number("p", 0.0, above=0.0)


def test_require() -> None:
    CONTRACT.require(True, "fine")
    with pytest.raises(ValueError, match=r"op: x is 3; it must be 4"):
        CONTRACT.require(False, "x is 3; it must be 4")


def test_short_names() -> None:
    assert short(torch.bfloat16) == "bfloat16"


def test_traced_sizes() -> None:
    contract = Contract("op", x=Spec("B N"), y=Spec("B"))

    def rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * contract.check(x=x, y=y)["N"]

    compiled = torch.compile(rows, backend="eager", fullgraph=True, dynamic=True)
    for n in (3, 5):
        assert torch.equal(compiled(torch.ones(2, n), torch.ones(2)), torch.full((2, n), float(n)))


def test_an_integer_is_pythons_or_numpys() -> None:
    for value in (3, np.int32(3), np.uint8(3)):
        got = CONTRACT.integer("n", value, least=0)
        assert type(got) is int
        assert got == 3


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, np.float32(3), "3", None, torch.tensor(3)])
def test_an_integer_of_a_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"op: n is {type(value).__name__}; it must be an int"):
        CONTRACT.integer("n", value)


@pytest.mark.parametrize(
    ("value", "bounds", "asked"),
    [
        (-1, {"least": 0}, "at least 0"),
        (9, {"least": 0, "most": 8}, "0 to 8"),
        (2**63, {}, "-9223372036854775808 to 9223372036854775807"),
        (2**63, {"least": 0}, "at least 0"),
    ],
)
def test_an_integer_out_of_bounds(value: int, bounds: dict[str, int], asked: str) -> None:
    with pytest.raises(ValueError, match=rf"op: n is {value}; it must be {asked}"):
        CONTRACT.integer("n", value, **bounds)


def test_an_integer_too_long_to_write() -> None:
    with pytest.raises(ValueError, match=r"op: n is an integer of \d+ bits; it must be"):
        CONTRACT.integer("n", 10**5000)


def test_flags() -> None:
    assert CONTRACT.flag("on", np.bool_(True)) is True
    assert CONTRACT.flag("on", False) is False
    assert CONTRACT.flag("on", None, optional=True) is None
    for value in (1, None, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match=rf"op: on is {type(value).__name__}; it must be a bool"):
            CONTRACT.flag("on", value)


def test_none_is_refused_with_the_number_that_it_may_mean() -> None:
    with pytest.raises(TypeError, match=r"op: p is NoneType; it must be a number: pass 0\.0 to turn it off"):
        CONTRACT.number("p", None, least=0.0)


def test_a_traced_number_stays_symbolic() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * CONTRACT.number("p", x.shape[0] ** -0.5) * CONTRACT.integer("n", x.shape[0], least=1)

    compiled = torch.compile(scaled, backend="eager", fullgraph=True, dynamic=True)
    for n in (4, 9):
        assert torch.equal(compiled(torch.ones(n)), torch.full((n,), n**0.5))
