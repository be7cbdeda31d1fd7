"""Long convolutions by fast Fourier transforms that stay on chip. Public functions are in ``api``.

Short filters have their own: ``short_api`` and the files with ``short`` in their names.
"""

from .api import fft_conv, kernel_spectrum
from .options import KernelSpectrum
from .short_api import short_conv, short_conv_step
from .step import LazyState, fft_conv_step, lazy_state

__all__ = [
    "KernelSpectrum",
    "LazyState",
    "fft_conv",
    "fft_conv_step",
    "kernel_spectrum",
    "lazy_state",
    "short_conv",
    "short_conv_step",
]
