"""Exact softmax attention: FlashAttention-2 forward and backward. Public functions are in ``api``."""

from .api import flash_attention, flash_attention_varlen

__all__ = ["flash_attention", "flash_attention_varlen"]
