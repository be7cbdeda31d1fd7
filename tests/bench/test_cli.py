"""The command line in this process: what it prints, writes and returns."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iokernels.bench.cli import main
from iokernels.bench.timing import machine
from iokernels.ops.flash_attention import case as case_module
from iokernels.ops.flash_attention import portable

SMALL = ["--device", "cpu", "--shape", "b=1,h=2,n=64,d=16,causal=1", "--seconds", "0.02"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend ``torch`` returns 3 % too much."""
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]] = portable.forward

    def wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward(*arguments)
        return out * 1.03, lse

    monkeypatch.setattr(portable, "forward", wrong)


def test_check_proves_the_backends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "check.json"
    choice = ["--device", "cpu", "-k", "sinks, rows", "--dtype", "bf16,fp64", "--json", str(target)]
    assert main(["check", "flash_attention", *choice]) == 0
    report = json.loads(target.read_text())
    rows = {(row["backend"], row["dtype"]): row for row in report["rows"]}
    assert report["ok"]
    assert set(rows) == {(backend, dtype) for backend in ("torch", "triton", "cuda") for dtype in ("bf16", "fp64")}
    assert rows["torch", "fp64"]["status"] == rows["torch", "bf16"]["status"] == "ok"
    assert rows["torch", "bf16"]["worst"]["point"] == "sinks, rows without keys"
    assert 0.0 < rows["torch", "bf16"]["worst"]["ratio"] <= 1.0
    printed = " ".join(capsys.readouterr().out.split())
    assert "0 wrong" in printed
    # A refusal is no failure, but it is told with its sentence.
    assert rows["triton", "fp64"]["status"] == "refused"
    assert "not float64" in rows["triton", "fp64"]["refused"][0]["reason"]
    assert "refused triton fp64 sinks, rows without keys: flash_attention: backend 'triton' cannot run" in printed


@pytest.mark.usefixtures("broken")
def test_check_condemns_a_wrong_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "check.json"
    choice = ["--device", "cpu", "-k", "plain", "--dtype", "bf16", "--backend", "torch", "--json", str(target)]
    assert main(["check", "flash_attention", *choice]) == 1
    report = json.loads(target.read_text())
    assert not report["ok"]
    (wrong,) = report["rows"][0]["wrong"]
    assert (wrong["point"], wrong["where"], wrong["status"]) == ("plain", "out", "wrong")
    assert wrong["ratio"] > 1.0
    printed = " ".join(capsys.readouterr().out.split())
    assert 'again: iokernels check flash_attention --backend torch --dtype bf16 -k "plain"' in printed
    assert "0 proved, 1 wrong" in printed


