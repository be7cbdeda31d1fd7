"""Time and memory against length: linear attention grows with the length, softmax attention with its square.

    python docs/examples/length.py                        # 1k to 32k tokens, on a CPU about a minute
    python docs/examples/length.py --lengths 1024 4096    # others

Each function mixes the same random sequence, forward only. On a CPU the time is that of the processor, in one thread,
so that other programs do not count; the least of a few calls. Its exponent e is the slope of a straight line through
(log tokens, log seconds): twice the tokens take 2 ** e times as long. Beside it stands what a decoder would have to
keep to go on from there: a state, or the keys and values of all tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import iokernels

HEADS, WIDTH, FEATURES = 2, 64, 16
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)

Call = Callable[[], tuple[Tensor, int]]
"""Mixes a sequence once. Returns the output, and the bytes that remember the sequence."""


@dataclass
class Curve:
    """What was measured of one function."""

    name: str
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    remembered: list[int] = field(default_factory=list)  # bytes

    @property
    def exponent(self) -> float:
        """Slope of the line of least squares through (log tokens, log seconds)."""
        x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (self.tokens, self.seconds))
        return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def calls(tokens: int, device: torch.device) -> dict[str, Call]:
    """Every function on one random sequence of this length, by name."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    q, k, v = (normal(1, HEADS, tokens, WIDTH) for _ in range(3))
    few_q, few_k = (normal(1, HEADS, tokens, FEATURES) for _ in range(2))
    slopes = iokernels.alibi_slopes(HEADS, device=device)
    unit, beta = torch.nn.functional.normalize(k, dim=-1), torch.sigmoid(normal(1, HEADS, tokens))

    def lightning() -> tuple[Tensor, int]:
        out, state = iokernels.lightning_attention(q, k, v, slopes=slopes, return_state=True)
        return out, state.nbytes

    def based() -> tuple[Tensor, int]:
        out, state = iokernels.linear_attention(
            few_q, few_k, v, feature_map="taylor", normalize=True, return_state=True
        )  # fmt: skip
        return out, state.nbytes

    def delta() -> tuple[Tensor, int]:
        out, state = iokernels.gated_delta_rule(q, unit, v, beta, return_state=True)
        return out, state.nbytes

    def flash() -> tuple[Tensor, int]:
        return iokernels.flash_attention(q, k, v, causal=True), k.nbytes + v.nbytes

    return {"lightning": lightning, "BASED": based, "delta rule": delta,
            "flash": flash}  # fmt: skip


@torch.no_grad()
def measure(
    lengths: Sequence[int],
    repeats: int,
    device: torch.device,
    progress: Callable[[str, int, float], None] = lambda name, tokens, seconds: None,
) -> list[Curve]:
    """A curve for each function. ``progress`` hears every point."""
    found: dict[str, Curve] = {}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for tokens in lengths:
        for name, call in calls(tokens, device).items():
            if device.type == "cuda" or tokens == lengths[0]:
                call()  # fills caches, and compiles kernels
            curve, seconds, remembered = found.setdefault(name, Curve(name)), [], 0
            for _ in range(repeats):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                begun = clock()
                _, remembered = call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(clock() - begun)
            curve.tokens.append(tokens)
            curve.seconds.append(min(seconds))
            curve.remembered.append(remembered)
            progress(name, tokens, min(seconds))
    return list(found.values())


def table(curves: Sequence[Curve]) -> Table:
    """Milliseconds of every function at every length, the exponent, and what the sequence left."""
    shown = Table(title=f"ms, forward, {HEADS} heads of width {WIDTH}, float32")
    shown.add_column("tokens", justify="right")
    for curve in curves:
        shown.add_column(curve.name, justify="right")
    for row, tokens in enumerate(curves[0].tokens):
        shown.add_row(f"{tokens:,}", *(f"{1e3 * curve.seconds[row]:,.1f}" for curve in curves))
    shown.add_section()
    shown.add_row("exponent", *(f"{curve.exponent:.2f}" for curve in curves))
    kept = [[f"{size / 1024:,.0f}" for size in (curve.remembered[0], curve.remembered[-1])] for curve in curves]
    shown.add_row("KB kept", *(last if first == last else f"{first} to {last}" for first, last in kept))
    return shown


def plot(curves: Sequence[Curve], path: Path) -> bool:
    """Write time and memory against length to ``path``; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve in curves:
        left.loglog(curve.tokens, curve.seconds, "o-", base=2, label=f"{curve.name}: {curve.exponent:.2f}")
        right.loglog(curve.tokens, curve.remembered, "o-", base=2)
    left.set(xlabel="tokens", ylabel="seconds", title="time, and its exponent", yscale="log")
    right.set(xlabel="tokens", ylabel="bytes", title="what a decoder keeps", yscale="log")
    left.legend()
    figure.savefig(path, dpi=150)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and show what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens, two lengths or more")
    parser.add_argument("--repeats", type=int, default=3, help="calls of which the fastest counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/length"), help="for length.png and results.json")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, to stdout")
    asked = parser.parse_args(arguments)
    lengths = sorted(set(asked.lengths))
    if len(lengths) < 2 or lengths[0] < 1:
        parser.error(f"--lengths is {asked.lengths}; a line takes two lengths or more, each at least 1")
    if asked.repeats < 1:
        parser.error(f"--repeats is {asked.repeats}; it must be at least 1")

    console = Console(stderr=asked.json)
    with console.status("measuring") as status:

        def said(name: str, tokens: int, seconds: float) -> None:
            status.update(f"{tokens:,} tokens: {name} {1e3 * seconds:,.1f} ms")

        if asked.device == "cpu":
            torch.set_num_threads(1)
        curves = measure(lengths, asked.repeats, torch.device(asked.device), said)
    console.print(table(curves))
    report = {
        "torch": torch.__version__, "python": sys.version.split()[0], "device": asked.device,
        "threads": torch.get_num_threads(), "heads": HEADS, "width": WIDTH,
        "curves": [asdict(curve) | {"exponent": curve.exponent} for curve in curves],
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(report, indent=1))
    drawn = plot(curves, asked.out / "length.png")
    console.print(
        f"In {asked.out}: results.json, {'length.png' if drawn else 'and no plot: matplotlib is not installed'}"
    )
    if asked.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
