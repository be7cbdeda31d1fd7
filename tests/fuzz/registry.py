"""The operators that are fuzzed, and how often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

from .case import Case
from .draw import Draw

OPERATORS = {
    "flash_attention": 18,
    "lean_attention": 12,
    "append_kv": 8,
    "block_sparse_attention": 10,
    "hip_attention": 8,
    "linear_attention": 12,
    "gated_delta_rule": 8,
    "fft_conv": 8,
    "short_conv": 8,
    "flash_rnn": 8,
}
"""Each with its share of the cases, in per cent."""


def make(operator: str, seed: int, backend: str | None = None) -> tuple[Case, Draw]:
    """The case that a number means, and what it was drawn from."""
    draws: Callable[[Draw], Case] = import_module(f".draws.{operator}", __package__).draw
    d = Draw(operator, seed, backend)
    return draws(d), d


def shares(cases: int, operator: str | None) -> Iterator[tuple[str, int]]:
    """How many of ``cases`` each operator gets: all of them, where one is asked for."""
    if operator is not None:
        yield operator, cases
        return
    total = sum(OPERATORS.values())
    for name, weight in OPERATORS.items():
        yield name, max(cases * weight // total, 1)
