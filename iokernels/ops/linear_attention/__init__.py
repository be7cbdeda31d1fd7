"""Linear attention and its family. With scalar decay, in one design: Lightning Attention-2, retention, simple gated
linear attention, Mamba-2 and BASED (``api``; decays in use by name in ``decays``). And the gated delta rule, which
erases what it overwrites (``delta_api``)."""

from .api import lightning_attention, linear_attention, linear_attention_state, linear_attention_step
from .decays import alibi_slopes, minimax_slopes, retention_slopes
from .delta_api import gated_delta_rule, gated_delta_rule_step

__all__ = [
    "alibi_slopes",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "lightning_attention",
    "linear_attention",
    "linear_attention_state",
    "linear_attention_step",
    "minimax_slopes",
    "retention_slopes",
]
