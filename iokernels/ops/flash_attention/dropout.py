"""Which attention weights dropout keeps: one definition for every backend.

The weight of query row i and key j in head h of sequence b survives where the upper 31 bits of a random word, as a
number, are at least ``round(p * 2^31)``. The word is number ``j % 4`` of the four that Philox-4x32-10 (Salmon et al.,
2011, "Parallel random numbers: as easy as 1, 2, 3") makes of the counter ``(j // 4, i, b * Hq + h, 0)`` and the 64-bit
seed: a function of the position alone, so the backward pass recomputes it and tiles of any shape agree. Rows and keys
count from the start of their own sequence. ``triton/scores.keep_mask`` is the same in Triton.

A backward pass makes the dropped weights again from the seed of the forward pass. The compiler's partitioner may
instead run a draw again in the backward graph (``torch._functorch.config.activation_memory_budget`` below 1 allows it
to recompute whatever is cheap), and a second draw is another mask. So a traced draw passes through an operator whose
node is marked as one whose result must be saved, the mark that selective checkpointing leaves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.registration import register

_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The smallest 31-bit number that survives dropout with probability ``p``."""
    return min(round(p * 2**31), 2**31 - 1)


def keep_mask(seed: Tensor, p: float, sequence_heads: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """True where a weight survives: bool, of the broadcast shape of the three int64 index tensors.

    ``seed`` is int64 ``[1]``; ``sequence_heads`` holds ``b * Hq + h``. All stay on their device.
    """
    w0, w1, w2, w3 = _philox(seed, keys // 4, rows, sequence_heads)
    lane = keys % 4
    word = torch.where(lane < 2, torch.where(lane == 0, w0, w1), torch.where(lane == 2, w2, w3))
    return (word >> 1) >= threshold(p)


def keep_tile(seed: Tensor, p: float, sequence_heads: Tensor, rows: slice, keys: slice) -> Tensor:
    """:func:`keep_mask` of consecutive rows and keys, at a quarter of its cost: all four words of a counter are used.

    ``sequence_heads`` is int64 ``[..., 1, 1]``; the result ``[..., rows, keys]``.
    """
    device = sequence_heads.device
    counters = torch.arange(keys.start // 4, (keys.stop + 3) // 4, device=device)
    words = _philox(seed, counters, torch.arange(rows.start, rows.stop, device=device)[:, None], sequence_heads)
    kept = torch.stack([(word >> 1) >= threshold(p) for word in torch.broadcast_tensors(*words)], dim=-1)
    first = keys.start % 4
    return kept.flatten(-2)[..., first : first + keys.stop - keys.start]


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold 32-bit words; the fourth counter is 0."""
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _wide_product(0xD2511F53, c0)
        high1, low1 = _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32-bit halves of a 32 x 32-bit product, without passing 2^63."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device: int64 ``[1]``."""
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    return _saved(seed, torch.is_grad_enabled()) if torch.compiler.is_compiling() else seed


_saved = register(
    "flash_attention_seed",
    "Tensor seed, bool differentiated",
    "Tensor",
    impl=lambda seed, differentiated: seed.clone(),
    fake=lambda seed, differentiated: torch.empty_like(seed),
)


@_saved.py_impl(ProxyTorchDispatchMode)
def _mark(mode: Any, seed: Any, differentiated: bool) -> Any:
    """Trace the operator as any other, then mark its node."""
    if differentiated and functorch_config.activation_memory_budget == 0:
        raise UnsupportedError(
            "flash_attention: dropout_p is above 0 and activation_memory_budget is 0, with which torch.compile saves "
            "nothing but inputs and would draw other weights to drop in the backward pass; any budget above 0 is right"
        )
    saved = mode.__torch_dispatch__(_saved, (), (seed, differentiated), {})
    node = next(node for node in reversed(mode.tracer.graph.nodes) if node.target is _saved)
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return saved
