"""``iokernels`` on the command line: the parser. Each command is a module of its own, imported when it runs.

Exit codes: 0 all right, 1 a wrong result, 2 a usage error, 3 the device that was asked for is not here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rich.console import Console

from iokernels import __version__
from iokernels.bench.timing.machine import NoDeviceError
from iokernels.ops import CASES
from iokernels.runtime.device import KNOWN
from iokernels.runtime.dispatch import BACKENDS
from iokernels.testing.case import DTYPES, PASSES
from iokernels.testing.case.shape import UsageError

OK, WRONG, USAGE, NO_DEVICE, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    command = import_module(f"iokernels.bench.commands.{arguments.command}")
    console = Console(stderr=arguments.json == "-")  # JSON on standard output must stand there alone
    try:
        return command.run(arguments, console)
    except (UsageError, NoDeviceError) as error:
        print(f"iokernels {arguments.command}: {error}", file=sys.stderr)
        return NO_DEVICE if isinstance(error, NoDeviceError) else USAGE
    except KeyboardInterrupt:
        print(f"iokernels {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(
        prog="iokernels", description="Check, time and describe IO-aware sequence operators on this machine."
    )
    root.add_argument("--version", action="version", version=f"iokernels {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    env = commands.add_parser("env", help="this machine: devices, versions, usable backends, folders")
    _json(env)

    listing = commands.add_parser("list", help="every operator and backend, and whether it can run here")
    listing.add_argument("operators", nargs="*", metavar="OP", help=f"one of {', '.join(CASES)} (default: all)")
    _json(listing)

    check = commands.add_parser(
        "check",
        help="prove operators on this machine",
        description="Hold every backend against the float64 reference, forward and all gradients, on the GPU if "
        "there is one and else on the CPU, where Triton kernels run in Triton's interpreter and CUDA kernels in the "
        "emulator.",
    )
    check.add_argument("operators", nargs="*", metavar="OP", help=f"one of {', '.join(CASES)} (default: all)")
    check.add_argument("-k", "--option", metavar="TEXT", help="only the points whose name contains TEXT")
    check.add_argument("--quick", action="store_true", help="only a few points")
    check.add_argument("--dtype", type=_dtypes, metavar="A,B", help=f"of {', '.join(DTYPES)} (default: all)")
    _common(check)

    bench = commands.add_parser(
        "bench",
        help="time an operator beside what else could be called",
        description="Time every backend and every installed peer on the same inputs, after checking each against "
        "the float64 reference. A wrong result prints no speed.",
    )
    bench.add_argument("operator", metavar="OP", help=f"one of {', '.join(CASES)}")
    bench.add_argument("--shape", action="append", metavar="b=4,n=4k,...", help="may be given several times")
    bench.add_argument(
        "--sweep", action="append", metavar="n=1k:64k:x2",
        help="vary a dimension: start:stop:x2, start:stop:+step or a,b,c; goes with --shape",
    )  # fmt: skip
    bench.add_argument("--suite", help="a named list of shapes (default: quick on a CPU, train or the like on a GPU)")
    bench.add_argument("--dtype", type=_dtypes, metavar="A,B", help="default: fp32 on a CPU, bf16 on a GPU")
    bench.add_argument(
        "--pass", dest="passes", type=_passes, default=("fwd",), metavar="A,B",
        help="of fwd, bwd (backward alone) and both (one after the other) (default: fwd)",
    )  # fmt: skip
    bench.add_argument("--baseline", metavar="NAME", help="the row that the others are compared with")
    bench.add_argument("--seconds", type=float, default=0.5, help="time spent on each row (default: 0.5)")
    bench.add_argument(
        "--against",
        metavar="R.json|git:REV",
        help="compare with saved results, or with a revision timed in turn with this one",
    )
    bench.add_argument(
        "--fail-over", type=_share, metavar="5%", help="exit 1 if slower than --against by more (default: 5%%)"
    )
    bench.add_argument("--csv", metavar="FILE", help="write the rows as CSV")
    bench.add_argument("--md", metavar="FILE", help="write the tables as Markdown")
    bench.add_argument("--plot", metavar="FILE.png", help="draw speeds, over the first --sweep if there is one")
    bench.add_argument("--roofline", metavar="FILE.png", help="draw speed against arithmetic intensity")
    bench.add_argument("--html", metavar="FILE", help="write one page with tables and plots that needs nothing else")
    _common(bench)

    _describe_io(commands)
    _describe_inspect(commands)
    _describe_cubins(commands)
    _describe_tune(commands)
    return root


def _describe_io(commands: Any) -> None:
    io = commands.add_parser(
        "io",
        help="the bytes that an operator's kernels move: least, modelled, counted",
        description="Per kernel: each input read and each output written once (floor), what its tiling on a GPU should "
        "request (model), what its blocks did request in Triton's interpreter or in the emulator (count), and the "
        "bytes of the naive formula. Needs no GPU. A count other than the model is a wrong result.",
    )
    io.add_argument("operator", metavar="OP", help=f"one of {', '.join(CASES)}")
    io.add_argument("--backend", choices=("triton", "cuda"), default="triton", help="default: triton")
    io.add_argument("--shape", action="append", metavar="b=4,n=4k,...", help="may be given several times")
    io.add_argument("--suite", help="a named list of shapes (default: quick)")
    io.add_argument("--dtype", type=_dtypes, default=("bf16",), metavar="A,B", help="default: bf16")
    io.add_argument("--plot", metavar="FILE.png", help="draw bytes against on-chip memory (needs matplotlib)")
    _gpu(io)
    _json(io)


def _describe_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what an operator's compiled kernels take of a GPU",
        description="Compile the kernels of a call for a GPU, which need not be here, and read registers, spills, "
        "shared memory, blocks to an SM and matrix instructions from the machine code.",
    )
    inspect.add_argument("operator", metavar="OP", help=f"one of {', '.join(CASES)}")
    inspect.add_argument("--backend", choices=("triton", "cuda"), default="triton", help="default: triton")
    inspect.add_argument("--shape", action="append", metavar="b=4,n=4k,...", help="may be given several times")
    inspect.add_argument("--points", action="store_true", help="the points that compile every branch of every kernel")
    inspect.add_argument("--dtype", type=_dtypes, default=("bf16",), metavar="A,B", help="default: bf16")
    inspect.add_argument(
        "--pass", dest="passes", type=_passes, metavar="A,B", help="of fwd, bwd and both (default: all there is)"
    )
    _gpu(inspect)
    _json(inspect)


def _describe_cubins(commands: Any) -> None:
    cubins = commands.add_parser(
        "cubins",
        help="every CUDA kernel compiled ahead of time",
        description="Compile the CUDA kernels for every architecture, with the default configurations, by nvcc under "
        "ninja or else by NVRTC, and read registers, spills and shared memory from the machine code. Needs no GPU. A "
        "kernel that spills is a wrong result.",
    )
    cubins.add_argument("operators", nargs="*", metavar="OP", help=f"of {', '.join(CASES)} (default: all)")
    cubins.add_argument("--out", metavar="DIR", default="build/cubins", help="default: build/cubins")
    cubins.add_argument("--md", metavar="FILE", help="write the report as Markdown")
    _json(cubins)


def _describe_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure launch parameters on this GPU",
        description="Rank the configurations of every kernel by the bytes that they move, compile the first of them, "
        "time these in turn, prove the winner against the reference and write it to a table that later calls read. A "
        "run that is broken off keeps what is done, and the next one goes on from there.",
    )
    tune.add_argument("operator", metavar="OP", help=f"one of {', '.join(CASES)}")
    tune.add_argument("--shape", action="append", metavar="b=4,n=4k,...", help="may be given several times")
    tune.add_argument("--suite", help="a named list of shapes (default: train or the like; in a dry run one shape)")
    tune.add_argument("--dtype", type=_dtypes, default=("bf16",), metavar="A,B", help="default: bf16")
    tune.add_argument("--backend", choices=("triton", "cuda"), help="only the kernels of one (default: both)")
    tune.add_argument("--kernel", metavar="NAME", help="only this kernel")
    tune.add_argument("--gpu", choices=tuple(KNOWN), metavar="NAME", help=f"of {', '.join(KNOWN)} (default: this one)")
    tune.add_argument(
        "--dry-run", action="store_true", help="show what would be tried, compiled for --gpu; needs no GPU"
    )
    tune.add_argument("--top", type=int, metavar="N", help="candidates compiled for a kernel (default: 16; dry run: 4)")
    tune.add_argument("--budget", type=float, default=300.0, metavar="S", help="seconds in all (default: 300)")
    tune.add_argument("--stale", action="store_true", help="only entries that other versions were measured with")
    tune.add_argument("--again", action="store_true", help="also entries that are up to date")
    tune.add_argument(
        "--write", choices=("user", "package"), default="user",
        help="the user's cache folder, or the tables of this checkout (default: user)",
    )  # fmt: skip
    _json(tune)


def _gpu(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gpu",
        choices=tuple(KNOWN),
        default="h100-sxm",
        metavar="NAME",
        help=f"of {', '.join(KNOWN)} (default: h100-sxm)",
    )


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--backend", type=_backends, metavar="A,B", help=f"of {', '.join(BACKENDS)} (default: all)")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    command.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    _json(command)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': standard output)")


def _several(text: str, known: Sequence[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for part in found:
        if part not in known:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(known)}")
    return found


def _share(text: str) -> float:
    """``5%`` and ``0.05`` are the same."""
    try:
        share = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 5% or 0.05")
    return share


def _dtypes(text: str) -> tuple[str, ...]:
    return _several(text, tuple(DTYPES))


def _passes(text: str) -> tuple[str, ...]:
    return _several(text, PASSES)


def _backends(text: str) -> tuple[str, ...]:
    return _several(text, BACKENDS)
