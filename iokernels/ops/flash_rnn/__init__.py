"""Recurrent networks with state tracking, fused over time. Public functions are in ``api``."""

from .api import flash_rnn

__all__ = ["flash_rnn"]
