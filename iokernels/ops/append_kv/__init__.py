"""New keys and values written into a cache, rotated on the way. Public functions are in ``api`` and ``rotary``."""

from .api import append_kv
from .rotary import apply_rotary, rotary_table

__all__ = ["append_kv", "apply_rotary", "rotary_table"]
