"""The parity example, at a size that trains in seconds."""

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
def parity() -> Iterator[Any]:
    with example("parity") as module:
        yield module


@pytest.fixture
def small(parity: Any) -> Any:
    return parity.Settings(steps=100, batch=32, length=12, growing=40, lengths=(12, 24), tried=128, width=16)


def test_only_negative_eigenvalues_learn_it(parity: Any, small: Any) -> None:
    heard = []
    able = parity.train("beta in (0, 2)", small, lambda *said: heard.append(said))
    unable = parity.train("beta in (0, 1)", small)
    assert able.losses[-1] < 0.3 < unable.losses[-1]
    assert able.last(12) > 0.95
    assert unable.last(12) < 0.8
    assert heard[-1] == (100, able.losses[-1])


def test_answers_are_parities(parity: Any) -> None:
    bits, answers = parity.strings(50, 20, torch.Generator().manual_seed(0))
    assert answers.shape == bits.shape == (50, 20)
    for row, answer in zip(bits.tolist(), answers.tolist(), strict=True):
        assert answer == [sum(row[: n + 1]) % 2 for n in range(20)]


def test_accuracy_of_a_model_that_knows_and_one_that_does_not(parity: Any, small: Any) -> None:
    def knows(bits: torch.Tensor) -> torch.Tensor:
        return 2.0 * (bits.cumsum(1) % 2)[..., None] - 1.0

    def says_even(bits: torch.Tensor) -> torch.Tensor:
        return -torch.ones(*bits.shape, 1)

    assert (parity.accuracy(knows, small, 30) == 1).all()
    assert parity.accuracy(says_even, small, 30).mean().item() == pytest.approx(0.5, abs=0.05)


def test_strings_grow_to_the_length_asked_for(parity: Any, small: Any) -> None:
    lengths = [parity.string_length(small, step) for step in range(small.steps)]
    assert lengths[0] == 4
    assert lengths == sorted(lengths)
    assert lengths[-1] == small.length


def test_the_same_seed_repeats_a_run(parity: Any, small: Any) -> None:
    first, second = (parity.train("beta in (0, 2)", replace(small, steps=3)) for _ in range(2))
    assert first.losses == second.losses
    assert first.by_bit == second.by_bit


def test_command_line(parity: Any, small: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(parity, "Settings", lambda: small)
    parity.main(["--steps", "2", "--device", "cpu", "--out", str(tmp_path), "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((tmp_path / "results.json").read_text())
    assert [result["name"] for result in report["results"]] == [*parity.MODELS]
    assert all(len(result["losses"]) == 2 for result in report["results"])
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert "right answers" in printed.err


def test_command_line_refuses(parity: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parity.main(["--steps", "0"])
    assert "at least 1" in capsys.readouterr().err
