"""The words that describe a call of append_kv, and the lengths of its sequences."""

from __future__ import annotations

import torch

from iokernels.testing.case.shape import Dimension, Shape, Vocabulary

VOCABULARY = Vocabulary(
    "append_kv",
    (
        Dimension("b", 16, "sequences", always=True),
        Dimension("h", 8, "key and value heads", least=1, always=True),
        Dimension("n", 1, "new keys of the longest append", least=1, always=True),
        Dimension("nk", 8192, "keys that the longest sequence has before", always=True),
        Dimension("shortest", "nk", "keys that the shortest sequence has; the others lie evenly between"),
        Dimension("spare", 0, "keys for which the caches have room beyond nk + n"),
        Dimension("d", 128, "width of keys", least=1, always=True),
        Dimension("dv", "d", "width of values", least=1),
        Dimension("page", 0, "keys of a page; 0 is a dense cache"),
        Dimension("cache", 0, "what the caches hold; 0: the dtype of keys, 1: float8_e4m3fn, 2: int8", most=2),
        Dimension("scales", 0, "what keys are divided by; 0: nothing, 1: one scale a head, 2: one a key", most=2),
        Dimension("rot", 0, "elements of a key that the rotary embedding turns; even, d at most"),
        Dimension("interleaved", 0, "1: it turns the pairs (2 j, 2 j + 1)", most=1),
        Dimension("positions", 0, "1: positions are given, 7 after the keys that are there", most=1),
        Dimension("ragged", 0, "1: sequences append different numbers of keys, n at most", most=1),
        Dimension("bnhd", 0, "1: tensors stored as [b, n, h, d], passed as transposed views", most=1),
    ),
)

CACHE_DTYPES = (None, torch.float8_e4m3fn, torch.int8)
"""Dtypes of a cache by the word ``cache``; None is that of the keys."""


def lengths(shape: Shape) -> list[int]:
    """Keys that every sequence has before the append, the longest first."""
    if shape.b < 2:
        return [shape.nk] * shape.b
    step = (shape.nk - shape.shortest) / (shape.b - 1)
    return [round(shape.nk - step * index) for index in range(shape.b)]


def counts(shape: Shape) -> list[int]:
    """Keys that every sequence appends: n, or falling evenly from n to none."""
    if not shape.ragged or shape.b < 2:
        return [shape.n] * shape.b
    return [shape.n * (shape.b - 1 - index) // (shape.b - 1) for index in range(shape.b)]


def first(shape: Shape) -> tuple[int, ...]:
    """The dimensions of a cache before its width."""
    capacity = shape.nk + shape.n + shape.spare
    if shape.page:
        return shape.b * -(-capacity // shape.page), shape.h, shape.page
    return shape.b, shape.h, capacity


def angles(shape: Shape) -> int:
    """Rows of the rotary table."""
    return shape.nk + shape.n + 7