def test_bench_times_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"b.{name}" for name in ("json", "csv", "png")}
    outputs = ["--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"])]
    assert main(["bench", "flash_attention", *SMALL, "--pass", "fwd,bwd,both", *outputs]) == 0
    report = json.loads(files["json"].read_text())
    assert report["ok"]
    assert report["baseline"] == "sdpa"
    rows = {(row["pass"], row["name"]): row for row in report["rows"]}
    names = {"torch", "triton", "cuda", "sdpa", "flex", "flash-attn", "flashinfer"}
    assert set(rows) == {(which, name) for which in ("fwd", "bwd", "both") for name in names}
    assert len(rows) == len(report["rows"])
    for which in ("fwd", "bwd", "both"):
        for name in ("torch", "sdpa"):
            row = rows[which, name]
            assert row["status"] == "timed"
            assert 0.0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
            assert row["tflops"] == pytest.approx(row["need_flops"] / row["ms"] / 1e9)
            assert row["gbytes_per_s"] == pytest.approx(row["need_bytes"] / row["ms"] / 1e6)
            assert 0.0 < row["error"] <= 1.0
            assert row["roofline"] is None
        assert rows[which, "sdpa"]["speedup"] == 1.0
        assert rows[which, "torch"]["speedup"] == pytest.approx(rows[which, "sdpa"]["ms"] / rows[which, "torch"]["ms"])
        assert rows[which, "triton"]["status"] in ("not timed", "refused")
        assert rows[which, "flex"]["status"] == "missing"
    assert rows["fwd", "torch"]["need_flops"] == 2 * 4 * 16 * (64 * 65 // 2)

    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [row["name"] for row in report["rows"]]
    assert float(lines[0]["ms"]) == report["rows"][0]["ms"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")

    printed = " ".join(capsys.readouterr().out.split())
    assert "need: 266.2 kFLOP, " in printed
    assert "flex missing: FlexAttention" in printed
    command = (
        "repro: iokernels bench flash_attention --shape b=1,h=2,n=64,d=16,causal=1 --dtype fp32 --pass fwd --seed 0"
    )
    assert command in printed


@pytest.mark.usefixtures("broken")
def test_a_wrong_result_has_no_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "b.json"
    assert main(["bench", "flash_attention", *SMALL, "--backend", "torch", "--json", str(target)]) == 1
    row = json.loads(target.read_text())["rows"][0]
    assert (row["name"], row["status"]) == ("torch", "wrong")
    assert row["ms"] is None
    assert row["tflops"] is None
    assert row["error"] > 1.0
    printed = capsys.readouterr().out
    assert "torch  wrong: the error of out is" in printed


def test_a_wrong_peer_is_shown_but_not_our_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def zeros(inputs: Any) -> Callable[[], dict[str, torch.Tensor]]:
        return lambda: {"out": inputs.tensors["q"] * 0.0}

    peers = {"zeros": zeros, "absent": "nobody installed it"}
    monkeypatch.setattr(case_module, "CASE", replaced(case_module.CASE, peers=lambda device: peers))
    target = tmp_path / "b.json"
    assert main(["bench", "flash_attention", *SMALL, "--backend", "torch", "--json", str(target)]) == 0
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    assert (rows["zeros"]["status"], rows["zeros"]["ms"]) == ("wrong", None)
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("missing", "nobody installed it")
    assert rows["torch"]["status"] == "timed"
    assert rows["torch"]["speedup"] is None


def replaced(case: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(case, **changes)


def test_a_large_shape_is_checked_at_a_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iokernels.bench.timing import contenders

    monkeypatch.setattr(contenders, "_CPU_REFERENCE_BYTES", 8 * 8 * 64 * 64)
    target = tmp_path / "b.json"
    shape = ["--device", "cpu", "--shape", "b=2,h=4,hkv=2,n=64,d=16", "--seconds", "0.02"]
    assert main(["bench", "flash_attention", *shape, "--backend", "torch", "--json", str(target)]) == 0
    row = json.loads(target.read_text())["rows"][0]
    assert (row["shape"], row["checked_at"]) == ("b=2,h=4,hkv=2,n=64,d=16", "b=1,h=2,hkv=1,n=64,d=16")


def test_json_on_standard_output_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"]["torch"] == torch.__version__
    assert found["backend"]["torch on cpu"] == "usable"


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "list.json"
    assert main(["list", "flash_attention", "--json", str(target)]) == 0
    (operator,) = json.loads(target.read_text())
    backends = {row["backend"]: row for row in operator["backends"]}
    assert set(backends) == {"reference", "torch", "triton", "cuda"}
    assert backends["torch"]["dtypes"] == ["fp16", "bf16", "fp32", "fp64"]
    assert backends["torch"]["refusals"]["cpu"] is None
    printed = capsys.readouterr().out
    assert "docs/ops/flash_attention.md" in printed
    assert "flash-attn" in printed


def test_why_triton_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "a sentence about Triton"
    monkeypatch.setattr(machine, "backend_refusal", lambda backend, device: reason if backend == "triton" else None)
    assert main(["list"]) == 0
    assert reason in capsys.readouterr().out
    assert main(["check", "flash_attention", "--device", "cpu", "-k", "one query, one key", "--dtype", "fp16"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not here" in printed
    assert reason in printed
    assert main(["bench", "flash_attention", *SMALL, "--backend", "triton"]) == 0
    assert f"triton  refused: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none"], "there is no operator 'none'"),
        (["check", "-k", "no such point"], "no point named like"),
        (["check", "--backend", "cuda"], " has no backend 'cuda'"),
        (["bench", "none"], "there is no operator 'none'"),
        (["bench", "flash_attention", "--shape", "z=1"], "has no dimension 'z'"),
        (["bench", "flash_attention", "--suite", "none"], "has no suite 'none'"),
        (["bench", "flash_attention", "--suite", "quick", "--shape", "n=1"], "exclude each other"),
        (
            ["bench", "flash_attention", "--suite", "quick", "--sweep", "n=1,2"],
            "--sweep and --suite exclude each other",
        ),
        (["bench", "flash_attention", "--sweep", "z=1,2"], "has no dimension 'z'"),
        (["bench", "flash_attention", "--md", "/no/such/folder/x.md"], "there is no folder /no/such/folder"),
        (["bench", "flash_attention", "--baseline", "none"], "--baseline is 'none'"),
        (["bench", "flash_attention", "--seconds", "0"], "must be more than 0"),
        (["bench", "flash_attention", "--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["bench"], "OP"),
        (["bench", "flash_attention", "--dtype", "int8"], "'int8' is not one of fp16, bf16, fp32, fp64"),
        (["bench", "flash_attention", "--pass", "all"], "'all' is not one of fwd, bwd, both"),
        (["check", "--backend", "none"], "'none' is not one of reference, torch, triton, cuda"),
    ],
)
def test_what_the_parser_rejects(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.without_gpu
@pytest.mark.parametrize("command", [["check"], ["bench", "flash_attention"]])
def test_a_gpu_that_is_asked_for_and_absent(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--device", "cuda"]) == 3
    assert "no CUDA GPU" in capsys.readouterr().err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from iokernels.bench.commands import env

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "collect", interrupt)
    assert main(["env"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_parser_needs_no_drawing_library() -> None:
    """matplotlib is optional, and slow to import: only ``--plot`` may load it."""
    assert main(["list"]) == 0
    assert "matplotlib.pyplot" not in sys.modules
