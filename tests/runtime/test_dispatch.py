"""The rule by which a backend is chosen."""

from __future__ import annotations

import pytest

import iokernels
from iokernels.runtime import dispatch
from iokernels.runtime.dispatch import Refusal, choose, requested, use_backend


def able() -> str | None:
    return None


def too_wide() -> str | None:
    return "D is 512"


ALL: dict[str, Refusal] = {"triton": able, "torch": able, "reference": able}
NO_TRITON: dict[str, Refusal] = {**ALL, "triton": too_wide}


@pytest.mark.parametrize(
    ("device", "backend"), [("cuda", "triton"), ("cpu", "torch"), ("xpu", "torch"), ("meta", "torch")]
)
def test_default_of_a_device(device: str, backend: str) -> None:
    assert choose("op", None, device, ALL) == backend


def test_default_passes_over_a_backend_that_cannot() -> None:
    assert choose("op", None, "cuda", NO_TRITON) == "torch"


def test_default_never_takes_the_oracle() -> None:
    with pytest.raises(
        iokernels.UnsupportedError, match=r"op: no backend can run this call on cpu \(torch: D is 512\)"
    ):
        choose("op", None, "cpu", {"torch": too_wide, "reference": able})


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_named_backend_runs(backend: str) -> None:
    assert choose("op", backend, "cpu", ALL) == backend


def test_named_backend_never_falls_back() -> None:
    with pytest.raises(iokernels.UnsupportedError) as caught:
        choose("op", "triton", "cuda", NO_TRITON)
    assert str(caught.value) == (
        "op: backend 'triton' cannot run this call: D is 512. Backends that can: torch, reference."
    )


def test_backend_that_the_operator_has_not() -> None:
    with pytest.raises(iokernels.UnsupportedError, match=r"'cuda' cannot run this call: it has no such implementation"):
        choose("op", "cuda", "cuda", ALL)


def test_nothing_can() -> None:
    with pytest.raises(iokernels.UnsupportedError, match="No other backend can either"):
        choose("op", "triton", "cuda", {"triton": too_wide, "torch": too_wide})


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"op: backend is 'numpy'; it must be None or one of triton, torch, reference"):
        choose("op", "numpy", "cpu", ALL)


def test_use_backend_nests_and_ends() -> None:
    assert requested(None) is None
    with use_backend("reference"):
        assert requested(None) == "reference"
        with use_backend("torch"):
            assert requested(None) == "torch"
        assert requested(None) == "reference"
    assert requested(None) is None


def test_call_wins_over_use_backend() -> None:
    with use_backend("reference"):
        assert requested("torch") == "torch"


def test_use_backend_ends_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert requested(None) is None


def test_use_backend_refuses_unknown_names() -> None:
    message = r"use_backend: name is 'numpy'; it must be one of reference, torch, triton, cuda"
    with pytest.raises(ValueError, match=message), use_backend("numpy"):
        pass


def test_every_preference_is_a_backend() -> None:
    assert {name for names in dispatch.PREFERENCE.values() for name in names} <= set(dispatch.BACKENDS)


def test_unsupported_is_a_runtime_error() -> None:
    assert issubclass(iokernels.UnsupportedError, RuntimeError)
