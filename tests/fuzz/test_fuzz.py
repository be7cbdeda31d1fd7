"""Every operator and backend against oracles that know only the formulas of ``docs/ops``, on drawn calls.

``make fuzz`` runs ten thousand of them, ``make test`` a fixed sample. An operator and a number make a case, wherever
and whenever: what failed is repeated by the command in the message.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from iokernels.runtime.cuda import emulator

from .case import Case, Refused, Wrong, prove
from .registry import make
from .wrong import prove_wrong_call


def test_a_drawn_call_is_right(
    operator: str, seed: int, forced_backend: str | None, record_property: Callable[..., None]
) -> None:
    case, d = make(operator, seed, forced_backend)
    used, found = float("inf"), ""
    try:
        with emulator.warp_order(seed):
            if d.chance(0.1):
                prove_wrong_call(case, d)
                used = 0.0
            else:
                used = prove(case, d.generator, twice=d.chance(0.15))
    except Refused:
        used = 0.0
    except Wrong as wrong:
        found = str(wrong)
    record_property("fuzz", (operator, case.backend, used))
    if found:
        pytest.fail(_message(case, seed, forced_backend, found), pytrace=False)


def _message(case: Case, seed: int, backend: str | None, what: str) -> str:
    again = f"python -m pytest tests/fuzz/test_fuzz.py --op {case.operator} --seed {seed} --cases 1"
    again += "" if backend is None else f" --backend {backend}"
    return f"{case.operator}, seed {seed}: {what}\n{case.describe()}\nagain: {again}"
