"""Copying over a long gap: what a convolution as long as the sequence remembers, and a short window cannot.

    python docs/examples/long_range.py --short        # a minute or two on two CPU cores
    python docs/examples/long_range.py --length 1024  # a longer gap

A sequence begins with a few symbols to remember, goes on with random ones that do not matter, and ends with as many
marks, at which the model has to say the first symbols again. Everything between is noise, so guessing gets one in eight
right. The same small model is trained three times: with Hyena operators (gates and implicit long filters), with plain
long convolutions, and with attention to a window of recent positions. Two layers of the window reach back 62 positions,
and the symbols lie further back than that.

Read from top to bottom: the mixers, the model, the task, the training, what is printed and drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import iokernels

# ---- 1. Mixers: what moves information along the sequence -----------------------------------------------------------

WINDOW = 31
"""How many earlier positions the attention of the baseline sees."""


class WindowAttention(nn.Module):
    """Causal attention to the last positions only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = iokernels.nn.FlashAttention(
            width, 4, bias=False, batch_first=True, causal=True, window=(WINDOW, 0)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def hyena(width: int, length: int) -> nn.Module:
    """Windows that hardly decay, and features fine enough to tell one lag from the next."""
    options = {"hidden": 32, "bands": length // 4, "omega": 1.0, "slow": 0.0, "fast": 3.0}
    return iokernels.nn.HyenaOperator(width, length, filter_options=options)


MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "hyena": hyena,
    "long conv": lambda width, length: iokernels.nn.LongConv(width, length, squash=1e-3),
    "window": lambda width, length: WindowAttention(width),
}
"""Each makes, of a width E and a length N, a causal module from ``[B, N, E]`` to ``[B, N, E]``."""


# ---- 2. The model: the same for every mixer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """One run. The default takes a few minutes on two CPU cores; ``SHORT`` is for less."""

    length: int = 512
    payload: int = 12  # symbols to remember
    symbols: int = 8
    steps: int = 600
    batch: int = 32
    width: int = 48
    layers: int = 2
    learning_rate: float = 4e-3
    seed: int = 0
    device: str = "cpu"


SHORT = Settings(length=256, payload=8, steps=300, width=32)


class Block(nn.Module):
    """Mix along the sequence, then think at each position; both read a normalised copy and add to the stream."""

    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Copier(nn.Module):
    """Symbols and marks ``[B, N]`` (int64) to logits of the symbol to say, ``[B, N, symbols]``."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.embed = nn.Embedding(settings.symbols + 1, width)
        self.blocks = nn.Sequential(
            *(Block(MIXERS[name](width, settings.length), width) for _ in range(settings.layers))
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, settings.symbols)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(text))))


# ---- 3. The task ----------------------------------------------------------------------------------------------------


def examples(settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch: sequences ``[B, N]`` and the symbols to say at the end of each, ``[B, payload]``."""
    text = torch.randint(settings.symbols, (settings.batch, settings.length), generator=generator)
    wanted = text[:, : settings.payload].clone()
    text[:, settings.length - settings.payload :] = settings.symbols  # the mark
    return text.to(settings.device), wanted.to(settings.device)


def score(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """The loss over what has to be said, and the share of it that is right."""
    text, wanted = batch
    logits = model(text)[:, -wanted.shape[1] :]
    right = (logits.argmax(-1) == wanted).float().mean().item()
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), right


# ---- 4. Training ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run leaves. ``accuracy`` has (steps done, share of fresh symbols said right)."""

    mixer: str
    parameters: int
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def train(
    name: str, settings: Settings, progress: Callable[[int, float], None] = lambda step, right: None
) -> tuple[nn.Module, Result]:
    """Train the model with the mixer ``name``. ``progress`` hears the step and how much of its batch was right.

    No sequence comes twice, so what is right is right for new ones.
    """
    torch.manual_seed(settings.seed)
    model = Copier(name, settings).to(settings.device)
    result = Result(name, sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    begun, look, heard = time.perf_counter(), max(1, settings.steps // 40), []
    for step in range(1, settings.steps + 1):
        loss, right = score(model, examples(settings, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        heard.append(right)
        if step % look == 0 or step == settings.steps:
            result.accuracy.append((step, sum(heard) / len(heard)))
            heard = []
        progress(step, right)
    result.seconds = time.perf_counter() - begun
    return model, result


@torch.no_grad()
def reach(model: nn.Module, settings: Settings) -> Tensor:
    """How much the last answer changes, on average, when the symbol at each position does: ``[N]``."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    text, _ = examples(replace(settings, batch=1), generator)
    changed = text.repeat(settings.length, 1)
    spot = torch.arange(settings.length, device=text.device)
    changed[spot, spot] = (changed[spot, spot] + 1) % settings.symbols
    before, after = (torch.log_softmax(model(x)[:, -1], -1) for x in (text, changed))
    return (after - before).abs().mean(-1).cpu()


# ---- 5. Showing it --------------------------------------------------------------------------------------------------


def table(results: Sequence[Result], settings: Settings) -> Table:
    """One row a mixer."""
    title = f"copying {settings.payload} symbols over {settings.length - 2 * settings.payload} of noise"
    shown = Table(title=f"{title}: guessing gets {1 / settings.symbols:.1%} right")
    for column in ("mixer", "parameters", "right", "seconds"):
        shown.add_column(column, justify="left" if column == "mixer" else "right")
    for result in results:
        right = f"{result.accuracy[-1][1]:.1%}"
        shown.add_row(result.mixer, f"{result.parameters:,}", right, f"{result.seconds:.0f}")
    return shown


def plot(results: Sequence[Result], reaches: Sequence[Tensor], settings: Settings, path: Path) -> bool:
    """Draw accuracies, and where the last answer looks, to ``path``; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    learning, looking = figure.subplots(1, 2)
    for result, reached in zip(results, reaches, strict=True):
        learning.plot(*zip(*result.accuracy, strict=True), label=result.mixer)
        looking.semilogy(range(1, settings.length + 1), reached.clamp(min=1e-6).flip(0), label=result.mixer, alpha=0.8)
    learning.axhline(1 / settings.symbols, color="grey", linestyle=":", linewidth=1)
    learning.text(
        0.85, 1 / settings.symbols, "guessing", color="grey", va="top", transform=learning.get_yaxis_transform()
    )
    learning.set(xlabel="step", ylabel="symbols right", title=f"Copying over {settings.length} positions")
    looking.set(xlabel="positions back", ylabel="change of the answer", title="Where the last answer looks")
    learning.legend()
    figure.savefig(path, dpi=150)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the named mixers on the same sequences, and show what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixer", nargs="+", default=list(MIXERS), choices=list(MIXERS), help="one or several")
    parser.add_argument("--short", action="store_true", help="a minute or two on two CPU cores")
    parser.add_argument("--length", type=int, help="positions of a sequence")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/long_range"), help="for copying.png and results.json")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, to stdout")
    asked = parser.parse_args(arguments)
    settings = replace(SHORT if asked.short else Settings(), seed=asked.seed, device=asked.device)
    given = {name: getattr(asked, name) for name in ("length", "steps") if getattr(asked, name) is not None}
    settings = replace(settings, **given)
    if settings.steps < 1:
        parser.error(f"--steps is {settings.steps}; it must be at least 1")
    farthest = settings.layers * WINDOW
    if settings.length < farthest + 2 * settings.payload:
        parser.error(f"--length is {settings.length}; the window would reach across a gap so short")

    console = Console(stderr=asked.json)
    results: list[Result] = []
    reaches: list[Tensor] = []
    said_last = TextColumn("{task.fields[said]}")
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), said_last, TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        for name in dict.fromkeys(asked.mixer):
            bar = bars.add_task(name, total=settings.steps, said="")

            def said(step: int, right: float, bar=bar) -> None:
                bars.update(bar, completed=step, said=f"{right:.0%} right")

            model, result = train(name, settings, said)
            results.append(result)
            reaches.append(reach(model, settings))

    console.print(table(results, settings))
    report = {
        "settings": asdict(settings), "torch": torch.__version__, "python": sys.version.split()[0],
        "results": [asdict(result) for result in results],
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(report, indent=1))
    drawn = plot(results, reaches, settings, asked.out / "copying.png")
    said_drawn = "copying.png" if drawn else "and no plot: matplotlib is not installed"
    console.print(f"In {asked.out}: results.json, {said_drawn}")
    if asked.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
