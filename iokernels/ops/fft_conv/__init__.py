"""Convolutions along the sequence: short depthwise filters. Public functions are in ``short_api``."""

from .short_api import short_conv, short_conv_step

__all__ = ["short_conv", "short_conv_step"]
