"""Drop-in ``torch.nn`` modules."""

from .flash_attention import FlashAttention
from .lean_attention import DecodeAttention, KVCache

__all__ = ["DecodeAttention", "FlashAttention", "KVCache"]
