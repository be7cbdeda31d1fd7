"""HiP attention: hierarchical selection of the key blocks that block-sparse attention visits.

``api`` attends; ``select`` has the selectors, ``cache`` what decoding keeps."""

from .api import hip_attention
from .cache import SelectionCache
from .options import HipStage
from .select import PageBounds, page_bounds, select_exact, select_hip, select_quest
from .select.lists import mix_heads, select_dense, select_window

__all__ = [
    "HipStage",
    "PageBounds",
    "SelectionCache",
    "hip_attention",
    "mix_heads",
    "page_bounds",
    "select_dense",
    "select_exact",
    "select_hip",
    "select_quest",
    "select_window",
]
