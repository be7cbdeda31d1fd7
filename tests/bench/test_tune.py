"""``iokernels tune``: the dry run for real, and tuning itself in the interpreter on a clock that we set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import iokernels
from iokernels import autotune
from iokernels.autotune import tables
from iokernels.autotune.resources import Resources
from iokernels.autotune.search import shortlist
from iokernels.bench.cli import main, parser
from iokernels.bench.commands import tune
from iokernels.bench.commands.tune_job import pack, unpack
from iokernels.bench.commands.tune_table import Plan
from iokernels.bench.timing.measure import Call
from iokernels.ops import CASES
from iokernels.ops.flash_attention.triton.tuning import Config
from iokernels.runtime import device as devices
from iokernels.runtime.cuda import ahead
from iokernels.runtime.device import named
from iokernels.testing.case import load

H100 = named("h100-sxm")
CPU = torch.device("cpu")
SHAPE = "b=1,h=2,n=64,d=16,causal=1"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tables, "user", lambda: tmp_path)
    autotune.forget()
    yield tmp_path
    autotune.forget()


class LaunchClock:
    """A call takes as long as the configuration that it launches is said to."""

    def __init__(self, kernel: str, seconds: dict[Config, float]) -> None:
        self.kernel, self.seconds = kernel, seconds

    def sampler(self, call: Call, *, capturable: bool) -> tuple[Callable[[], float], str]:
        with autotune.watch() as seen:
            call()
        cost = self.seconds[seen[self.kernel]]  # type: ignore[index]
        return lambda: cost, "fake"

    def peak_bytes(self, call: Call) -> int | None:
        return None


def items(*more: str) -> list[tune.Item]:
    return items_of("flash_attention", "--shape", SHAPE, "--dtype", "fp32", *more)


def items_of(operator: str, *more: str) -> list[tune.Item]:
    case = load(operator)
    assert case.tuning is not None
    return tune._items(case, case.tuning, parser().parse_args(["tune", operator, *more]), H100)


def plan(item: tune.Item, *configs: Config) -> Plan:
    resources: Any = Resources(item.kernel, 64, 0, 1024, 4, b"")
    funnel = item.tunable.space.explain(item.problem, H100)
    chosen = [item.tunable.default(item.problem), *configs]
    return Plan(item.kernel, item.shape, item.dtype, funnel, chosen, [None] * len(chosen), [resources] * len(chosen))


@pytest.mark.without_gpu
def test_without_a_gpu_it_says_so_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "flash_attention"]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "iokernels tune: there is no CUDA GPU to time kernels on; --dry-run shows without one what would be tried\n"
    )


def test_a_gpu_that_is_not_here_is_not_tuned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "current", lambda: H100)
    assert main(["tune", "flash_attention", "--gpu", "b200"]) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--kernel", "x"], "--kernel: flash_attention has flash_attention_fwd,"),
        (
            ["--kernel", "flash_attention_fwd", "--backend", "cuda"],
            "--kernel: flash_attention has flash_attention_cuda_fwd,",
        ),
        (["--dtype", "fp32", "--backend", "cuda"], "--dtype: the kernels of flash_attention do not take fp32"),
        (["--dtype", "fp64"], "--dtype: the kernels of flash_attention do not take fp64"),
        (["--suite", "quick", "--shape", "n=8"], "--shape and --suite exclude each other"),
        (["--shape", "x=8"], "flash_attention has no dimension 'x'"),
    ],
)
def test_usage_errors(
    more: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "INTERPRET", False)
    assert main(["tune", "flash_attention", "--dry-run", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.interpreted
def test_interpreted_kernels_are_not_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "flash_attention", "--dry-run"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_the_dry_run_compiles_without_a_gpu(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "iokernels", "tune", "flash_attention", "--gpu", "h100-sxm", "--dry-run",
         "--kernel", "flash_attention_fwd", "--shape", "d=16", "--top", "1", "--json", str(target)],
        capture_output=True, text=True, env=environment | {"COLUMNS": "200"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "axes 300 -> a score a thread 296 -> registers" in done.stdout
    assert "-> compiled 2, the first by bytes and the default, 0 spill" in done.stdout
    (row,) = json.loads(target.read_text())["rows"]
    funnel = row["funnel"]
    assert funnel["total"] - sum(funnel["removed"].values()) == funnel["left"] > 0
    best, default = sorted(row["candidates"], key=lambda one: one["default"])
    assert 32 <= default["registers"] <= 255
    assert 0 < best["shared_bytes"] <= H100.smem_block
    assert 0 < best["bytes"] <= default["bytes"]


@pytest.mark.parametrize("operator", [name for name in CASES if load(name).tuning is not None])
def test_every_tunable_kernel_is_ranked_by_the_account_of_its_operator(operator: str) -> None:
    found = items_of(operator, "--dry-run")
    assert found
    for item in found:
        nbytes = tune.bytes_moved(item, H100)
        assert nbytes is not None, item.kernel
        default, *tried = shortlist(item.tunable, item.problem, H100, 4, nbytes)
        assert default == item.tunable.default(item.problem)
        moved = [nbytes(config) for config in tried]
        assert moved == sorted(moved)
        assert min([*moved, nbytes(default)]) > 0
        assert not moved or moved[0] <= nbytes(default)


def test_no_account_means_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = items("--kernel", "flash_attention_fwd")
    assert tune.bytes_moved(item, H100) is not None
    monkeypatch.setitem(item.case.__dict__, "accounts", None)
    assert tune.bytes_moved(item, H100) is None


IN_CUDA = {
    case.operator: {kernel for kernel, one in case.tuning.tunables.items() if one.backend == "cuda"}
    for case in map(load, CASES)
    if case.tuning is not None
}
"""The kernels in CUDA C++ that can be tuned, by the case that tunes them."""


@pytest.mark.parametrize("operator", [name for name, kernels in IN_CUDA.items() if kernels])
def test_kernels_in_cuda_are_tuned_like_the_others(operator: str) -> None:
    """All are reached, have configurations besides the default, and a table that finds their problem again."""
    points = [word for point in load(operator).check_points() for word in ("--shape", str(point.shape))]
    found = items_of(operator, "--backend", "cuda", "--dtype", "fp16,bf16", *points)
    assert {item.kernel for item in found} == IN_CUDA[operator]
    for item in found:
        tried = list(shortlist(item.tunable, item.problem, H100, 4))
        assert item.tunable.default(item.problem) in tried
        assert all(item.tunable.space.refusal(item.problem, H100, config) is None for config in tried)
    assert any(len(list(shortlist(item.tunable, item.problem, H100, 4))) > 1 for item in found)


def test_no_tunable_kernel_in_cuda_is_left_out() -> None:
    rooms = [path.parts[-3] for path in Path(iokernels.__file__).parent.glob("ops/*/cuda/tuning.py")]
    assert rooms
    for room in rooms:
        module = import_module(f"iokernels.ops.{room}.cuda.tuning")
        own = set(module.TUNABLES) if hasattr(module, "TUNABLES") else {module.TUNABLE.kernel}
        assert own <= set().union(*IN_CUDA.values()), room


@pytest.mark.skipif(ahead.refusal() is not None, reason=ahead.refusal() or "")
def test_the_dry_run_needs_no_triton_for_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def compiling(jobs: list[Any], compile_one: Callable[[Any], Any], workers: int) -> Iterator[Any]:
        yield ((position, compile_one(job)) for position, job in enumerate(jobs))

    monkeypatch.setattr(tune, "compiling", compiling)
    monkeypatch.setattr(devices, "has_triton", lambda: False)
    command = ["tune", "lean_attention", "--gpu", "l40s", "--dry-run", "--shape", "b=2,h=4,nk=200,d=16", "--top", "0"]
    assert main([*command, "--backend", "cuda", "--json", str(tmp_path / "plan.json")]) == 0
    (row,) = json.loads((tmp_path / "plan.json").read_text())["rows"]
    (default,) = row["candidates"]
    assert row["kernel"] == "lean_attention_cuda"
    assert 32 <= default["registers"] <= 255
    assert default["spill_bytes"] == 0
    assert 0 < default["shared_bytes"] <= named("l40s").smem_block
    monkeypatch.setattr(devices, "INTERPRET", False)
    assert main(command) == 2
    assert "Triton is not installed; without it, --backend cuda tunes" in capsys.readouterr().err


def test_a_gpu_model_travels_to_another_process() -> None:
    import pickle

    assert unpack(pickle.loads(pickle.dumps(pack(H100)))) == H100


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", ["flash_attention_fwd", "flash_attention_bwd_dkv"])
def test_the_winner_is_written_and_then_launched(kernel: str, root: Path) -> None:
    (item,) = items("--kernel", kernel)
    better = Config(32, 32, 4, 1)
    default = item.tunable.default(item.problem)
    assert better != default
    clock = LaunchClock(kernel, {better: 1e-3, default: 2e-3, Config(16, 32, 4, 1): 3e-3})
    found = tune.tune_item(item, H100, plan(item, Config(16, 32, 4, 1), better), CPU, clock, 1.0, root)
    assert (found.winner.config, found.winner.gain) == (better, 2.0)
    (entry,) = tables.load(item.tunable, H100, root).entries  # type: ignore[union-attr]
    assert entry.facts == {"ms": 1.0, "gain": 2.0, "registers": 64, "shared_bytes": 1024, "spill_bytes": 0}
    with autotune.watch() as seen:
        autotune.select(item.tunable, item.problem, H100)
    assert seen == {kernel: better}


@pytest.mark.interpreted
def test_a_candidate_with_wrong_results_does_not_win(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = items("--kernel", "flash_attention_fwd")
    bad, default = Config(32, 32, 4, 1), item.tunable.default(item.problem)
    run = item.case.run

    def broken(inputs: Any, backend: str) -> Any:
        with autotune.watch() as seen:
            outputs = run(inputs, backend)
        return {name: x * 1.03 for name, x in outputs.items()} if seen.get(item.kernel) == bad else outputs

    object.__setattr__(item.case, "run", broken)
    try:
        clock = LaunchClock(item.kernel, {bad: 1e-3, default: 2e-3})
        monkeypatch.setattr(tune, "_launch", lambda item, device: lambda: run(_inputs(item), "triton"))
        found = tune.tune_item(item, H100, plan(item, bad), CPU, clock, 1.0, root)
    finally:
        object.__setattr__(item.case, "run", run)
    assert (found.winner.config, found.winner.gain) == (default, 1.0)
    assert "times what its precision allows" in found.winner.faults[bad]


def _inputs(item: tune.Item) -> Any:
    return item.case.make_inputs(item.shape, item.dtype, CPU, 0)


def test_what_is_done_is_not_done_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = items()
    assert [item.kernel for item in every] == [f"flash_attention_{name}" for name in ("fwd", "bwd_dq", "bwd_dkv")]

    def todo(**flags: bool) -> list[str]:
        chosen = tune.wanted(every, H100, root, **({"stale": False, "again": False} | flags))
        return [item.kernel.removeprefix("flash_attention_") for item in chosen]

    assert todo() == ["fwd", "bwd_dq", "bwd_dkv"]
    entry = tables.Entry(every[0].key, {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1})
    tables.save(every[0].tunable, H100, root, [entry])
    assert todo() == ["bwd_dq", "bwd_dkv"]
    assert todo(stale=True) == []
    assert todo(again=True) == ["fwd", "bwd_dq", "bwd_dkv"]
    monkeypatch.setattr(tables, "toolchain", lambda: {"triton": "99"})
    assert todo(stale=True) == ["fwd"]
    assert todo() == ["fwd", "bwd_dq", "bwd_dkv"]


def test_a_problem_is_tuned_once() -> None:
    assert len(items("--shape", SHAPE)) == 3
    assert len(items("--shape", SHAPE.replace("64", "60"))) == 3  # lengths are rounded up
    assert len(items("--shape", SHAPE.replace("64", "65"))) == 6


@pytest.mark.interpreted
def test_an_interrupted_run_keeps_what_is_done(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second kernel: the first is on disk, and the next run begins with the second."""
    every = items()

    class Interrupting(LaunchClock):
        def sampler(self, call: Call, *, capturable: bool) -> tuple[Callable[[], float], str]:
            if not capturable:  # a backward kernel
                raise KeyboardInterrupt
            return super().sampler(call, capturable=capturable)

    default = every[0].tunable.default(every[0].problem)
    monkeypatch.setattr(tune, "clock_for", lambda device: Interrupting(every[0].kernel, {default: 1e-3}))
    monkeypatch.setattr(tune.machine, "pick_device", lambda name: CPU)
    monkeypatch.setattr(tune, "_plans", lambda some, *_: [plan(item) for item in some])
    arguments = parser().parse_args(["tune", "flash_attention", "--budget", "60"])
    with pytest.raises(KeyboardInterrupt):
        tune._tune(every, H100, 1, arguments, Console(quiet=True))
    assert [item.kernel for item in tune.wanted(every, H100, root, stale=False, again=False)] == [
        "flash_attention_bwd_dq",
        "flash_attention_bwd_dkv",
    ]


@pytest.mark.interpreted
def test_a_spent_budget_leaves_the_rest_for_the_next_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.machine, "pick_device", lambda name: CPU)
    monkeypatch.setattr(tune, "_plans", lambda some, *_: [plan(item) for item in some])
    arguments = parser().parse_args(["tune", "flash_attention", "--budget", "0"])
    assert tune._tune(items(), H100, 1, arguments, Console(quiet=True)) == ([], 0)
    assert list(root.iterdir()) == []
