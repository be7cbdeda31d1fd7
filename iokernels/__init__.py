"""IO-aware attention and sequence operators for PyTorch.

Functions take ``[batch, heads, sequence, width]`` tensors of any strides; the modules in :mod:`iokernels.nn` replace
those of :mod:`torch.nn`. ``python -m iokernels`` checks and times every operator on this machine.
"""

from . import nn
from ._version import __version__
from .ops.flash_attention import flash_attention, flash_attention_varlen, scaled_dot_product_attention
from .ops.flash_rnn import flash_rnn
from .runtime.dispatch import use_backend
from .runtime.errors import UnsupportedError

__all__ = [
    "UnsupportedError",
    "__version__",
    "flash_attention",
    "flash_attention_varlen",
    "flash_rnn",
    "nn",
    "scaled_dot_product_attention",
    "use_backend",
]
