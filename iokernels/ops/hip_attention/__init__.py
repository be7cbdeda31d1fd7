"""Block-sparse attention over lists of key blocks: the format, the operator and its kernels."""

from .block_index import BlockIndex
from .sparse_api import block_sparse_attention

__all__ = ["BlockIndex", "block_sparse_attention"]
