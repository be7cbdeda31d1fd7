"""Drop-in ``torch.nn`` modules."""

from .flash_attention import FlashAttention
from .linear_attention import BasedAttention, GatedDeltaNet, LightningAttention, Retention

__all__ = ["BasedAttention", "FlashAttention", "GatedDeltaNet", "LightningAttention", "Retention"]
