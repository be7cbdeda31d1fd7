"""``iokernels io`` and ``iokernels inspect``: what they print, write and return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iokernels.autotune.resources import Resources
from iokernels.bench.cli import main
from iokernels.bench.commands import io as io_table
from iokernels.runtime import device as devices
from iokernels.runtime.device import named
from iokernels.testing.case.accounts import Bytes

SMALL = ["io", "flash_attention", "--shape", "b=1,h=2,n=160,d=16,causal=1", "--dtype", "fp16"]


@pytest.mark.interpreted
def test_io_counts_what_it_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, picture = tmp_path / "io.json", tmp_path / "io.png"
    assert main([*SMALL, "--json", str(target), "--plot", str(picture)]) == 0
    report = json.loads(target.read_text())
    assert report["ok"]
    assert report["gpu"] == "h100-sxm"
    (row,) = report["rows"]
    assert row["counted"]["shape"] == row["shape"] == "b=1,h=2,n=160,d=16,causal=1"
    for kernel in ("fwd", "bwd_delta", "bwd_dq", "bwd_dkv"):
        name = f"flash_attention_{kernel}_kernel"
        assert row["counted"]["count"][name] == row["kernels"][name]["model"]
    forward = row["passes"]["fwd"]
    assert forward["floor"] == 4 * 2 * 160 * 16 * 2 + 2 * 160 * 4
    assert forward["naive"] == 4 * 2 * (160 * 16 + 160 * 160) * 2
    assert row["lower_bound"]["formula"].startswith("N^2 d^2 / M")
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    assert "counted: every kernel as its model" in printed
    assert "an order, without its constant" in printed


@pytest.mark.interpreted
def test_io_fails_where_a_count_is_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = io_table.count

    def once_more(*arguments: Any) -> dict[str, Bytes]:
        counts = real(*arguments)
        read, written = counts["flash_attention_bwd_dq_kernel"]
        return counts | {"flash_attention_bwd_dq_kernel": Bytes(read + 2, written)}

    monkeypatch.setattr(io_table, "count", once_more)
    assert main(SMALL) == 1
    assert "WRONG: flash_attention_bwd_dq_kernel: counted" in " ".join(capsys.readouterr().out.split())


@pytest.mark.interpreted
def test_io_says_when_it_counts_on_a_smaller_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(io_table, "COUNTED_BYTES", 200_000)
    target = tmp_path / "io.json"
    shape = "b=2,h=4,hkv=2,n=128,d=16"
    assert main(["io", "flash_attention", "--shape", shape, "--dtype", "fp16", "--json", str(target)]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert (row["shape"], row["counted"]["shape"]) == (shape, "b=1,h=2,hkv=1,n=128,d=16")
    assert row["counted"]["wrong"] == []


def test_the_gpu_chooses_the_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "interpret_triton", lambda: False)
    tiles = {}
    for gpu in ("a100-sxm", "h100-sxm"):
        target = tmp_path / f"{gpu}.json"
        shape = ["--shape", "b=1,h=2,n=64k,d=64"]
        assert main(["io", "flash_attention", *shape, "--gpu", gpu, "--json", str(target)]) == 0
        (row,) = json.loads(target.read_text())["rows"]
        assert row["counted"] is None
        tiles[gpu] = row["configs"]["flash_attention_fwd"]
    assert tiles["a100-sxm"] != tiles["h100-sxm"]


@pytest.mark.interpreted
def test_inspect_has_nothing_to_do_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "flash_attention", "--gpu", "h100-sxm"]) == 2
    error = capsys.readouterr().err
    assert "TRITON_INTERPRET is set" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "quick", "--shape", "n=1"], "exclude each other"),
        (["--dtype", "fp64"], "--dtype is fp64, which the triton kernels of flash_attention do not take"),
        (["--plot", "/no/such/folder/x.png"], "there is no folder /no/such/folder"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["io", "flash_attention", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gxx
def test_shapes_that_a_backend_refuses_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["b=1,h=1,n=1,nk=300,d=16,budget=48,sink=5,window=24", "b=1,h=1,n=1,nk=300,d=16,quest=1"]
    command = ["io", "select_hip", "--backend", "cuda"]
    assert main([*command, "--shape", shapes[1]]) == 2
    refusal = "quest=1 bf16: select_quest: backend 'cuda' cannot run this call"
    assert refusal in capsys.readouterr().err
    assert main([*command, "--shape", shapes[0], "--shape", shapes[1]]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert refusal in printed
    assert "counted: every kernel as its model" in printed


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (255, 0, 8, (1, "registers")),
        (128, 131072, 8, (1, "shared memory")),
        (128, 65536, 4, (3, "shared memory")),
        (64, 1024, 8, (4, "registers")),
        (32, 0, 8, (8, "registers")),
        (24, 0, 8, (8, "threads")),
        (16, 0, 1, (32, "blocks")),
    ],
)
def test_blocks_of_an_sm_by_hand(registers: int, shared: int, warps: int, expected: tuple[int, str]) -> None:
    found = Resources("k", registers, 0, shared, warps, b"").blocks_per_sm(named("h100-sxm"))
    assert found == expected
