"""Counting modulo five, which a recurrent network learns and linear attention with positive eigenvalues does not.

    python docs/examples/state_tracking.py
    python docs/examples/state_tracking.py --seed 1 --steps 400

Models read strings of digits from 0 to 4 and say after each the sum so far, modulo five. An LSTM and an sLSTM compute
the next state from the last one by any function of it, so they can learn the rule "add the digit", and a rule holds for
any length: it is tried on strings of 160 digits, four times as long as any seen in training. The state of linear
attention only fades: its eigenvalues lie in (0, 1], so it sums up what it has read, and to turn a growing sum into a
remainder is left to the layers above, for the sums they have seen (Merrill et al., 2024, "The Illusion of State in
State-Space Models", arXiv:2404.08819; Grazzi et al., 2024, arXiv:2411.12537).

Read from top to bottom: the models, the task, the training, what is printed. `parity.py` is its sibling for linear
recurrences with negative eigenvalues.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import iokernels

# ---- 1. The models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """One run."""

    steps: int = 600
    batch: int = 64  # strings in a step
    length: int = 40  # digits of a training string, at most
    growing: int = 500  # steps over which strings grow to that length
    lengths: tuple[int, ...] = (40, 80, 160)  # of the strings that are tried at the end
    tried: int = 256  # strings of each
    modulus: int = 5
    width: int = 32
    heads: int = 1
    layers: int = 1
    learning_rate: float = 2e-2
    seed: int = 0
    device: str = "cpu"


class CountingLSTM(nn.Module):
    """``nn.LSTM`` as a mixer from ``[B, N, E]`` to ``[B, N, E]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.lstm = iokernels.nn.LSTM(width, width, num_heads=heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "LSTM": CountingLSTM,
    "sLSTM": lambda width, heads: iokernels.nn.SLSTM(width, heads),
    "linear": lambda width, heads: iokernels.nn.LightningAttention(width, heads),
}
"""The mixers that are compared, by name: width and heads to a module from ``[B, N, E]`` to the same shape."""


class Layer(nn.Module):
    """A mixer and a small network at each position, which read normalised copies and add to the stream."""

    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def counting_model(name: str, settings: Settings) -> nn.Module:
    """Digits ``[B, N]`` (int64) to the logits of the sum after each, ``[B, N, modulus]``."""
    width = settings.width
    layers = (Layer(MODELS[name](width, settings.heads), width) for _ in range(settings.layers))
    head = nn.Linear(width, settings.modulus)
    return nn.Sequential(nn.Embedding(settings.modulus, width), *layers, nn.RMSNorm(width), head).to(settings.device)


# ---- 2. The task ----------------------------------------------------------------------------------------------------


