"""What else a user could call for attention: PyTorch's SDPA, FlexAttention, flash-attn, FlashInfer.

A peer that is not here is a sentence that says why. One that does not compute the same function refuses with
:class:`iokernels.UnsupportedError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Inputs, Outputs, Prepare
from iokernels.testing.case.shape import Shape

SDPA_BACKENDS = {
    "sdpa-flash": "FLASH_ATTENTION",
    "sdpa-cudnn": "CUDNN_ATTENTION",
    "sdpa-efficient": "EFFICIENT_ATTENTION",
    "sdpa-math": "MATH",
}
"""Peers that are one backend of SDPA, and what ``torch.nn.attention.SDPBackend`` calls it."""


def attention_peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """The peers of softmax attention on ``device``, the customary baseline first."""
    on_gpu = device.type == "cuda"
    found: dict[str, Prepare | str] = {}
    if on_gpu:
        found |= {name: partial(_sdpa, backend) for name, backend in SDPA_BACKENDS.items()}
    else:
        found["sdpa"] = partial(_sdpa, None)
    found["flex"] = _flex if on_gpu else "FlexAttention is timed compiled, on a GPU only"
    for name, package, peer in (("flash-attn", "flash_attn", _flash_attn), ("flashinfer", "flashinfer", _flashinfer)):
        if find_spec(package) is None:
            found[name] = f"{name} is not installed"
        else:
            found[name] = peer if on_gpu else f"{name} needs a CUDA device"
    return found


def _refuse(shape: Shape, *words: str) -> None:
    """Refuse a shape that sets any of ``words``."""
    if shape.dropout:
        raise UnsupportedError("its dropout draws other numbers, so its result cannot be compared")
    for word in words:
        if shape[word]:
            raise UnsupportedError(f"it has no equivalent of {word}={shape[word]} here")


def _sdpa(backend: str | None, inputs: Inputs) -> Callable[[], Outputs]:
    shape = inputs.shape
    _refuse(shape, "softcap", "sinks", "lse", "packed")
    q, k, v = (inputs.tensors[name] for name in "qkv")
    bias = inputs.tensors.get("bias")
    # SDPA aligns causal at the start of both sequences, so it is the same function for equal lengths only.
    is_causal = (
        bool(shape.causal) and shape.n == shape.nk and shape.left < 0 and not (shape.mask or shape.bias or shape.alibi)
    )
    constant = None if is_causal else _additive_or_boolean(inputs)

    def call() -> Outputs:
        mask = constant
        if bias is not None:
            mask = bias.expand(shape.b, -1, -1, -1)
            if constant is not None:
                hidden = constant.dtype == torch.bool
                mask = mask.masked_fill(~constant, float("-inf")) if hidden else mask + constant
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=shape.h != shape.hkv
        )
        return {"out": out}

    return call if backend is None else partial(_on_sdpa_backend, backend, call)


def _on_sdpa_backend(name: str, call: Callable[[], Outputs]) -> Outputs:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
            warnings.simplefilter("ignore")  # torch explains every backend that was not asked for
            return call()
    except RuntimeError as error:
        if "No available kernel" in str(error):
            raise UnsupportedError("PyTorch has no such kernel for this call") from None
        raise


def _additive_or_boolean(inputs: Inputs) -> Tensor | None:
    """Everything that hides or shifts scores and wants no gradient, as SDPA takes it; None where nothing does."""
    shape, q = inputs.shape, inputs.tensors["q"]
    visible = inputs.options.get("mask")
    right = 0 if shape.causal else shape.right
    if shape.left < 0 and right < 0 and not shape.alibi:
        return visible
    rows, keys = (torch.arange(size, dtype=torch.int32, device=q.device) for size in (shape.n, shape.nk))
    distance = rows[:, None] + (shape.nk - shape.n) - keys
    for limited, side in ((shape.left >= 0, distance <= shape.left), (right >= 0, distance >= -right)):
        if limited:
            visible = side if visible is None else visible & side
    if not shape.alibi:
        return visible
    constant = (-inputs.options["alibi_slopes"][:, None, None] * distance.abs()).to(q.dtype)
    return constant if visible is None else torch.where(visible, constant, float("-inf"))


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(inputs: Inputs) -> Callable[[], Outputs]:
    from torch.nn.attention.flex_attention import create_block_mask

    shape, slopes = inputs.shape, inputs.options.get("alibi_slopes")
    _refuse(shape, "sinks", "lse", "packed", "mask", "bias")
    q, k, v = (inputs.tensors[name] for name in "qkv")
    offset, left, right, softcap = shape.nk - shape.n, shape.left, 0 if shape.causal else shape.right, shape.softcap

    def visible(b: Any, h: Any, i: Tensor, j: Tensor) -> Any:
        found = j >= 0
        if left >= 0:
            found = found & (i + offset - j <= left)
        if right >= 0:
            found = found & (j - i - offset <= right)
        return found

    def score(s: Tensor, b: Any, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        return s if slopes is None else s - slopes[h] * (i + offset - j).abs()

    limits = left >= 0 or right >= 0
    block_mask = create_block_mask(visible, None, None, shape.n, shape.nk, device=str(q.device)) if limits else None
    score_mod = score if softcap or slopes is not None else None
    function = _compiled_flex()
    return lambda: {
        "out": function(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=shape.h != shape.hkv)
    }


def _flash_attn(inputs: Inputs) -> Callable[[], Outputs]:
    package: Any = import_module("flash_attn")
    shape, options = inputs.shape, inputs.options
    _refuse(shape, "sinks", "lse", "mask", "bias")
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError("flash-attn takes fp16 and bf16 only")
    q, k, v = (inputs.tensors[name] for name in "qkv")
    common = {
        "causal": options["causal"],
        "window_size": options.get("window", (-1, -1)),
        "softcap": shape.softcap,
        "alibi_slopes": options.get("alibi_slopes"),
    }
    if shape.packed:
        lengths = {name: x for name, x in options.items() if name.startswith(("cu_seqlens", "max_seqlen"))}
        return lambda: {"out": package.flash_attn_varlen_func(q, k, v, **lengths, **common)}
    return lambda: {"out": package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **common).transpose(1, 2)}


def _flashinfer(inputs: Inputs) -> Callable[[], Outputs]:
    package: Any = import_module("flashinfer")
    shape, options = inputs.shape, inputs.options
    _refuse(shape, "sinks", "lse", "mask", "bias", "alibi", "packed")
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError("FlashInfer takes fp16 and bf16 only")
    if shape.b != 1:
        raise UnsupportedError("its call for several sequences wants a plan made on the host first")
    left, right = options.get("window", (-1, -1))
    if right not in ((-1, 0) if shape.causal else (-1,)):
        raise UnsupportedError("its window is open to the right")
    q, k, v = (inputs.tensors[name].detach()[0].transpose(0, 1) for name in "qkv")  # no backward pass: [N, H, D]
    common = {"causal": options["causal"], "window_left": left, "logits_soft_cap": shape.softcap or None}
    return lambda: {"out": package.single_prefill_with_kv_cache(q, k, v, **common).transpose(0, 1)[None]}
