"""A byte-level language model whose sequence mixer is one of iokernels' modules.

    python docs/examples/language_model.py --mixer flash --short
    python docs/examples/language_model.py --mixer all          # every mixer on the same data: one table

The text is the standard library of the Python that runs this: its sources, with their docstrings, and the language
reference that ``help()`` shows. One file in twelve is held out. The model reads bytes and predicts the next one, so its
loss in bits is the size to which it would compress a byte of text that it has never seen: "bits per byte".

Read from top to bottom: the mixers, the model around them, the text, the training, what is measured, what is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import iokernels

# ---- 1. Mixers: what moves information along the sequence -----------------------------------------------------------


class SelfAttention(nn.Module):
    """Calls a module with the interface of ``torch.nn.MultiheadAttention`` on one causal sequence."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        # torch's module asks for the mask beside the hint that it is causal; ours does not read it.
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        return self.attention(x, x, x, attn_mask=future, is_causal=True, need_weights=False)[0]


class CachedAttention(nn.Module):
    """iokernels' attention: parallel over a training sequence, and one byte at a time from a cache of keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = iokernels.nn.DecodeAttention(width, heads, bias=False)

    def memory(self, capacity: int) -> iokernels.nn.KVCache:
        return self.attention.new_cache(1, capacity)

    def forward(self, x: Tensor, memory: iokernels.nn.KVCache | None = None) -> Tensor:
        if memory is not None:
            memory.extend(x.shape[1])
        return self.attention(x, memory)


class SparseAttention(CachedAttention):
    """The same in training; in evaluation each row attends to the keys that a search finds, and its nearest."""

    def __init__(self, width: int, heads: int) -> None:
        nn.Module.__init__(self)
        self.attention = iokernels.nn.HiPAttention(
            width, heads, bias=False, budget=32, sink=4, window=16, block_q=16
        )  # fmt: skip


class Recurrent(nn.Module):
    """A mixer with a state of fixed size: parallel over a training sequence, and from its state, byte by byte."""

    mixer: Any

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def memory(self, capacity: int) -> Any:
        return self.mixer.init_state(1)  # whatever the capacity

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        return self.mixer(x) if memory is None else self.mixer.step(x, memory)


class CachedLSTM(nn.Module):
    """An LSTM in heads, from torch.nn's interface: its memory is the pair (h, c), which each call replaces."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.lstm = iokernels.nn.LSTM(width, width, num_heads=heads, batch_first=True)

    def memory(self, capacity: int) -> list[Any]:
        return [None]  # whatever the capacity

    def forward(self, x: Tensor, memory: list[Any] | None = None) -> Tensor:
        memory = [None] if memory is None else memory
        out, memory[0] = self.lstm(x, memory[0])
        return out


Mixer = Callable[[int, int], nn.Module]
"""Makes, of a width E and a number of heads, a causal module from ``[B, N, E]`` to ``[B, N, E]``.

Such a module may remember what it read: then ``memory(capacity)`` makes an empty memory for one text, and called with
it, the module takes its input for what follows in that text.
"""

MIXERS: dict[str, Mixer] = {
    "flash": CachedAttention,
    "hip": SparseAttention,
    "sdpa": lambda width, heads: SelfAttention(nn.MultiheadAttention(width, heads, bias=False, batch_first=True)),
    "lightning": lambda width, heads: Recurrent(iokernels.nn.LightningAttention(width, heads)),
    "based": lambda width, heads: Recurrent(iokernels.nn.BasedAttention(width, heads, window=32)),
    "delta": lambda width, heads: Recurrent(iokernels.nn.GatedDeltaNet(width, heads, allow_neg_eigval=True)),
    "lstm": CachedLSTM,
    "slstm": lambda width, heads: Recurrent(iokernels.nn.SLSTM(width, heads)),
    "hyena": lambda width, heads: iokernels.nn.HyenaOperator(width, length=256),
}
"""Add an entry, and ``--mixer all`` compares it with the others."""


# ---- 2. The model: the same for every mixer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """One run. The default trains for a while; ``SHORT`` is for a laptop and a minute."""

    steps: int = 4000
    batch: int = 16  # sequences in a step
    context: int = 256  # bytes in a sequence
    width: int = 96
    heads: int = 4
    layers: int = 4
    learning_rate: float = 3e-3
    seed: int = 0
    generate: int = 600  # bytes of text to write at the end
    device: str = "cpu"


SHORT = Settings(steps=800, context=128, generate=300)


