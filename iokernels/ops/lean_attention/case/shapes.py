"""The words that describe a call of lean_attention, and the lengths of its sequences."""

from __future__ import annotations

from typing import Any

import torch

from iokernels.testing.case.shape import Dimension, Shape, Vocabulary

VOCABULARY = Vocabulary(
    "lean_attention",
    (
        Dimension("b", 1, "sequences", always=True),
        Dimension("h", 32, "query heads", least=1, always=True),
        Dimension("hkv", "h", "key and value heads; divides h", least=1, always=True),
        Dimension("n", 1, "new positions of a sequence", least=1, most=16),
        Dimension("nk", 8192, "keys of the longest sequence", always=True),
        Dimension("shortest", "nk", "keys of the shortest sequence; the others lie evenly between"),
        Dimension("spare", 0, "keys for which the caches have room beyond nk"),
        Dimension("d", 128, "width of q and k", least=1, always=True),
        Dimension("dv", "d", "width of v", least=1),
        Dimension("page", 0, "keys of a page; 0 is a dense cache"),
        Dimension("causal", 1, "1: row i sees the keys up to i + length - n", most=1),
        Dimension("left", -1, "window to the left; -1 is unbounded", least=-1),
        Dimension("right", -1, "window to the right; -1 is unbounded", least=-1),
        Dimension("softcap", 0.0, "bound of the scores; 0 is none"),
        Dimension("sinks", 0, "1: a sink logit for every head", most=1),
        Dimension("cache", 0, "what the caches hold; 0: the dtype of q, 1: float8_e4m3fn, 2: int8", most=2),
        Dimension("scales", 0, "factors of keys and values; 0: none, 1: one a head, 2: one a key", most=2),
        Dimension("prefix", 0, "keys before those of every sequence, which all share"),
        Dimension("schedule", 0, "0: what tuning chose, 1: lean, 2: split, 3: batch-invariant", most=3),
        Dimension("lse", 0, "1: the log-sum-exp is returned", most=1),
        Dimension("bnhd", 0, "1: tensors stored as [b, n, h, d], passed as transposed views", most=1),
        Dimension("gain", 1.0, "factor of q: more makes the attention peaked"),
    ),
)

CACHE_DTYPES = (None, torch.float8_e4m3fn, torch.int8)
"""Dtypes of a cache by the word ``cache``; None is that of q."""

SCHEDULES = ("auto", "lean", "split", "invariant")
"""Schedules by the word ``schedule``, as :class:`iokernels.ops.lean_attention.options.Options` calls them."""


def lengths(shape: Shape) -> list[int]:
    """Keys of every sequence, the longest first."""
    if shape.b < 2:
        return [shape.nk] * shape.b
    step = (shape.nk - shape.shortest) / (shape.b - 1)
    return [round(shape.nk - step * index) for index in range(shape.b)]


def pages(shape: Shape) -> list[int]:
    """Pages of every sequence."""
    return [-(-length // shape.page) for length in lengths(shape)]


def most_pages(shape: Shape) -> int:
    """Columns of the block table."""
    return -(-(shape.nk + shape.spare) // shape.page)


def cache_dtype(shape: Shape, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the caches where q has ``dtype``."""
    return CACHE_DTYPES[shape.cache] or dtype


def first_visible(shape: Shape, length: int) -> int:
    """The first of a sequence's keys that any of its rows sees; prefix included, from the prefix's first."""
    if shape.left < 0:
        return 0
    return min(max(shape.prefix + length - shape.n - shape.left, 0), shape.prefix + length)


def cache_size(shape: Shape) -> tuple[int, int, int]:
    """The first three sizes of a cache: sequences, heads and keys, or pages, heads and keys of a page."""
    if shape.page:
        # One page belongs to no sequence.
        return sum(pages(shape)) + 1, shape.hkv, shape.page
    return shape.b, shape.hkv, shape.nk + shape.spare


def run_options(shape: Shape) -> dict[str, Any]:
    """The arguments of a call that are no tensors."""
    options: dict[str, Any] = {"causal": bool(shape.causal), "softcap": shape.softcap}
    if shape.left >= 0 or shape.right >= 0:
        options["window"] = (shape.left, shape.right)
    if SCHEDULES[shape.schedule] == "invariant":
        options["batch_invariant"] = True
    elif shape.schedule:
        options["schedule"] = SCHEDULES[shape.schedule]
    return options
