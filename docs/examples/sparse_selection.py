"""What hierarchical selection keeps, and what it costs, against length.

    python docs/examples/sparse_selection.py recall          # mass kept of synthetic attention, by selector
    python docs/examples/sparse_selection.py cost            # CPU time and bytes, 4k to 128k tokens: some minutes

``recall`` draws keys that resemble their neighbours (AR(1), correlation length L) and queries three times as long, and
reports the softmax mass that a selector's keys have, relative to that of the best keys of the block one by one: the
mean over rows of the worst text, and the worst row. It says how well a search searches, and nothing of a model.

``cost`` times :func:`iokernels.hip_attention` and dense attention on the backend ``torch``, one thread, one head,
processor time, the least of a few calls; and states the bytes that the Triton kernels request for 32 heads of queries
and 8 of keys, by the model that the tests hold to what the kernels do. The exponent is the slope of a straight line
through (log tokens, log cost), over all lengths and over the two longest.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import iokernels
from iokernels import BlockIndex, SelectionCache, select_exact, select_hip, select_quest
from iokernels.ops.hip_attention import case

# ---- 1. What is kept ------------------------------------------------------------------------------------------------

WIDTH, SINK, WINDOW = 128, 128, 1024


def walk(rows: int, width: int, length: float, generator: torch.Generator) -> Tensor:
    """A stationary AR(1) sequence ``[rows, width]`` of unit variance, whose correlation falls by e in ``length``."""
    keep = math.exp(-1.0 / length)
    x = torch.randn(rows, width, generator=generator) * math.sqrt(1.0 - keep**2)
    x[0] = torch.randn(width, generator=generator)
    for row in range(1, rows):
        torch.add(x[row], x[row - 1], alpha=keep, out=x[row])
    return x


SELECTORS: dict[str, Callable[..., BlockIndex]] = {
    "hip, stages 256/32/8": select_hip,
    "hip, global, blocks of 8": partial(select_hip, search="global"),
    "quest, pages of 16": select_quest,
    "quest, pages of 64": partial(select_quest, page=64),
    "exact, blocks of 8": select_exact,
}


def kept(p: Tensor, keys: Tensor) -> Tensor:
    """Mass of the keys ``[keys]`` or ``[rows, keys]``, and of sink and window, by row."""
    rows, total = p.shape
    position, number = torch.arange(rows)[:, None] + total - rows, torch.arange(total)
    always = ((number < SINK) | (number > position - WINDOW)) & (number <= position)
    return (p * (always | keys)).sum(-1)


def recall(tokens: int, budget: int, seeds: int, query_length: float) -> dict[str, tuple[float, float]]:
    """By selector: the least mean, and the least row, of the mass that is kept relative to the best keys of a block."""
    worst = dict.fromkeys([*SELECTORS, "random keys"], (1.0, 1.0))
    for length in (16, 32, 64):
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            k = walk(tokens, WIDTH, length, generator)[None, None]
            q = 3.0 * walk(64, WIDTH, query_length, generator)[None, None]
            for rows in (1, 64):
                logits = q[0, 0, -rows:].double() @ k[0, 0].double().T * WIDTH**-0.5
                later = torch.arange(tokens) > torch.arange(rows)[:, None] + tokens - rows
                p = torch.softmax(logits.masked_fill(later, float("-inf")), dim=-1)
                nothing = torch.zeros(tokens, dtype=torch.bool)
                candidates = p.clone()
                candidates[:, tokens - rows - WINDOW + 1 :] = 0.0
                best = kept(p, nothing.scatter(0, candidates.sum(0).topk(budget).indices, True))
                for name in worst:
                    if name in SELECTORS:
                        index = SELECTORS[name](q[:, :, -rows:], k, budget=budget, sink=SINK, window=WINDOW)
                        share = kept(p, index.to_mask(causal=True)[0, 0]) / best
                    else:
                        chance = torch.randperm(tokens, generator=generator)[:budget]
                        share = kept(p, nothing.scatter(0, chance, True)) / best
                    mean, row = worst[name]
                    worst[name] = min(mean, share.mean().item()), min(row, share.min().item())
    return worst


def drift(tokens: int, budget: int, steps: int) -> tuple[float, float]:
    """Mass that lists kept by ``SelectionCache((16, 8, 4))`` have, relative to a search in every step: least, mean."""
    generator = torch.Generator().manual_seed(0)
    k = walk(tokens, WIDTH, 32.0, generator)[None, None]
    q = 3.0 * walk(steps, WIDTH, 256.0, generator)[None, None]
    cache, shares = SelectionCache(), []
    for step in range(steps):
        now, seen = q[:, :, step : step + 1], k[:, :, : tokens - steps + step + 1]
        p = torch.softmax(now[0, 0].double() @ seen[0, 0].double().T * WIDTH**-0.5, dim=-1)
        lists = [select(now, seen, budget=budget, sink=SINK, window=WINDOW) for select in (cache.select, select_hip)]
        old, new = (kept(p, index.to_mask(causal=True)[0, 0]).item() for index in lists)
        shares.append(old / new)
    return min(shares), sum(shares) / steps


# ---- 2. What it costs -----------------------------------------------------------------------------------------------


def processor_seconds(call: Callable[[], object], repeats: int) -> float:
    """Processor time of a call, the least of ``repeats``."""
    taken = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        taken.append(time.process_time() - begun)
    return min(taken)


def exponent(tokens: Sequence[float], cost: Sequence[float]) -> float:
    """Slope of the line of least squares through (log tokens, log cost)."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (tokens, cost))
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def seconds(lengths: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Processor time of sparse and dense attention of one head, forward, causal, by length."""
    found: dict[str, list[float]] = {"dense": [], "hip_attention": [], "of which selection": []}
    for tokens in lengths:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, tokens, 64, generator=generator) for _ in range(3))
        calls: dict[str, Callable[[], object]] = {
            "dense": lambda: iokernels.flash_attention(q, k, v, causal=True),  # noqa: B023, called at once
            "hip_attention": lambda: iokernels.hip_attention(q, k, v),  # noqa: B023
            "of which selection": lambda: select_hip(q, k),  # noqa: B023
        }
        for name, call in calls.items():
            found[name].append(processor_seconds(call, repeats))
    return found


def moved(lengths: Sequence[int], decode: bool) -> dict[str, list[float]]:
    """Bytes that thread blocks request of an H100's memory, bf16, 32 query and 8 key heads of 128, by length."""
    found: dict[str, list[float]] = {"dense": [], "hip_attention": [], "of which selection": []}
    for tokens in lengths:
        rows = 1 if decode else tokens
        shape = case.VOCABULARY.parse(f"b=1,h=32,hkv=8,d=128,n={rows},nk={tokens}")
        configs = dict(case.attention_configs(shape, torch.bfloat16))
        account = case.accounts(shape, torch.bfloat16, configs)
        found["dense"].append(case.dense_bytes(shape, torch.bfloat16))
        found["hip_attention"].append(sum(kernel.model.total for kernel in account.values()))
        selecting = [kernel.model.total for name, kernel in account.items() if name.startswith("hip_attention")]
        found["of which selection"].append(sum(selecting))
    return found


# ---- 3. Showing it --------------------------------------------------------------------------------------------------


def cost_table(title: str, lengths: Sequence[int], curves: dict[str, list[float]], unit: float, digits: int) -> Table:
    """One row a curve: its cost at each length, and its exponents."""
    shown = Table(title=title, caption="exponent: over all lengths, and over the two longest")
    for column in ("", *(f"{tokens // 1024}k" for tokens in lengths), "exponent"):
        shown.add_column(column, justify="right" if column else "left")
    for name, values in curves.items():
        slopes = (
            f"{exponent(lengths, values):.2f}, {exponent(lengths[-2:], values[-2:]):.2f}" if len(values) > 1 else "-"
        )
        shown.add_row(name, *(f"{value / unit:,.{digits}f}" for value in values), slopes)
    return shown


def plot(lengths: Sequence[int], panels: dict[str, dict[str, list[float]]], path: Path) -> bool:
    """Write all curves to ``path``, one panel each; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(lengths, values, "o-", label=f"{name}: N^{exponent(lengths, values):.2f}")
        axes.set(xlabel="tokens", title=title, xscale="log", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("recall", "cost"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**power for power in range(12, 18)])
    parser.add_argument("--tokens", type=int, default=32768, help="of recall")
    parser.add_argument("--budget", type=int, default=2048, help="of recall")
    parser.add_argument("--seeds", type=int, default=4, help="texts of each correlation length")
    parser.add_argument("--query-length", type=float, default=256.0, help="rows over which queries change")
    parser.add_argument("--repeats", type=int, default=2, help="calls that are timed; the fastest counts")
    parser.add_argument(
        "--out", type=Path, default=Path("build/sparse_selection"), help="for cost.png and results.json"
    )
    asked = parser.parse_args(arguments)
    console, report = Console(), {"torch": torch.__version__, "asked": {k: str(v) for k, v in vars(asked).items()}}
    torch.set_num_threads(1)
    if asked.what == "recall":
        found = recall(asked.tokens, asked.budget, asked.seeds, asked.query_length)
        shown = Table(title=f"mass kept, of that of the best {asked.budget} of {asked.tokens} keys")
        for column in ("selector", "worst text", "worst row"):
            shown.add_column(column, justify="left" if column == "selector" else "right")
        for name, (mean, row) in found.items():
            shown.add_row(name, f"{mean:.3f}", f"{row:.3f}")
        least, mean = drift(asked.tokens, asked.budget, 64)
        console.print(
            shown, f"Lists kept by refresh (16, 8, 4): {least:.3f} of a new search at worst, {mean:.3f} mean."
        )
        report |= {"recall": found, "drift": (least, mean)}
    else:
        panels = {
            "processor seconds, one head of 64": seconds(asked.lengths, asked.repeats),
            "bytes of a prompt": moved(asked.lengths, False),
            "bytes of a step of decoding": moved(asked.lengths, True),
        }
        for (title, curves), (unit, name, digits) in zip(
            panels.items(), ((1.0, "s", 3), (1e9, "GB", 2), (1e6, "MB", 2)), strict=True
        ):
            console.print(cost_table(f"{title} ({name})", asked.lengths, curves, unit, digits))
        report |= {"lengths": asked.lengths, "cost": panels}
        asked.out.mkdir(parents=True, exist_ok=True)
        if plot(asked.lengths, panels, asked.out / "cost.png"):
            console.print(f"In {asked.out}: cost.png")
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
