"""A small kernel to tune, and a cache folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from iokernels.autotune import RESULTS, Size, Space, Tunable
from iokernels.autotune.space import at_most, literals


@dataclass(frozen=True)
class Config:
    """A tile, whose size changes results, and warps, whose number does not."""

    tile: int = field(metadata=RESULTS)
    warps: int


class Problem(NamedTuple):
    """``width`` limits the tile."""

    dtype: str
    width: int
    length: Size


@pytest.fixture
def tunable() -> Tunable[Config]:
    """Tiles of 16 to 64 no wider than the problem, 4 or 8 warps; by default 16 and 4."""
    space = Space(
        "toy",
        3,
        (literals("tile", 16, 32, 64), literals("warps", 4, 8)),
        (at_most("width", ("tile",), lambda problem, device, tile: tile - problem.width, 0),),
        make=Config,
    )
    return Tunable("toy_fwd", "triton", space, lambda problem: Config(16, 4), Problem)


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """A problem of which the test changes what matters to it."""
    return lambda dtype="half", width=64, length=1024: Problem(dtype, width, length)


@pytest.fixture
def make_config() -> type[Config]:
    return Config


@pytest.fixture(autouse=True)
def _no_tables(roots: tuple[Path, Path]) -> None:
    """No table but those that the test writes."""
