"""Drop-in ``torch.nn`` modules."""

from .flash_attention import FlashAttention

__all__ = ["FlashAttention"]
