"""Sparse attention: the format and operator of block-sparse attention, and hierarchical selection of its blocks."""

from .api import PageBounds, page_bounds, select_exact, select_hip, select_quest
from .attend_api import hip_attention
from .block_index import BlockIndex
from .select_lists import mix_heads, select_dense, select_window
from .select_options import HipStage
from .selection_cache import SelectionCache
from .sparse_api import block_sparse_attention

__all__ = [
    "BlockIndex",
    "HipStage",
    "PageBounds",
    "SelectionCache",
    "block_sparse_attention",
    "hip_attention",
    "mix_heads",
    "page_bounds",
    "select_dense",
    "select_exact",
    "select_hip",
    "select_quest",
    "select_window",
]
