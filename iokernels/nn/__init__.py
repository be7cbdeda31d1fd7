"""Drop-in ``torch.nn`` modules."""

from .flash_attention import FlashAttention
from .lean_attention import DecodeAttention, KVCache

__all__ = ["DecodeAttention", "FlashAttention", "KVCache"]
from .linear_attention import BasedAttention, GatedDeltaNet, LightningAttention, Retention

__all__ = ["BasedAttention", "FlashAttention", "GatedDeltaNet", "LightningAttention", "Retention"]
