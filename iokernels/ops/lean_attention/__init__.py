"""Decode attention: few queries against long, ragged caches of keys and values."""

from .api import lean_attention

__all__ = ["lean_attention"]
