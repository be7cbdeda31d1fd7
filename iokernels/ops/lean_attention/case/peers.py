"""What else a user could call for decoding: PyTorch's SDPA, FlexAttention, flash-attn, FlashInfer.

A peer that is not here is a sentence that says why. One that does not compute the same function refuses with
:class:`iokernels.UnsupportedError`. Whatever a peer needs to know of the lengths on the host (a mask, a plan) is made
before it is timed, once for the lengths that it is timed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from iokernels.runtime.errors import UnsupportedError
from iokernels.testing.case import Inputs, Outputs, Prepare
from iokernels.testing.case.shape import Shape

from .shapes import lengths


def peers(device: torch.device) -> Mapping[str, Prepare | str]:
    """The peers of decode attention on ``device``, the customary baseline first."""
    on_gpu = device.type == "cuda"
    found: dict[str, Prepare | str] = {"sdpa": sdpa}
    found["flex"] = flex if on_gpu else "FlexAttention is timed compiled, on a GPU only"
    for name, package, peer in (("flash-attn", "flash_attn", flash_attn), ("flashinfer", "flashinfer", flashinfer)):
        if find_spec(package) is None:
            found[name] = f"{name} is not installed"
        else:
            found[name] = peer if on_gpu else f"{name} needs a CUDA device"
    return found


def _refuse(shape: Shape, *words: str) -> None:
    """Refuse a shape that sets any of ``words``."""
    for word in ("cache", "scales", "prefix", "lse", *words):
        if shape[word]:
            raise UnsupportedError(f"it has no equivalent of {word}={shape[word]} here")
    if shape.schedule == 3:
        raise UnsupportedError("it does not promise that bits are independent of the batch")


def _without_poison(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The caches up to the longest length, with zeros past every length: a weight of 0 times NaN is NaN."""
    shape = inputs.shape
    caches = [inputs.tensors[name][:, :, : shape.nk] for name in ("k_cache", "v_cache")]
    if len(set(lengths(shape))) > 1:
        caches = [cache.nan_to_num() for cache in caches]
    return caches[0], caches[1]


def sdpa(inputs: Inputs) -> Callable[[], Outputs]:
    """``scaled_dot_product_attention`` with a mask for the lengths, where they or several rows need one."""
    shape = inputs.shape
    _refuse(shape, "softcap", "sinks", "page")
    if 0 in lengths(shape):
        raise UnsupportedError("a sequence without keys is undefined there")
    q, (k, v) = inputs.tensors["q"], _without_poison(inputs)
    mask = None
    if len(set(lengths(shape))) > 1 or shape.n > 1 or shape.left >= 0:
        mask = visible(shape, q.device)
        if not bool(mask.any(-1).all()):
            raise UnsupportedError("a row without keys is undefined there")
    function = torch.nn.functional.scaled_dot_product_attention
    return lambda: {"out": function(q, k, v, attn_mask=mask, enable_gqa=shape.h != shape.hkv)}


def visible(shape: Shape, device: torch.device) -> Tensor:
    """Which keys the rows see: bool [b, 1, n, nk]."""
    ends = torch.tensor(lengths(shape), device=device)[:, None, None]
    position = ends - shape.n + torch.arange(shape.n, device=device)[:, None]
    keys = torch.arange(shape.nk, device=device)
    found = keys < ends
    if shape.left >= 0:
        found = found & (keys >= position - shape.left)
    right = 0 if shape.causal else shape.right
    if right >= 0:
        found = found & (keys <= position + right)
    return found[:, None]


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Inputs) -> Callable[[], Outputs]:
    """FlexAttention, compiled, whose kernel for few rows is FlexDecoding."""
    from torch.nn.attention.flex_attention import create_block_mask

    shape = inputs.shape
    _refuse(shape, "sinks", "page")
    q, (k, v) = inputs.tensors["q"], _without_poison(inputs)
    ends, n, left, softcap = inputs.options["cache_seqlens"], shape.n, shape.left, shape.softcap
    right = 0 if shape.causal else shape.right

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = ends[b] - n + i
        found = j < ends[b]
        if left >= 0:
            found = found & (j >= position - left)
        if right >= 0:
            found = found & (j <= position + right)
        return found

    def capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(s / softcap)

    mask = create_block_mask(seen, shape.b, None, n, shape.nk, device=str(q.device))
    function, options = _compiled_flex(), {"enable_gqa": shape.h != shape.hkv}
    score_mod = capped if softcap else None
    return lambda: {"out": function(q, k, v, score_mod=score_mod, block_mask=mask, **options)}


def flash_attn(inputs: Inputs) -> Callable[[], Outputs]:
    """``flash_attn_with_kvcache``, dense or paged."""
    package: Any = import_module("flash_attn")
    shape, options = inputs.shape, inputs.options
    _refuse(shape, "sinks")
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError("flash-attn takes fp16 and bf16 only")
    if shape.d != shape.dv:
        raise UnsupportedError("its values are as wide as its keys")
    if shape.page % 256:
        raise UnsupportedError("its pages hold a multiple of 256 keys")
    q, k, v = (inputs.tensors[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    table = options.get("block_table")
    common = {
        "cache_seqlens": options["cache_seqlens"],
        # It reads the entries that no length reaches.
        "block_table": None if table is None else torch.where(table < k.shape[0], table, 0),
        "causal": options["causal"],
        "window_size": options.get("window", (-1, -1)),
        "softcap": shape.softcap,
    }
    return lambda: {"out": package.flash_attn_with_kvcache(q, k, v, **common).transpose(1, 2)}


def flashinfer(inputs: Inputs) -> Callable[[], Outputs]:
    """FlashInfer's batched decoding, planned for these lengths; a dense cache is one page for each sequence."""
    package: Any = import_module("flashinfer")
    shape, options = inputs.shape, inputs.options
    _refuse(shape, "sinks")
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError("FlashInfer is asked for fp16 and bf16 only")
    if shape.n != 1 or shape.d != shape.dv or shape.bnhd:
        raise UnsupportedError("its decoding takes one new position, values as wide as keys, and pages [heads, keys]")
    if 0 in lengths(shape):
        raise UnsupportedError("a sequence without keys is undefined there")
    if (0 if shape.causal else shape.right) > 0:
        raise UnsupportedError("its window is open to the right")
    q, k, v = (inputs.tensors[name] for name in ("q", "k_cache", "v_cache"))
    page = k.shape[2]
    counts = [-(-length // page) for length in lengths(shape)]
    table = options.get("block_table")
    if table is None:
        table = torch.arange(shape.b, dtype=torch.int32, device=q.device)[:, None]
    ends = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    indices = torch.cat([row[:count] for row, count in zip(table, counts, strict=True)])
    last = torch.tensor([(length - 1) % page + 1 for length in lengths(shape)], dtype=torch.int32)
    room = torch.empty(256 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=shape.h // shape.hkv >= 4)
    wrapper.plan(
        ends.to(q.device), indices, last.to(q.device), shape.h, shape.hkv, shape.d, page,
        window_left=shape.left, logits_soft_cap=shape.softcap or None, q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    rows = q[:, :, 0].contiguous()
    return lambda: {"out": wrapper.run(rows, (k, v))[:, :, None]}
