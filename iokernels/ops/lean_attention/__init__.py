"""Decode attention: few queries against long, ragged caches of keys and values."""

from .api import lean_attention
from .append_api import append_kv
from .rotary import apply_rotary, rotary_table

__all__ = ["append_kv", "apply_rotary", "lean_attention", "rotary_table"]
