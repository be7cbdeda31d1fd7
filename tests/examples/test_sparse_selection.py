"""The example that measures what selection keeps and costs, at sizes of a second."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .loading import example as load


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    with load("sparse_selection") as module:
        yield module


def test_exponent_is_the_slope(example: Any) -> None:
    assert example.exponent([100, 200, 400], [3.0 * n**1.5 for n in (100, 200, 400)]) == pytest.approx(1.5)


def test_recall(example: Any, tmp_path: Path, capsys: Any) -> None:
    example.main(["recall", "--tokens", "3000", "--budget", "512", "--seeds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["recall"].keys() == {*example.SELECTORS, "random keys"}
    assert all(0.0 < row <= mean <= 1.0 for mean, row in found["recall"].values())
    assert found["recall"]["exact, blocks of 8"][0] > found["recall"]["random keys"][0]
    assert "mass kept" in capsys.readouterr().out


def test_cost(example: Any, tmp_path: Path) -> None:
    example.main(["cost", "--lengths", "3584", "4096", "--repeats", "1", "--out", str(tmp_path)])
    cost = json.loads((tmp_path / "results.json").read_text())["cost"]
    assert all(len(values) == 2 and min(values) > 0 for curves in cost.values() for values in curves.values())
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_sparse_wins_on_bytes_by_16k_tokens(example: Any) -> None:
    for decode in (False, True):
        curves = example.moved([16384, 32768], decode)
        assert all(sparse < dense for sparse, dense in zip(curves["hip_attention"], curves["dense"], strict=True))
        assert curves["hip_attention"][1] / curves["hip_attention"][0] < 0.7 * curves["dense"][1] / curves["dense"][0]
