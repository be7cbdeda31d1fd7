"""Keys of tables: what the fields of a problem make, for a kernel of every room and backend, and the way back."""

from __future__ import annotations

from typing import Any

import pytest

from iokernels.autotune import RoundedSize, Tunable, Unkeyed
from iokernels.ops import CASES
from iokernels.runtime.device import named
from iokernels.testing.case import load

H100 = named("h100-sxm")
TUNABLES: dict[str, Tunable[Any]] = {}
for case in map(load, CASES):
    TUNABLES |= {} if case.tuning is None else case.tuning.tunables

KEYS = [
    (
        "block_sparse_fwd",
        ("block_sparse_fwd", 16, 64, 4, False, 16, False, 80, 108, 166912, 4, 4, 1),
        {
            "block_d": 16,
            "block_k": 16,
            "block_v": 64,
            "dtype": "fp32",
            "item_rows": 4,
            "items": 4,
            "paged": False,
            "seqlen_k": 1,
        },
        ("item_rows", "items", "seqlen_k"),
    ),
    (
        "fft_conv_bwd",
        ("fft_conv_bwd", 4, "tf32x3", 65536, 3374, "circular", False, True, 80, 166912, 108, 3, 1),
        {
            "gated": True,
            "heads": 4,
            "mode": "circular",
            "pairs": 1,
            "precision": "tf32x3",
            "seqlen": 65536,
            "taps": 4096,
        },
        ("heads", "pairs", "seqlen", "taps"),
    ),
    (
        "fft_conv_fwd_cuda",
        ("fft_conv_fwd", 1000000, 3184, "causal", True, True, 166912, 108, 7, 5),
        {"gated": True, "heads": 8, "mode": "causal", "pairs": 8, "seqlen": 1048576, "taps": 4096},
        ("heads", "pairs", "seqlen", "taps"),
    ),
    (
        "flash_attention_fwd",
        ("flash_attention_fwd", 16, 64, 4, True, True, 80, 166912, True, False, 1048576, 2, 65536),
        {
            "block_d": 16,
            "block_v": 64,
            "causal": True,
            "dtype": "tf32",
            "extras": True,
            "heads": 1048576,
            "seqlen_k": 65536,
            "seqlen_q": 2,
            "window": False,
        },
        ("heads", "seqlen_q", "seqlen_k"),
    ),
    (
        "flash_attention_cuda_bwd_kv",
        ("flash_attention_cuda_bwd_kv", 16, 256, True, 80, 166912, 167936, 4, 500, 16, False),
        {"block_d": 16, "block_v": 256, "causal": True, "heads": 4, "seqlen_k": 16, "seqlen_q": 500},
        ("heads", "seqlen_q", "seqlen_k"),
    ),
    (
        "flash_rnn_bwd",
        ("flash_rnn_bwd", 64, 4, 3, 2, 2, True, 80, 166912, 16, 7),
        {"batch": 16, "block_d": 64, "dtype": "half", "gates": 4, "heads": 7, "states": 2, "values": 3},
        ("batch", "heads"),
    ),
    (
        "flash_rnn_bwd_cuda",
        (5, 16, 32, 4, 2, True, 4, 2, False, False, False, True, 132, 232448),
        {"batch": 32, "dtype": "half", "exact": False, "gates": 4, "heads": 16, "states": 2, "values": 4, "width": 16},
        ("batch", "heads"),
    ),
    (
        "gated_delta_rule_fwd",
        ("gated_delta_rule_fwd", 128, 16, 16, 4, True, 80, 166912, 108, 1048576, 4),
        {"dtype": "tf32", "heads": 1048576, "seqlen": 4, "width_k": 128, "width_v": 16},
        ("heads", "seqlen"),
    ),
    (
        "hip_attention_stage",
        ("hip_attention_stage", 16, 2, True, 8, 1024, 65536, 80, 166912),
        {"block_d": 16, "candidates": 1024, "dtype": "half", "lists": 65536, "rows": 8},
        ("rows", "candidates", "lists"),
    ),
    (
        "hip_attention_select_cuda",
        (128, 2, 80, 108, 166912, 167936, 128, 1000000),
        {"block_d": 128, "candidates": 128, "rows": 2, "searches": 1000000},
        ("rows", "candidates", "searches"),
    ),
    (
        "lean_attention",
        (64, 64, 256, 4, 1, False, "invariant", False, 80, 108, 166912, 167936, 1000000, 2),
        {
            "block_d": 64,
            "block_m": 64,
            "block_v": 256,
            "cache_itemsize": 1,
            "items": 1000000,
            "itemsize": 4,
            "paged": False,
            "schedule": "invariant",
            "seqlen_k": 2,
            "tensor_cores": False,
        },
        ("items", "seqlen_k"),
    ),
    (
        "lean_attention_cuda",
        (2, 64, 256, 4, True, "split", True, 80, 108, 166912, 167936, 128, 1024),
        {
            "block_d": 64,
            "block_v": 256,
            "cache_itemsize": 4,
            "items": 128,
            "key_scales": True,
            "paged": True,
            "row_warps": 2,
            "schedule": "split",
            "seqlen_k": 1024,
        },
        ("items", "seqlen_k"),
    ),
    (
        "linear_attention_fwd",
        ("linear_attention_fwd", 32, 16, 4, True, True, False, 80, 108, 166912, 3, 1),
        {"block_k": 32, "block_v": 16, "crossing": False, "dtype": "tf32", "heads": 3, "seqlen": 1, "taylor": True},
        ("heads", "seqlen"),
    ),
    (
        "linear_attention_cuda_fwd",
        (128, 16, False, 80, 108, 166912, 167936, 128, 65536),
        {"block_y": 128, "block_z": 16, "crossing": False, "heads": 128, "seqlen": 65536},
        ("heads", "seqlen"),
    ),
    (
        "short_conv_fwd",
        ("short_conv_fwd", 4, 2, True, 7, 1000000, 1, 80, 166912),
        {"channels": 1000000, "itemsize": 2, "rows": 7, "rows_inside": True, "sequences": 1, "width": 4},
        ("rows", "channels", "sequences"),
    ),
]
"""A kernel, a problem of it, its key in tables that users have, and the sizes of which the nearest serves."""


