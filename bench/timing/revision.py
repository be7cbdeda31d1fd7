"""This version of the library beside a revision of it from git, each in a process of its own, timed in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from iokernels.bench.report.rows import Row
from iokernels.bench.timing.compare import Comparison, interleaved
from iokernels.testing.case.shape import UsageError

ROOT = Path(__file__).resolve().parents[2]
"""The checkout that this file stands in, if it is one."""
_WORKER = Path(__file__).resolve().with_name("version_worker.py")
_BATCH = 10e-3
"""A sample repeats its call for about this many seconds: less would measure how processes wake up."""
_ROUNDS = (11, 101)
"""Fewest and most rounds."""


class VersionError(RuntimeError):
    """One of the two versions cannot do what was asked. The message is a sentence."""


def _git(*arguments: str, folder: Path) -> str:
    # Inside a git hook these variables name the repository of the hook.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=environment, check=True
        )
    except FileNotFoundError:
        raise UsageError("--against git:REV needs git, which is not installed") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["git failed"]
        raise UsageError(f"--against git:REV: {lines[-1].removeprefix('fatal: ')}") from None
    return done.stdout.strip()


@contextmanager
def worktree(revision: str, root: Path = ROOT) -> Iterator[Path]:
    """The files of a revision in a folder that lives as long as the context. Raises :class:`UsageError`."""
    if not (root / "pyproject.toml").exists():
        raise UsageError("--against git:REV needs a checkout of iokernels, and this is an installed package")
    commit = _git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}", folder=root)
    inside = _git("rev-parse", "--show-prefix", folder=root)
    with tempfile.TemporaryDirectory(prefix="iokernels-") as folder:
        place = Path(folder) / "tree"
        try:
            _git("worktree", "add", "--detach", str(place), commit, folder=root)
            yield place / inside
        finally:
            _git("worktree", "remove", "--force", str(place), folder=root)


class Worker:
    """The process that holds one version."""

    def __init__(self, root: Path) -> None:
        # Started through -c: as a script, its folder would be searched for modules before the standard library.
        start = f"import runpy; runpy.run_path({str(_WORKER)!r}, run_name='__main__')"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip

    def started(self) -> Worker:
        """Wait until the version is imported."""
        self._answer()
        return self

    def ask(self, **request: Any) -> dict[str, Any]:
        """One answer. Raises :class:`VersionError` with the sentence of a problem."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise VersionError(self._death()) from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise VersionError(self._death())
        answer = json.loads(line)
        if "problem" in answer:
            raise VersionError(answer["problem"])
        return answer

    def _death(self) -> str:
        return f"its process ended with exit code {self._process.wait()}"


class Revision:
    """A revision to compare with. ``seconds`` are spent on timing each version of a row."""

    def __init__(self, revision: str, operator: str, seed: int, device: torch.device, tolerated: float) -> None:
        self.label = f"git:{revision}"
        self._revision, self._operator, self._seed = revision, operator, seed
        self._device, self._tolerated = device, tolerated
        self._open = ExitStack()
        self._ours: Worker | None = None
        self._theirs: Worker | None = None

    def __enter__(self) -> Revision:
        try:
            place = self._open.enter_context(worktree(self._revision))
            self._ours, self._theirs = (self._worker(root) for root in (ROOT, place))
            for name, worker in (("this version", self._ours), (self.label, self._theirs)):
                try:
                    worker.started()
                except VersionError as error:
                    raise UsageError(f"--against: {name} does not start: {error}") from None
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _worker(self, root: Path) -> Worker:
        worker = Worker(root)
        self._open.callback(worker.close)
        return worker

    def compare(self, row: Row, seconds: float) -> Comparison:
        """Time a backend's row in both versions, on the same inputs."""
        assert self._ours is not None
        assert self._theirs is not None
        ours, theirs = self._ours, self._theirs
        request = {
            "do": "prepare", "operator": self._operator, "shape": str(row.need.shape),
            "dtype": str(row.need.dtype).removeprefix("torch."), "pass": row.need.which, "backend": row.name,
            "device": str(self._device), "seed": self._seed, "threads": torch.get_num_threads(), "warm": seconds / 5,
        }  # fmt: skip
        name = "this version"
        try:
            our_start = ours.ask(**request)
            name = "that revision"
            their_start = theirs.ask(**request)
        except VersionError as error:
            return Comparison(self.label, self._tolerated, reason=f"not compared: {name}: {error}")
        if our_start["digest"] != their_start["digest"]:
            return Comparison(self.label, self._tolerated, reason="not compared: it draws other inputs")
        both = our_start["wall"] + their_start["wall"]
        calls = int(min(max(2 * _BATCH / both, 1), 100))
        fewest, most = _ROUNDS
        rounds = int(min(max(2 * seconds / ((calls + 1) * both), fewest), most))

        def sampler(worker: Worker) -> float:
            return worker.ask(do="sample", calls=calls)["seconds"]

        try:
            return interleaved(
                lambda: sampler(ours), lambda: sampler(theirs), rounds, other=self.label, tolerated=self._tolerated
            )
        except VersionError as error:
            return Comparison(self.label, self._tolerated, reason=f"not compared: {error}")
