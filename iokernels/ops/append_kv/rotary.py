"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864, section 3.4): pairs of elements turn with position."""

from __future__ import annotations

import torch
from torch import Tensor

from iokernels.ops.shared.integers import integer
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import LARGEST
from iokernels.runtime.plans import is_concrete

_CONTRACT = Contract(
    "apply_rotary",
    x=Spec("B H N D", FLOATS),
    cos=Spec("P half", FLOATS),
    sin=Spec("P half", same_dtype_as="cos"),
    positions=Spec("B", (torch.int32, torch.int64)),
)
_TABLE = Contract("rotary_table")


def rotary_table(
    positions: int, width: int, *, base: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The usual angles: ``(cos, sin)``, float32 ``[positions, width / 2]``, of ``p * base ** (-2 j / width)``.

    ``width`` is how many elements of a head turn; it must be even. ``base`` is above 0.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a negative number of positions or one beyond int32, a width that is not positive and even, or a
            base that is not positive and finite.
    """
    positions = integer(_TABLE, "positions", positions, least=0, most=LARGEST)
    width = integer(_TABLE, "width", width, most=LARGEST)
    _TABLE.require(width > 0 and width % 2 == 0, f"width is {width}; it must be positive and even")
    base = _TABLE.number("base", base, above=0.0)
    # In float64: float32 products lose a part of the angle at positions in the hundred thousands.
    rates = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn queries (or keys) by their positions, as :func:`iokernels.append_kv` turns the keys that it writes.

    Args:
        x: ``[B, H, N, D]``, any floating dtype.
        cos: ``[P, rot / 2]``, any floating dtype; rot is at most D, and the elements past it stay as they are.
        sin: like cos.
        positions: int32 or int64 ``[B]``: the position of each sequence's first row; the others follow it. Out of
            the table's range they are taken to its edge on a GPU, whose memory the host does not read, and refused on
            the CPU.
        interleaved: the pairs are the elements (2 j, 2 j + 1); (j, j + rot / 2) otherwise.

    Returns:
        A tensor like x; float32 arithmetic (float64 for float64), rounded once. Differentiable.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or positions that do not fit; the message names the argument.
    """
    sizes = _CONTRACT.check(x=x, cos=cos, sin=sin, positions=positions)
    interleaved = _CONTRACT.flag("interleaved", interleaved)
    check_table(_CONTRACT, sizes)
    count, length = cos.shape[0], x.shape[2]
    if positions.device.type == "cpu" and not torch.compiler.is_compiling() and is_concrete(positions) and length:
        check_positions(_CONTRACT, positions.tolist(), [length] * x.shape[0], count)
    return turned(x, cos, sin, positions, interleaved).to(x.dtype)


def check_table(contract: Contract, sizes: dict[str, int]) -> None:
    """Refuse angles for more than a head, or for no position."""
    contract.require(
        2 * sizes["half"] <= sizes["D"],
        f"cos has {sizes['half']} columns; they turn twice as many elements, and a head has {sizes['D']}",
    )
    contract.require(sizes["P"] > 0, "cos has no rows; it must have one for each position")


def check_positions(contract: Contract, first: list[int], counts: list[int], rows: int) -> None:
    """Refuse positions outside the table, for sequences that have rows."""
    for sequence, (start, count) in enumerate(zip(first, counts, strict=True)):
        contract.require(
            count <= 0 or 0 <= start <= rows - count,
            f"sequence {sequence} has the positions {start} to {start + count - 1}; cos has rows for 0 to {rows - 1}",
        )


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """:func:`apply_rotary` without checks, in the dtype of its arithmetic."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    at = positions.long()[:, None] + torch.arange(x.shape[2], device=x.device)
    at = at.clamp(0, cos.shape[0] - 1)
    c, s = (table[at][:, None].to(dtype) for table in (cos, sin))  # [B, 1, N, rot / 2]
    rot = 2 * cos.shape[1]
    x = x.to(dtype)
    if interleaved:
        a, b = x[..., 0:rot:2], x[..., 1:rot:2]
        return torch.cat([torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2), x[..., rot:]], dim=-1)
    a, b = x[..., : rot // 2], x[..., rot // 2 : rot]
    return torch.cat([a * c - b * s, b * c + a * s, x[..., rot:]], dim=-1)
