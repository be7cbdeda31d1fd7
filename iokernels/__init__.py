"""IO-aware attention and sequence operators for PyTorch.

Functions take ``[batch, heads, sequence, width]`` tensors of any strides; the modules in :mod:`iokernels.nn` replace
those of :mod:`torch.nn`. ``python -m iokernels`` checks and times every operator on this machine.
"""

from . import nn
from ._version import __version__
from .ops.fft_conv import (
    KernelSpectrum,
    LazyState,
    fft_conv,
    fft_conv_step,
    kernel_spectrum,
    lazy_state,
    short_conv,
    short_conv_step,
)
from .ops.flash_attention import flash_attention, flash_attention_varlen, scaled_dot_product_attention
from .runtime.dispatch import use_backend
from .runtime.errors import UnsupportedError

__all__ = [
    "KernelSpectrum",
    "LazyState",
    "UnsupportedError",
    "__version__",
    "fft_conv",
    "fft_conv_step",
    "flash_attention",
    "flash_attention_varlen",
    "kernel_spectrum",
    "lazy_state",
    "nn",
    "scaled_dot_product_attention",
    "short_conv",
    "short_conv_step",
    "use_backend",
]
