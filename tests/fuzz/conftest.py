"""Options of the fuzzer, and its summary."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from .registry import OPERATORS, shares

SAMPLE = 140
"""Cases that run where nobody asks for a number, as in ``make test``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--cases", type=int, default=SAMPLE, help="cases of the fuzzer, over all operators")
    group.addoption("--seed", type=int, default=0, help="seed of each operator's first case")
    group.addoption("--op", choices=list(OPERATORS), help="the operator to fuzz; all if not given")
    group.addoption("--backend", help="the backend of every case; drawn if not given")


def option(config: pytest.Config, name: str, default: Any) -> Any:
    """An option, or its default where pytest read this file too late to know it."""
    return config.getoption(name, default)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" not in metafunc.fixturenames:
        return
    config = metafunc.config
    first = option(config, "seed", 0)
    pairs = [
        (operator, seed)
        for operator, count in shares(option(config, "cases", SAMPLE), option(config, "op", None))
        for seed in range(first, first + count)
    ]
    metafunc.parametrize(("operator", "seed"), pairs, ids=[f"{operator}-{seed}" for operator, seed in pairs])


@pytest.fixture
def forced_backend(request: pytest.FixtureRequest) -> str | None:
    return option(request.config, "backend", None)


def pytest_report_header(config: pytest.Config) -> str:
    return f"fuzz: {option(config, 'cases', SAMPLE)} cases, seeds from {option(config, 'seed', 0)}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    seconds: Counter[tuple[str, str]] = Counter()
    nearest: dict[tuple[str, str], float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            found = dict(getattr(report, "user_properties", ()))
            if "fuzz" not in found or report.when != "call":
                continue
            key = tuple(found["fuzz"][:2])
            counts[(*key, report.outcome)] += 1
            seconds[key] += report.duration
            nearest[key] = max(nearest.get(key, 0.0), found["fuzz"][2])
    if not counts:
        return
    terminalreporter.section(f"fuzz, seeds from {option(config, 'seed', 0)}")
    for key in sorted(seconds):
        passed, failed = counts[(*key, "passed")], counts[(*key, "failed")]
        each = 1000 * seconds[key] / (passed + failed)
        terminalreporter.line(
            f"{key[0]:24} {key[1]:10} {passed:6} passed {failed:4} failed {each:8.1f} ms a case, "
            f"at most {nearest[key]:.2f} of the error allowed"
        )
    terminalreporter.line(f"IOKERNELS_EMULATE_ORDERS={os.environ.get('IOKERNELS_EMULATE_ORDERS', '1')}")