def strings(count: int, length: int, modulus: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random digits ``[count, length]``, and the sum of each string up to each digit, modulo ``modulus``."""
    digits = torch.randint(modulus, (count, length), generator=generator)
    return digits, digits.cumsum(1) % modulus


def accuracy(model: Callable[[Tensor], Tensor], settings: Settings, length: int) -> Tensor:
    """The share of right answers after each digit of fresh strings, ``[length]``; a guess has 1 / modulus."""
    generator = torch.Generator().manual_seed(10_000 + settings.seed)
    digits, sums = strings(settings.tried, length, settings.modulus, generator)
    with torch.no_grad():
        found = model(digits.to(settings.device)).argmax(-1).cpu()
    return (found == sums).float().mean(0)


# ---- 3. Training ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run leaves."""

    name: str
    losses: list[float] = field(default_factory=list)  # cross-entropy of each step's batch; log(modulus) is a guess
    by_digit: dict[int, list[float]] = field(default_factory=dict)  # length of the strings to accuracy after each digit
    seconds: float = 0.0

    def last(self, length: int) -> float:
        """Accuracy after the last eighth of the digits of strings of ``length``."""
        end = self.by_digit[length][-max(1, length // 8) :]
        return sum(end) / len(end)


def string_length(settings: Settings, step: int) -> int:
    """Strings start with 3 digits and grow evenly: short ones teach the rule soonest."""
    return min(settings.length, 3 + (settings.length - 3) * step // max(1, settings.growing))


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up over 20 steps, times half a cosine down to a twentieth."""
    half_cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * min(1.0, (step + 1) / 20) * (0.05 + 0.95 * half_cosine)


def train(name: str, settings: Settings) -> Result:
    """Train one of :data:`MODELS`."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = counting_model(name, settings)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    result, begun = Result(name), time.perf_counter()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        digits, sums = strings(settings.batch, string_length(settings, step), settings.modulus, generator)
        logits = model(digits.to(settings.device))
        loss = F.cross_entropy(logits.flatten(0, 1), sums.flatten().to(settings.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result.losses.append(loss.item())
    result.by_digit = {length: accuracy(model, settings, length).tolist() for length in settings.lengths}
    result.seconds = time.perf_counter() - begun
    return result


# ---- 4. Showing it --------------------------------------------------------------------------------------------------


def table(results: Sequence[Result], settings: Settings) -> Table:
    """Accuracy by length; the last eighth of a string is where the longest memory is needed."""
    guess = 100 / settings.modulus
    shown = Table(
        title=f"right answers; by digits of a string, {settings.length} in training; a guess has {guess:.0f} %"
    )
    shown.add_column("model")
    for length in settings.lengths:
        shown.add_column(f"{length}, all", justify="right")
        shown.add_column("last 1/8", justify="right")
    shown.add_column("seconds", justify="right")
    for result in results:
        cells = []
        for length in settings.lengths:
            cells += [f"{100 * sum(result.by_digit[length]) / length:.1f} %", f"{100 * result.last(length):.1f} %"]
        shown.add_row(result.name, *cells, f"{result.seconds:.0f}")
    return shown


def plot(results: Sequence[Result], settings: Settings, path: Path) -> bool:
    """Write training losses and accuracies by digit to ``path``; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    training, test = figure.subplots(1, 2)
    longest = max(settings.lengths)
    for result in results:
        training.plot(range(1, len(result.losses) + 1), result.losses, label=result.name)
        test.plot(range(1, longest + 1), result.by_digit[longest], label=result.name)
    training.set(xlabel="step", ylabel="cross-entropy", title="Training")
    test.axvline(settings.length, color="grey", linestyle=":")
    test.text(settings.length, 0.1, " longest string in training", color="grey")
    test.axhline(1 / settings.modulus, color="grey", linestyle=":")
    title = f"Sums modulo {settings.modulus} of strings of {longest} digits"
    test.set(xlabel="digit", ylabel="right answers", ylim=(0.0, 1.02), title=title)
    training.legend()
    figure.savefig(path, dpi=150)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all models on the same strings, and show what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("build/state_tracking"), help="for state_tracking.png and results.json"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, to stdout")
    asked = parser.parse_args(arguments)
    settings = replace(Settings(), seed=asked.seed, device=asked.device)
    if asked.steps is not None:
        if asked.steps < 1:
            parser.error(f"--steps is {asked.steps}; it must be at least 1")
        settings = replace(settings, steps=asked.steps)

    console = Console(stderr=asked.json)
    results: list[Result] = []
    for name in MODELS:
        with console.status(f"training: {name}"):
            results.append(train(name, settings))
    console.print(table(results, settings))
    report = {
        "settings": asdict(settings), "torch": torch.__version__, "python": sys.version.split()[0],
        "results": [asdict(result) for result in results],
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(report, indent=1))
    drawn = plot(results, settings, asked.out / "state_tracking.png")
    console.print(
        f"In {asked.out}: results.json, "
        + ("state_tracking.png" if drawn else "and no plot: matplotlib is not installed")
    )
    if asked.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