@pytest.mark.parametrize(("kernel", "problem", "key", "near"), KEYS, ids=[row[0] for row in KEYS])
def test_tables_that_users_have_keep_their_keys(
    kernel: str, problem: tuple[Any, ...], key: dict[str, Any], near: tuple[str, ...]
) -> None:
    tunable = TUNABLES[kernel]
    assert tunable.key(tunable.problem(*problem)) == key
    assert sorted(tunable.near) == sorted(near)


def test_every_room_and_backend_is_among_them() -> None:
    stated = {TUNABLES[row[0]].problem for row in KEYS}
    assert {tunable.problem for tunable in TUNABLES.values()} == stated


@pytest.mark.parametrize("kernel", TUNABLES)
def test_a_key_leads_back_to_a_problem_that_has_it(kernel: str) -> None:
    tunable = TUNABLES[kernel]
    stated = next(row for row in KEYS if TUNABLES[row[0]].problem is tunable.problem)
    found = tunable.problem_of(stated[2], H100)
    assert isinstance(found, tunable.problem)
    assert tunable.key(found) == stated[2]
    with pytest.raises((KeyError, TypeError)):
        tunable.problem_of({**stated[2], "another": 1}, H100)


def test_what_a_field_is_said_to_be(tunable: Any, make_problem: Any) -> None:
    assert tunable.near == ("length",)
    assert tunable.key(make_problem(length=1000)) == {"dtype": "half", "width": 64, "length": 1000}
    assert RoundedSize.__metadata__[1](1000) == 1024  # type: ignore[attr-defined]
    assert Unkeyed[bool].__origin__ is bool  # type: ignore[attr-defined]
