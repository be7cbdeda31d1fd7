"""IO-aware attention and sequence operators for PyTorch.

Functions take ``[batch, heads, sequence, width]`` tensors of any strides; the modules in :mod:`iokernels.nn` replace
those of :mod:`torch.nn`. ``python -m iokernels`` checks and times every operator on this machine.
"""

from . import nn
from ._version import __version__
from .ops.append_kv import append_kv, apply_rotary, rotary_table
from .ops.block_sparse_attention import BlockIndex, block_sparse_attention
from .ops.fft_conv import KernelSpectrum, LazyState, fft_conv, fft_conv_step, kernel_spectrum, lazy_state
from .ops.flash_attention import flash_attention, flash_attention_varlen, scaled_dot_product_attention
from .ops.flash_rnn import flash_rnn
from .ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from .ops.hip_attention import (
    HipStage,
    PageBounds,
    SelectionCache,
    hip_attention,
    mix_heads,
    page_bounds,
    select_dense,
    select_exact,
    select_hip,
    select_quest,
    select_window,
)
from .ops.lean_attention import lean_attention
from .ops.linear_attention import (
    alibi_slopes,
    lightning_attention,
    linear_attention,
    linear_attention_state,
    linear_attention_step,
    minimax_slopes,
    retention_slopes,
)
from .ops.short_conv import short_conv, short_conv_step
from .runtime.dispatch import use_backend
from .runtime.errors import UnsupportedError

__all__ = [
    "BlockIndex",
    "HipStage",
    "KernelSpectrum",
    "LazyState",
    "PageBounds",
    "SelectionCache",
    "UnsupportedError",
    "__version__",
    "alibi_slopes",
    "append_kv",
    "apply_rotary",
    "block_sparse_attention",
    "fft_conv",
    "fft_conv_step",
    "flash_attention",
    "flash_attention_varlen",
    "flash_rnn",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "hip_attention",
    "kernel_spectrum",
    "lazy_state",
    "lean_attention",
    "lightning_attention",
    "linear_attention",
    "linear_attention_state",
    "linear_attention_step",
    "minimax_slopes",
    "mix_heads",
    "nn",
    "page_bounds",
    "retention_slopes",
    "rotary_table",
    "scaled_dot_product_attention",
    "select_dense",
    "select_exact",
    "select_hip",
    "select_quest",
    "select_window",
    "short_conv",
    "short_conv_step",
    "use_backend",
]
