"""Short depthwise causal convolutions. Public functions are in ``api``."""

from .api import short_conv, short_conv_step

__all__ = ["short_conv", "short_conv_step"]
