"""Attention to lists of key blocks, and the format of the lists. Public functions are in ``api``."""

from .api import block_sparse_attention
from .index import BlockIndex

__all__ = ["BlockIndex", "block_sparse_attention"]
