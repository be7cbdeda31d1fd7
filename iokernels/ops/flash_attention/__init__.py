"""Exact softmax attention: FlashAttention-2 forward and backward. Public functions are in ``api``."""

from .api import flash_attention, flash_attention_varlen
from .sdpa import scaled_dot_product_attention

__all__ = ["flash_attention", "flash_attention_varlen", "scaled_dot_product_attention"]
