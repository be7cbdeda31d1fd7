"""What the library reads from the environment, and what a process without a home or with nonsense in it gets."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from iokernels.runtime import environment


@pytest.fixture(autouse=True)
def _afresh() -> None:
    environment.cache_folder.cache_clear()


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python on ``code`` with nothing in the environment but ``variables`` and where to find things."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes", "on", "y", " 1 "])
def test_a_switch_is_on_for_what_triton_takes_for_on(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOKERNELS_EMULATE", text)
    assert environment.switch("IOKERNELS_EMULATE")


@pytest.mark.parametrize("text", ["", "0", "false", "off", "no", "2"])
def test_a_switch_is_off_otherwise(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOKERNELS_EMULATE", text)
    assert not environment.switch("IOKERNELS_EMULATE")


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_orders_that_make_no_sense_are_an_error_and_not_uninitialised_memory(text: str) -> None:
    code = """
import torch
from iokernels import short_conv, lean_attention
x = torch.ones(2, 1, 1, 16, 16, dtype=torch.half)
lean_attention(x[0][:, :, :1], *x, cache_seqlens=torch.tensor([16], dtype=torch.int32), backend="cuda")
"""
    done = run(code, IOKERNELS_EMULATE="1", IOKERNELS_EMULATE_ORDERS=text, HOME=str(Path.home()))
    assert done.returncode
    assert f"IOKERNELS_EMULATE_ORDERS is {text!r}; it must be a whole number, at least 1" in done.stderr


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IOKERNELS_CACHE", "~/x")
    assert environment.cache_folder() == tmp_path / "x"


def test_a_relative_folder_does_not_move_with_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IOKERNELS_CACHE", "kept")
    assert environment.cache_folder() == tmp_path / "kept"


def test_a_user_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOKERNELS_CACHE", "~nobody-has-this-name/x")
    with pytest.raises(ValueError, match=r"IOKERNELS_CACHE is '~nobody-has-this-name/x', whose ~ cannot be expanded"):
        environment.cache_folder()


def homeless(code: str) -> str:
    """What ``code`` prints for a user who has no home: neither a variable nor an entry in the list of users."""
    without = "import pwd\ndef unknown(*_): raise KeyError('no such user')\npwd.getpwuid = pwd.getpwnam = unknown\n"
    done = run(without + code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(os.name != "posix", reason="homes are found otherwise here")
def test_the_library_is_imported_and_runs_without_a_home() -> None:
    code = """
import torch, iokernels
from iokernels.runtime.environment import cache_folder
q = torch.ones(1, 1, 4, 16)
assert iokernels.flash_attention(q, q, q, causal=True).eq(1).all()
print(cache_folder())
"""
    assert homeless(code) == str(Path(tempfile.gettempdir()) / f"iokernels-{os.getuid()}")
