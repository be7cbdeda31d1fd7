"""Linear attention with scalar decay, in one design: Lightning Attention-2, retention, simple gated linear attention,
Mamba-2 and BASED. Public functions are in ``api``; decays in use have their names in ``decays``."""

from .api import lightning_attention, linear_attention, linear_attention_state, linear_attention_step
from .decays import alibi_slopes, minimax_slopes, retention_slopes

__all__ = [
    "alibi_slopes",
    "lightning_attention",
    "linear_attention",
    "linear_attention_state",
    "linear_attention_step",
    "minimax_slopes",
    "retention_slopes",
]
