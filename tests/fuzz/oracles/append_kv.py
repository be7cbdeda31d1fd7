"""append_kv from its docstring: key by key, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

TOP = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def turned(row: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """One key ``[D]``, its pairs turned by their angles."""
    found = row.copy()
    half = len(cos)
    for j in range(half):
        one, other = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        found[one] = row[one] * cos[j] - row[other] * sin[j]
        found[other] = row[other] * cos[j] + row[one] * sin[j]
    return found


def append(a: dict[str, Any]) -> dict[str, Tensor]:
    """The caches, and scales for each key, after the append: float64, before they are rounded to the caches' dtype.

    ``_k_written`` and ``_v_written`` are bool ``[B, Hkv, N]``, or of pages: which keys are new.
    """
    results = {}
    for kind in ("k", "v"):
        cache, new, scale = a[f"{kind}_cache"], a[f"{kind}_new"], a.get(f"{kind}_scale")
        cache = cache.to(torch.float64).numpy().copy()
        written = np.zeros(cache.shape[:3], dtype=bool)
        own = None if scale is None or scale.dim() == 1 else scale.double().numpy().copy()
        top = TOP.get(a["dtypes"][f"{kind}_cache"])
        for b, length in enumerate(a["cache_seqlens"].tolist()):
            count = new.shape[2] if a.get("new_seqlens") is None else int(a["new_seqlens"][b])
            first = length if a.get("positions") is None else int(a["positions"][b])
            for i in range(count):
                at, where = b, length + i
                if a.get("block_table") is not None:
                    page = cache.shape[2]
                    at, where = int(a["block_table"][b, where // page]), where % page
                for h in range(new.shape[1]):
                    row = new[b, h, i].double().numpy()
                    if kind == "k" and a.get("cos") is not None:
                        row = turned(
                            row, a["cos"][first + i].double().numpy(), a["sin"][first + i].double().numpy(),
                            bool(a.get("interleaved")),
                        )  # fmt: skip
                    if own is not None and top is not None:
                        own[at, h, where] = np.abs(row).max() / top
                        row = row / own[at, h, where] if own[at, h, where] > 0.0 else row * 0.0
                    elif scale is not None:
                        row = row / float(scale[h])
                    written[at, h, where] = True
                    cache[at, h, where] = row if top is None else np.clip(row, -top, top)
        results[f"{kind}_cache"], results[f"_{kind}_written"] = torch.from_numpy(cache), torch.from_numpy(written)
        if own is not None:
            results[f"{kind}_scale"] = torch.from_numpy(own)
    return results
