"""Drop-in ``torch.nn`` modules."""

from .fft_conv import FFTConv, LongConv, ShortConv1d
from .flash_attention import FlashAttention
from .hyena import HyenaOperator, HyenaState, ImplicitFilter

__all__ = ["FFTConv", "FlashAttention", "HyenaOperator", "HyenaState", "ImplicitFilter", "LongConv", "ShortConv1d"]
