"""One call for each path that an operator can take, with contiguous tensors: :mod:`.test_layouts` lays them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import iokernels
from iokernels import BlockIndex


class Path(NamedTuple):
    """A call: its arguments by name, and what takes them."""

    operator: str
    name: str
    backends: tuple[str, ...]
    arguments: Callable[[], dict[str, Any]]
    call: Callable[..., Any]
    writes: tuple[str, ...] = ()
    """The arguments that the call changes; they count as results."""
    gradients: bool = True

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"


PATHS: list[Path] = []
_ALL = ("torch", "triton", "cuda")


def path(call: Any, name: str, backends: tuple[str, ...] = ("torch", "triton"), **more: Any) -> Callable[[Any], Any]:
    def add(arguments: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        PATHS.append(Path(call.__name__, name, backends, arguments, call, **more))
        return arguments

    return add


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _attention(q_heads: int, rows: int, keys: int, width: int = 8) -> dict[str, Any]:
    return {
        "q": torch.randn(2, q_heads, rows, width), "k": torch.randn(2, 2, keys, width),
        "v": torch.randn(2, 2, keys, width), "return_lse": True,
    }  # fmt: skip


@path(iokernels.flash_attention, "plain", _ALL)
def _() -> dict[str, Any]:
    return _attention(2, 20, 20)


@path(iokernels.flash_attention, "causal-groups", _ALL)
def _() -> dict[str, Any]:
    return {**_attention(4, 19, 19), "causal": True}


@path(iokernels.flash_attention, "one-row", _ALL)
def _() -> dict[str, Any]:
    return {**_attention(2, 1, 40), "causal": True}


@path(iokernels.flash_attention, "every-option")
def _() -> dict[str, Any]:
    options = {"mask": torch.rand(2, 1, 9, 13) > 0.2, "bias": torch.randn(2, 9, 13), "sinks": torch.randn(2)}
    return {**_attention(2, 9, 13), **options, "alibi_slopes": torch.rand(2), "window": (9, 3), "softcap": 20.0}


@path(iokernels.flash_attention_varlen, "ragged", _ALL)
def _() -> dict[str, Any]:
    lengths = {"cu_seqlens_q": i32(0, 3, 3, 20), "cu_seqlens_k": i32(0, 5, 9, 30)}
    tensors = {"q": torch.randn(22, 4, 8), "k": torch.randn(30, 2, 8), "v": torch.randn(30, 2, 6)}
    return {**tensors, **lengths, "max_seqlen_q": 17, "max_seqlen_k": 21, "causal": True, "return_lse": True}


def _cache(rows: int, lengths: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    k, v = torch.randn(2, 2, 2, 40, 8)
    return {
        "q": torch.randn(2, 4, rows, 8), "k_cache": k.to(dtype), "v_cache": v.to(dtype), "cache_seqlens": lengths,
        "return_lse": True,
    }  # fmt: skip


@path(iokernels.lean_attention, "one-row-full", _ALL, gradients=False)
def _() -> dict[str, Any]:
    return _cache(1, i32(40, 40))


@path(iokernels.lean_attention, "rows-ragged", _ALL, gradients=False)
def _() -> dict[str, Any]:
    return {**_cache(3, i32(40, 7)), "sinks": torch.randn(4)}


@path(iokernels.lean_attention, "short-ragged", gradients=False)
def _() -> dict[str, Any]:
    return _cache(1, i32(0, 2))


@path(iokernels.lean_attention, "prefix", _ALL, gradients=False)
def _() -> dict[str, Any]:
    return {**_cache(1, i32(9, 30)), "k_prefix": torch.randn(2, 12, 8), "v_prefix": torch.randn(2, 12, 8)}


@path(iokernels.lean_attention, "pages-of-bytes", gradients=False)
def _() -> dict[str, Any]:
    k, v = torch.randint(-99, 99, (2, 5, 2, 16, 8), dtype=torch.int8)
    scales = {"k_scale": torch.rand(5, 2, 16) / 50, "v_scale": torch.rand(5, 2, 16) / 50}
    table = torch.tensor([[3, 0, 4], [1, 2, 2]], dtype=torch.int32)
    return {**_cache(1, i32(37, 20)), "k_cache": k, "v_cache": v, "block_table": table, **scales}


@path(iokernels.append_kv, "dense", gradients=False, writes=("k_cache", "v_cache"))
def _() -> dict[str, Any]:
    new = {"k_new": torch.randn(2, 2, 3, 8), "v_new": torch.randn(2, 2, 3, 6)}
    caches = {"k_cache": torch.randn(2, 2, 12, 8), "v_cache": torch.randn(2, 2, 12, 6)}
    return {**new, **caches, "cache_seqlens": i32(4, 9), "new_seqlens": i32(3, 1)}


@path(iokernels.append_kv, "pages-of-bytes", gradients=False, writes=("k_cache", "v_cache", "k_scale", "v_scale"))
def _() -> dict[str, Any]:
    new = {"k_new": torch.randn(2, 2, 3, 8), "v_new": torch.randn(2, 2, 3, 8), "cache_seqlens": i32(6, 0)}
    caches = {f"{n}_cache": torch.zeros(3, 2, 8, 8, dtype=torch.int8) for n in "kv"}
    scales = {f"{n}_scale": torch.zeros(3, 2, 8) for n in "kv"}
    return {**new, **caches, **scales, "block_table": torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)}


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, sink: Tensor, window: Tensor, backend: str,
    **more: Any,
) -> Any:  # fmt: skip
    keys = k.shape[2] if "block_table" not in more else more["block_table"].shape[1] * k.shape[2]
    index = BlockIndex(indices, counts, 16, 8, sink, window, q.shape[2], keys)
    return iokernels.block_sparse_attention(q, k, v, index, return_lse=True, backend=backend, **more)


_sparse.__name__ = "block_sparse_attention"


@path(_sparse, "lists")
def _() -> dict[str, Any]:
    lists = {"indices": torch.randint(0, 2, (2, 2, 2, 2), dtype=torch.int32).cumsum(-1, dtype=torch.int32)}
    counts = torch.tensor([[[0, -1], [2, 1]], [[-1, 1], [1, -1]]], dtype=torch.int32)
    lists["indices"][..., 1] += 1
    heads = {"counts": counts, "sink": i32(1, 3), "window": i32(4, 0)}
    return {
        "q": torch.randn(2, 2, 20, 8),
        "k": torch.randn(2, 2, 25, 8),
        "v": torch.randn(2, 2, 25, 6),
        **lists,
        **heads,
    }


@path(_sparse, "pages", gradients=False)
def _() -> dict[str, Any]:
    lists = {"indices": i32(0, 2, 1, 3).view(2, 1, 1, 2), "counts": i32(2, 1).view(2, 1, 1), "sink": i32(2)}
    table = {"block_table": torch.tensor([[3, 0, 4], [1, 2, 2]], dtype=torch.int32), "cache_seqlens": i32(37, 20)}
    k, v = torch.randn(2, 5, 2, 16, 8)
    return {"q": torch.randn(2, 4, 1, 8), "k": k, "v": v, **lists, "window": i32(5), **table}


@path(iokernels.hip_attention, "everything")
def _() -> dict[str, Any]:
    return {**_attention(2, 18, 18), "budget": 64}


@path(iokernels.hip_attention, "searched", ("torch",))
def _() -> dict[str, Any]:
    return {**_attention(4, 70, 70), "budget": 16, "sink": 4, "window": 8, "block_q": 32}


def _tokens(tokens: int, width: int = 8) -> dict[str, Any]:
    return {
        "q": torch.randn(2, 1, tokens, width) / 3, "k": torch.nn.functional.normalize(torch.randn(2, 1, tokens, width)),
        "v": torch.randn(2, 2, tokens, 6),
    }  # fmt: skip


def _packed(tokens: int) -> dict[str, Any]:
    dense = {name: x[0].transpose(0, 1).contiguous() for name, x in _tokens(tokens).items()}
    return {**dense, "cu_seqlens": i32(0, 4, 4, tokens - 1), "return_state": True}


@path(iokernels.linear_attention, "plain", _ALL)
def _() -> dict[str, Any]:
    return {**_tokens(20), "return_state": True, "initial_state": torch.randn(2, 2, 8, 6)}


@path(iokernels.linear_attention, "decay-a-head", _ALL)
def _() -> dict[str, Any]:
    return {**_tokens(20), "log_decay": -torch.rand(2)}


@path(iokernels.linear_attention, "decay-a-token")
def _() -> dict[str, Any]:
    return {**_tokens(9), "log_decay": -torch.rand(2, 2, 9), "normalize": True}


@path(iokernels.linear_attention, "packed", _ALL)
def _() -> dict[str, Any]:
    return {**_packed(20), "log_decay": -torch.rand(20, 2), "initial_state": torch.randn(3, 2, 8, 6)}


@path(iokernels.linear_attention_step, "one", gradients=False, writes=("state",))
def _() -> dict[str, Any]:
    return {**_tokens(1), "state": torch.randn(2, 2, 8, 6), "log_decay": -torch.rand(2, 2, 1)}


@path(iokernels.gated_delta_rule, "dense")
def _() -> dict[str, Any]:
    more = {"beta": torch.rand(2, 2, 19), "log_decay": -torch.rand(2, 2, 19)}
    return {**_tokens(19), **more, "initial_state": torch.randn(2, 2, 8, 6), "return_state": True}


@path(iokernels.gated_delta_rule, "packed")
def _() -> dict[str, Any]:
    return {**_packed(19), "beta": torch.rand(19, 2), "log_decay": -torch.rand(2)}


@path(iokernels.gated_delta_rule_step, "two", gradients=False, writes=("state",))
def _() -> dict[str, Any]:
    return {**_tokens(2), "beta": torch.rand(2, 2, 2), "state": torch.randn(2, 2, 8, 6)}


@path(iokernels.fft_conv, "short", _ALL)
def _() -> dict[str, Any]:
    return {"u": torch.randn(3, 2, 40), "k": torch.randn(2, 5), "skip": torch.randn(2)}


@path(iokernels.fft_conv, "long-gates", _ALL)
def _() -> dict[str, Any]:
    gates = {"pre_gate": torch.randn(3, 2, 200), "post_gate": torch.randn(3, 2, 200)}
    return {"u": torch.randn(3, 2, 200), "k": torch.randn(2, 200) / 9, **gates}


@path(iokernels.fft_conv, "state")
def _() -> dict[str, Any]:
    past = torch.randn(2, 2, 49)
    return {"u": torch.randn(2, 2, 30), "k": torch.randn(2, 50) / 5, "initial_state": past, "return_state": True}


@path(iokernels.fft_conv, "around")
def _() -> dict[str, Any]:
    return {"u": torch.randn(2, 2, 60), "k": torch.randn(2, 60) / 5, "causal": False}


def _conv_step(u: Tensor, k: Tensor, state: Tensor, backend: str) -> Tensor:
    return iokernels.fft_conv_step(u, k, state)


_conv_step.__name__ = "fft_conv_step"


@path(_conv_step, "window", ("torch",), gradients=False, writes=("state",))
def _() -> dict[str, Any]:
    return {"u": torch.randn(2, 3), "k": torch.randn(3, 7), "state": torch.randn(2, 3, 6)}


@path(iokernels.short_conv, "four-taps")
def _() -> dict[str, Any]:
    more = {"bias": torch.randn(9), "initial_state": torch.randn(2, 9, 3), "return_state": True, "activation": "silu"}
    return {"x": torch.randn(2, 9, 30), "weight": torch.randn(9, 4), **more}


@path(iokernels.short_conv, "wide")
def _() -> dict[str, Any]:
    return {"x": torch.randn(2, 9, 30), "weight": torch.randn(9, 17)}


@path(iokernels.short_conv, "packed")
def _() -> dict[str, Any]:
    return {"x": torch.randn(30, 9), "weight": torch.randn(9, 4), "cu_seqlens": i32(0, 2, 2, 29)}


@path(iokernels.short_conv_step, "rows-of-a-cache", gradients=False, writes=("state",))
def _() -> dict[str, Any]:
    more = {"state": torch.randn(4, 9, 3), "state_indices": i32(2, -1, 0), "bias": torch.randn(9)}
    return {"x": torch.randn(3, 9), "weight": torch.randn(9, 4), **more}


def _cell(gates: int, states: int) -> dict[str, Any]:
    state = torch.rand(states, 2, 2, 8)
    return {
        "gates": torch.randn(2, 9, gates, 2, 8), "recurrent": torch.randn(gates, 2, 8, 8) / 3,
        "bias": torch.randn(gates, 2, 8), "initial_state": state, "return_state": True,
    }  # fmt: skip


@path(iokernels.flash_rnn, "lstm", _ALL)
def _() -> dict[str, Any]:
    return {**_cell(4, 2), "cell": "lstm"}


@path(iokernels.flash_rnn, "gru-ragged")
def _() -> dict[str, Any]:
    return {**_cell(3, 1), "cell": "gru", "lengths": i32(9, 4)}


@path(iokernels.flash_rnn, "slstm-recomputed")
def _() -> dict[str, Any]:
    return {**_cell(4, 4), "cell": "slstm", "recompute_gates": True}
