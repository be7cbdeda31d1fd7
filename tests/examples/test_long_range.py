"""The long-range example, at a size that trains in seconds."""

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
def lr() -> Iterator[Any]:
    with example("long_range") as module:
        yield module


@pytest.fixture
def tiny(lr: Any) -> Any:
    return lr.Settings(length=80, payload=4, symbols=4, steps=150, batch=32, width=16, layers=1, learning_rate=2e-2)


@pytest.mark.parametrize("name", ["hyena", "long conv"])
def test_long_convolutions_learn_it(lr: Any, tiny: Any, name: str) -> None:
    heard: list[int] = []
    model, result = lr.train(name, tiny, lambda step, right: heard.append(step))
    assert heard == list(range(1, tiny.steps + 1))
    assert result.accuracy[-1][1] > 0.9
    assert result.parameters == sum(p.numel() for p in model.parameters())
    reached = lr.reach(model, tiny)
    assert reached.shape == (tiny.length,)
    # The last mark answers with the last symbol of the payload.
    assert reached[: tiny.length - tiny.payload].argmax() == tiny.payload - 1


def test_the_window_does_not(lr: Any, tiny: Any) -> None:
    model, result = lr.train("window", replace(tiny, steps=20))
    assert abs(result.accuracy[-1][1] - 1 / tiny.symbols) < 0.2
    reached = lr.reach(model, tiny)
    assert not reached[: tiny.length - 1 - lr.WINDOW].any()
    assert reached[tiny.length - 1 - lr.WINDOW :].all()


def test_the_same_seed_gives_the_same_sequences(lr: Any, tiny: Any) -> None:
    (text, wanted), (again, _) = (lr.examples(tiny, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(text, again)
    assert torch.equal(text[:, :4], wanted)
    assert (text[:, -4:] == tiny.symbols).all()
    assert (text[:, :-4] < tiny.symbols).all()


def test_command_line(lr: Any, tiny: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(lr, "SHORT", tiny)
    lr.main(["--short", "--steps", "2", "--device", "cpu", "--out", str(tmp_path), "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((tmp_path / "results.json").read_text())
    assert [result["mixer"] for result in report["results"]] == [*lr.MIXERS]
    assert [step for step, _ in report["results"][0]["accuracy"]] == [1, 2]
    assert (tmp_path / "copying.png").read_bytes().startswith(b"\x89PNG")
    assert "guessing gets 25.0% right" in " ".join(printed.err.split())


def test_command_line_refuses(lr: Any, capsys: Any) -> None:
    refused = {"--mixer none": "invalid choice", "--steps 0": "at least 1", "--length 80": "reach across"}
    for arguments, message in refused.items():
        with pytest.raises(SystemExit):
            lr.main(arguments.split())
        assert message in capsys.readouterr().err