class Block(nn.Module):
    """Mix along the sequence, then think at each position; both read a normalised copy and add to the stream."""

    def __init__(self, mixer: Mixer, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mixer = mixer(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        x = x + (self.mixer(self.norm1(x)) if memory is None else self.mixer(self.norm1(x), memory))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Bytes ``[B, N]`` (int64) to the logits of the byte after each, ``[B, N, 256]``."""

    positions: Tensor

    def __init__(self, mixer: Mixer, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.bytes = nn.Embedding(256, width)
        # Waves, not learned vectors: "the byte before" is then one linear map for all positions, and soon found.
        angles = torch.arange(settings.context)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], dim=1))
        self.blocks = nn.Sequential(*(Block(mixer, width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)  # it starts by knowing nothing: 8 bits a byte

    def forward(self, text: Tensor, memories: Sequence[Any] | None = None, start: int = 0) -> Tensor:
        """With ``memories``, one a block, ``text`` is what follows the ``start`` bytes that they have seen."""
        x = self.bytes(text) + self.positions[start : start + text.shape[1]]
        for block, memory in zip(self.blocks, memories or [None] * len(self.blocks), strict=True):
            x = block(x, memory)
        return self.head(self.norm(x))

    def memories(self) -> list[Any] | None:
        """Empty ones for one text, or None where the mixer has none."""
        makers = [getattr(block.mixer, "memory", None) for block in self.blocks]
        return None if None in makers else [make(len(self.positions)) for make in makers if make is not None]


# ---- 3. The text, and what is known about it without a model --------------------------------------------------------


def python_text() -> tuple[Tensor, Tensor]:
    """The standard library as uint8 tensors, (training, held out), in the same order on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(
        (path for path in root.rglob("*.py") if not others.intersection(path.relative_to(root).parts)),
        key=lambda path: path.relative_to(root).as_posix(),
    )
    parts = [bytearray(), bytearray()]
    for number, path in enumerate(files):
        parts[number % 12 == 11] += path.read_bytes()
    train, heldout = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
    return train, heldout


def baselines(train: Tensor, heldout: Tensor) -> dict[str, float]:
    """Bits per held-out byte of two models that are tables of counts: of bytes, and of bytes after a byte."""
    singles = torch.bincount(train.long(), minlength=256).double() + 0.5
    unigram = -(singles / singles.sum()).log2()[heldout.long()].mean()
    pairs = torch.bincount(256 * train[:-1].long() + train[1:].long(), minlength=256 * 256).double() + 0.05
    pairs = pairs.view(256, 256)
    bigram = -(pairs / pairs.sum(1, keepdim=True)).log2()[heldout[:-1].long(), heldout[1:].long()].mean()
    return {"order 0": unigram.item(), "order 1": bigram.item()}


def random_windows(text: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Endless batches ``[batch, context + 1]`` of int64; the same for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    span = torch.arange(settings.context + 1)
    while True:
        starts = torch.randint(len(text) - settings.context, (settings.batch, 1), generator=generator)
        yield text[starts + span].long().to(settings.device)


# ---- 4. Training and its measures -----------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run leaves. Losses are bits per byte."""

    mixer: str
    parameters: int
    losses: list[float] = field(default_factory=list)  # of each step's batch
    heldout: list[tuple[int, float]] = field(default_factory=list)  # (steps done, bits per held-out byte)
    tokens_per_second: float = 0.0
    written_per_second: float | None = None  # bytes of the sample, from memory; None for a mixer without
    recomputed_per_second: float = 0.0  # the same, with the whole context computed for each byte
    seconds: float = 0.0
    sample: str = ""
    by_budget: list[tuple[int, float]] = field(default_factory=list)  # (keys selected, bits per held-out byte)


def bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean bits per byte of ``windows [B, N + 1]``; bfloat16 matrix products on a GPU."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.device.type == "cuda"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def heldout_bits(model: nn.Module, text: Tensor, settings: Settings, batches: int) -> float:
    """Bits per byte over windows spread evenly over ``text``."""
    model.eval()
    starts = torch.linspace(0, len(text) - settings.context - 1, batches * settings.batch).long()[:, None]
    windows = text[starts + torch.arange(settings.context + 1)].long()
    mean = sum(bits(model, part.to(settings.device)).item() for part in windows.chunk(batches)) / batches
    model.train()
    return mean


def bits_by_budget(model: LanguageModel, text: Tensor, settings: Settings, batches: int) -> list[tuple[int, float]]:
    """Bits per held-out byte of a model with sparse attention, for budgets up to all keys, with which it is dense.

    Beside the selected keys a row sees the first 4 and the latest 16. Rows in blocks of 16 share their keys, so the
    choice for a row knows the rows behind it in its block: a number here is a little too good, where one of them is of
    help.
    """
    attentions = [module for module in model.modules() if isinstance(module, iokernels.nn.HiPAttention)]
    found, usual = [], [attention.budget for attention in attentions]
    for budget in [2**power for power in range(3, settings.context.bit_length())]:
        for attention in attentions:
            attention.budget = budget
        found.append((budget, heldout_bits(model, text, settings, batches)))
    for attention, budget in zip(attentions, usual, strict=True):
        attention.budget = budget
    return found


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up over a twentieth of the run, then half a cosine down to a tenth."""
    warmup = max(1, settings.steps // 20)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    name: str,
    settings: Settings,
    text: tuple[Tensor, Tensor],
    progress: Callable[[int, float, float], None] = lambda step, loss, tokens_per_second: None,
) -> tuple[LanguageModel, Result]:
    """Train the model with the mixer ``name``. ``progress`` hears the step, its loss and the speed so far."""
    torch.manual_seed(settings.seed)
    model = LanguageModel(MIXERS[name], settings).to(settings.device)
    result = Result(name, sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    train_text, heldout_text = text
    begun, look, spent = time.perf_counter(), max(1, settings.steps // 8), 0.0
    for step, windows in enumerate(itertools.islice(random_windows(train_text, settings), settings.steps)):
        step_begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        loss = bits(model, windows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result.losses.append(loss.item())  # waits for the device, so that the clock below is right
        if step > 0:  # the first step compiles kernels
            spent += time.perf_counter() - step_begun
            result.tokens_per_second = step * settings.batch * settings.context / spent
        if (step + 1) % look == 0 and step + 1 < settings.steps:
            result.heldout.append((step + 1, heldout_bits(model, heldout_text, settings, batches=2)))
        progress(step + 1, result.losses[-1], result.tokens_per_second)
    result.heldout.append((settings.steps, heldout_bits(model, heldout_text, settings, batches=12)))
    if name == "hip":
        result.by_budget = bits_by_budget(model, heldout_text, settings, batches=4)
    result.sample, result.recomputed_per_second = generate(model, settings, remember=False)
    if model.memories() is not None:
        result.sample, result.written_per_second = generate(model, settings)
    result.seconds = time.perf_counter() - begun
    return model, result


@torch.no_grad()
def generate(
    model: LanguageModel,
    settings: Settings,
    prompt: bytes = b"    def ",
    temperature: float = 0.7,
    *,
    remember: bool = True,
) -> tuple[str, float]:
    """Text written byte by byte, and how many bytes a second.

    The model knows no position past its context: when that is full, it is read again from the middle. With
    ``remember``, and a mixer that can, each byte is read once between two such moments; else all of the context is
    computed anew for each byte, which is slow, and gives the same text.
    """
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    text, first, seen = list(prompt), 0, 0  # the context begins at byte `first`; `seen` of its bytes are remembered
    memories = model.memories() if remember else None
    begun = time.perf_counter()
    for _ in range(settings.generate):
        if len(text) - first > settings.context:
            first, seen = len(text) - (settings.context + 1) // 2, 0
            memories = model.memories() if remember else None
        unread = torch.tensor([text[first + seen :]], device=settings.device)
        logits = model(unread, memories, seen)[0, -1]
        if memories is not None:
            seen += unread.shape[1]
        chances = torch.softmax(logits.float().cpu() / temperature, -1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(text).decode(errors="replace"), settings.generate / (time.perf_counter() - begun)


# ---- 5. Showing it --------------------------------------------------------------------------------------------------


def table(results: Sequence[Result], known: dict[str, float]) -> Table:
    """One row a mixer, below the models without one."""
    shown = Table(
        title="bits per byte: 8 is no knowledge, lower is better",
        caption="order 0, 1: counts of bytes. written/s: bytes a second, from memory (recomputing)",
    )
    for column in ("mixer", "weights", "tokens/s", "training", "held out", "seconds", "written/s"):
        shown.add_column(column, justify="left" if column == "mixer" else "right")
    for name, value in known.items():
        shown.add_row(name, "", "", "", f"{value:.3f}", "", "", style="dim")
    for result in results:
        recent = result.losses[-max(1, len(result.losses) // 10) :]
        written = "-" if result.written_per_second is None else f"{result.written_per_second:,.0f}"
        shown.add_row(
            result.mixer, f"{result.parameters:,}", f"{result.tokens_per_second:,.0f}",
            f"{sum(recent) / len(recent):.3f}", f"{result.heldout[-1][1]:.3f}", f"{result.seconds:.0f}",
            f"{written} ({result.recomputed_per_second:,.0f})",
        )  # fmt: skip
    return shown


def budget_table(result: Result) -> Table:
    """Bits per held-out byte against the keys that sparse attention selects."""
    shown = Table(title=f"{result.mixer}: keys selected, beside the first 4 and the latest 16; the last row is dense")
    for column in ("budget", "held out"):
        shown.add_column(column, justify="right")
    for budget, value in result.by_budget:
        shown.add_row(str(budget), f"{value:.3f}")
    return shown


def plots(results: Sequence[Result], known: dict[str, float], folder: Path) -> list[str]:
    """Draw the loss curves and those of :func:`budget_table`. Returns the files' names: none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        losses = torch.tensor(result.losses)
        smooth = max(1, len(losses) // 40)
        (line,) = axes.plot(range(smooth - 1, len(losses)), losses.unfold(0, smooth, 1).mean(1).tolist(), alpha=0.5)
        axes.plot(*zip(*result.heldout, strict=True), "o-", color=line.get_color(), label=f"{result.mixer}, held out")
    for name, value in known.items():
        axes.axhline(value, color="grey", linestyle=":", linewidth=1)
        axes.text(0.01, value, f"{name} counts", color="grey", va="bottom", transform=axes.get_yaxis_transform())
    axes.set(xlabel="step", ylabel="bits per byte", title="Byte-level language model of Python's standard library")
    axes.legend()
    drawn = {"loss.png": figure}
    for result in results:
        if result.by_budget:
            drawn["budget.png"] = figure = Figure(figsize=(5, 3.5), layout="constrained")
            axes = figure.subplots()
            axes.plot(*zip(*result.by_budget, strict=True), "o-")
            axes.axhline(result.by_budget[-1][1], color="grey", linestyle=":", linewidth=1)
            axes.set(xlabel="keys selected", ylabel="bits per held-out byte", title="Trained dense, evaluated sparse")
            axes.set_xscale("log", base=2)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=150)
    return list(drawn)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the named mixers on the same text and seed, and show what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixer", nargs="+", default=["flash"], choices=[*MIXERS, "all"], help="one, several or all")
    parser.add_argument("--short", action="store_true", help="about a minute for a mixer on two CPU cores")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--context", type=int, help="bytes in a sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/language_model"), help="for loss.png and results.json")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, to stdout")
    asked = parser.parse_args(arguments)
    settings = replace(SHORT if asked.short else Settings(), seed=asked.seed, device=asked.device)
    for name, least in (("steps", 1), ("context", 16)):
        value = getattr(asked, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
        settings = replace(settings, **({} if value is None else {name: value}))
    names = list(MIXERS) if "all" in asked.mixer else list(dict.fromkeys(asked.mixer))

    console = Console(stderr=asked.json)
    text = python_text()
    known = baselines(*text)
    console.print(
        f"Text: {len(text[0]):,} bytes to train on, {len(text[1]):,} held out. "
        f"{settings.steps} steps of {settings.batch} x {settings.context} bytes on {settings.device}."
    )
    said_last = TextColumn("{task.fields[said]}")
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), said_last, TimeRemainingColumn())
    results: list[Result] = []
    with Progress(*columns, console=console) as bars:
        for name in names:
            bar = bars.add_task(name, total=settings.steps, said="")

            def heard(step: int, loss: float, speed: float, bar=bar) -> None:
                bars.update(bar, completed=step, said=f"{loss:.3f} bits, {speed:,.0f} tokens/s")

            results.append(train(name, settings, text, heard)[1])

    samples = (Panel(Text(result.sample), title=f"written by {result.mixer}") for result in results)
    budgets = (budget_table(result) for result in results if result.by_budget)
    console.print(Group(*samples, table(results, known), *budgets))
    report = {
        "settings": asdict(settings), "torch": torch.__version__, "python": sys.version.split()[0],
        "baselines": known, "results": [asdict(result) for result in results],
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(report, indent=1))
    pictures = " and ".join(plots(results, known, asked.out)) or "and no plot: matplotlib is not installed"
    console.print(f"In {asked.out}: results.json, {pictures}")
    if asked.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
