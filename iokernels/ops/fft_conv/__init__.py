"""Long convolutions by fast Fourier transforms that stay on chip. Public functions are in ``api``."""

from .api import fft_conv, kernel_spectrum
from .options import KernelSpectrum
from .step import LazyState, fft_conv_step, lazy_state

__all__ = [
    "KernelSpectrum",
    "LazyState",
    "fft_conv",
    "fft_conv_step",
    "kernel_spectrum",
    "lazy_state",
]
