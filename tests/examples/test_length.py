"""The example that measures time and memory against length, at lengths of a second."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .loading import example


@pytest.fixture(scope="module")
def length() -> Iterator[Any]:
    with example("length") as module:
        yield module


def test_exponent_is_the_slope(length: Any):
    tokens = [100, 200, 400, 800]
    for power in (1.0, 2.0):
        curve = length.Curve("", tokens, [3e-6 * n**power for n in tokens], [1] * 4)
        assert curve.exponent == pytest.approx(power)


def test_states_do_not_grow_and_keys_do(length: Any):
    heard = []
    curves = length.measure([40, 80], 1, torch.device("cpu"), lambda *said: heard.append(said))
    remembered = {curve.name: curve.remembered for curve in curves}
    assert remembered.pop("flash") == [2 * 4 * 2 * n * 64 for n in (40, 80)]
    assert len(remembered) == 3
    assert all(first == last > 0 for first, last in remembered.values())
    assert len(heard) == 8


def test_command_line(length: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    length.main(["--lengths", "64", "32", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path), "--json"])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((tmp_path / "results.json").read_text())
    assert [curve["tokens"] for curve in report["curves"]] == [[32, 64]] * 4
    assert all(seconds > 0 for curve in report["curves"] for seconds in curve["seconds"])
    assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")
    assert "delta rule" in printed.err


def test_command_line_refuses(length: Any, capsys: Any):
    for arguments, message in ((["--lengths", "64"], "two lengths"), (["--repeats", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            length.main(arguments)
        assert message in capsys.readouterr().err
