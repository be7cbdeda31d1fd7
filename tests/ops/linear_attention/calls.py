"""Calls of linear_attention for its tests: inputs, results, and how far from the truth they may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iokernels import linear_attention
from iokernels.ops.linear_attention.cuda import tuning as tuning_cuda
from iokernels.ops.linear_attention.triton.tuning import KERNELS, Config
from iokernels.testing.budget import check_relative_rms

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Relative RMS error, over a head, of out, the state, and the gradients of q, k, v and the state."""
DECAY_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""That of the gradient of decays, which is a difference of long sums."""
NORMALIZED = 2.5
"""How much more with the normaliser: then every row of weights sums up to the same, and the sums nearly cancel."""


def tiles(chunk: int = 16, width: int = 16, segments: int = 1) -> dict[str, Any]:
    """One small configuration for every kernel, so that short sequences take many steps."""
    chosen: dict[str, Any] = dict.fromkeys(KERNELS, Config(chunk, width, 4, 1, segments))
    chosen["linear_attention_step"] = Config(1, width, 4, 1)
    return chosen | dict.fromkeys(tuning_cuda.KERNELS, tuning_cuda.Config(chunk, width // 16))


def draw(
    batch: int = 1, heads: int = 2, length: int = 70, key_width: int = 16, value_width: int = 24, *,
    key_heads: int | None = None, dtype: torch.dtype = torch.float32, decay: str | None = None, taylor: bool = False,
    normalize: bool = False, state: bool = False, log_decay: float = -0.1, device: str = "cpu", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a call. ``decay`` is None, "head" or "token"; with ``normalize`` and no map q and k are positive."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    key_heads = heads if key_heads is None else key_heads
    q, k = (normal(batch, key_heads, length, key_width) for _ in range(2))
    if normalize and not taylor:
        q, k = torch.nn.functional.softplus(q), torch.nn.functional.softplus(k)
    given: dict[str, Any] = {"q": q.to(dtype), "k": k.to(dtype)}
    given["v"] = normal(batch, heads, length, value_width).to(dtype)
    if decay is not None:
        shape = (heads,) if decay == "head" else (batch, heads, length)
        given["log_decay"] = 2 * log_decay * torch.rand(shape, generator=generator)
    given["feature_map"] = "taylor" if taylor else None
    given["normalize"] = normalize
    if state:
        # What some earlier tokens left behind.
        before = draw(
            batch, heads, 9, key_width, value_width, dtype=torch.float64, taylor=taylor, normalize=normalize,
            seed=seed + 1,
        )  # fmt: skip
        given["initial_state"] = linear_attention(**before, return_state=True, backend="reference")[1].float()
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}


LENGTHS = (18, 0, 1, 33, 1, 0)
"""Of packed sequences."""


def packed(given: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, Any]:
    """A batch of one as packed sequences, with the state that each starts from."""
    flat = {name: given[name].squeeze(0).transpose(0, 1) for name in ("q", "k", "v")}
    decay = given.get("log_decay")
    if decay is not None:
        flat["log_decay"] = decay.squeeze(0).transpose(0, 1) if decay.dim() == 3 else decay
    state = (
        given["initial_state"] * torch.linspace(0.5, 1.5, len(lengths), device=given["q"].device)[:, None, None, None]
    )
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return given | flat | {"initial_state": state, "cu_seqlens": offsets.to(given["q"].device)}


def results(
    given: dict[str, Any], backend: str, dtype: torch.dtype | None = None, *, state_gradient: bool = True
) -> dict[str, Tensor]:
    """out, the final state and every gradient of a call, in the dtype of its inputs or another."""
    leaves = {}
    for name, x in given.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            wide = dtype if name in "qkv" or dtype == torch.float64 else None
            leaves[name] = x.detach().to(wide or x.dtype).requires_grad_()
    out, state = linear_attention(**{**given, **leaves}, return_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    # The same rounded gradients for every backend and dtype; a tenth for the state, whose elements are many.
    douts = [
        (size * torch.randn(x.shape, generator=generator)).to(given["v"].dtype).to(x)
        for x, size in ((out, 1.0), (state, 0.1))
    ]
    outputs = 1 + state_gradient
    gradients = torch.autograd.grad([out, state][:outputs], list(leaves.values()), douts[:outputs])
    found = {"out": out.detach(), "state": state.detach()}
    return found | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def prove(
    given: dict[str, Any], backend: str, *, skip: tuple[str, ...] = (), state_gradient: bool = True
) -> dict[str, Tensor]:
    """Hold the results of ``backend`` to the limits, and return them."""
    found = results(given, backend, state_gradient=state_gradient)
    truth = results(given, "reference", torch.float64, state_gradient=state_gradient)
    dtype = given["v"].dtype
    assert truth["out"].abs().max() > 0.05, "the inputs prove nothing"
    for name, x in found.items():
        assert x.dtype == (dtype if name in ("out", "dq", "dk", "dv") else x.dtype)
        if name in skip:
            continue
        limit = LIMITS[dtype]
        if name == "dlog_decay":
            limit = DECAY_LIMITS[dtype] * (NORMALIZED if given.get("normalize") else 1.0)
        over = x.shape[:2] if x.dim() == 4 else x.shape[:0]
        check_relative_rms(x.reshape(*over, -1), truth[name].reshape(*over, -1), limit=limit, what=name)
    return found
