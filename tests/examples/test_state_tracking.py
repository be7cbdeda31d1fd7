"""The state tracking example, at a size that trains in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .loading import example


@pytest.fixture(scope="module")
def tracking() -> Iterator[Any]:
    with example("state_tracking") as module:
        yield module


@pytest.fixture
def small(tracking: Any) -> Any:
    return tracking.Settings(
        steps=200, batch=32, length=10, growing=120, lengths=(10, 40), tried=64, modulus=3, width=16
    )


def test_only_the_recurrent_network_goes_on_counting(tracking: Any, small: Any) -> None:
    able, unable = (tracking.train(name, small) for name in ("LSTM", "linear"))
    assert able.last(40) > 0.8
    assert unable.last(40) < 0.5
    assert able.losses[-1] < 0.3 < unable.losses[-1]


def test_answers_are_sums(tracking: Any, small: Any) -> None:
    digits, sums = tracking.strings(50, 20, 5, torch.Generator().manual_seed(0))
    assert set(digits.flatten().tolist()) == set(range(5))
    for row, answer in zip(digits.tolist(), sums.tolist(), strict=True):
        assert answer == [sum(row[: n + 1]) % 5 for n in range(20)]

    def knows(digits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(digits.cumsum(1) % 3, 3)

    def says_zero(digits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(0 * digits, 3)

    assert (tracking.accuracy(knows, small, 30) == 1).all()
    assert tracking.accuracy(says_zero, small, 30).mean().item() == pytest.approx(1 / 3, abs=0.05)


def test_the_same_seed_repeats_a_run(tracking: Any, small: Any) -> None:
    for name in tracking.MODELS:
        first, second = (tracking.train(name, replace(small, steps=3)) for _ in range(2))
        assert first.losses == second.losses
        assert first.by_digit == second.by_digit


def test_command_line(tracking: Any, small: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(tracking, "Settings", lambda: small)
    tracking.main(["--steps", "2", "--device", "cpu", "--out", str(tmp_path), "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((tmp_path / "results.json").read_text())
    assert [result["name"] for result in report["results"]] == [*tracking.MODELS]
    assert (tmp_path / "state_tracking.png").read_bytes().startswith(b"\x89PNG")
    assert "right answers" in printed.err
    with pytest.raises(SystemExit):
        tracking.main(["--steps", "0"])
    assert "at least 1" in capsys.readouterr().err
