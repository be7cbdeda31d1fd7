"""One file a case: its inputs, its costs, its peers."""

from iokernels.ops import OPERATORS

CASES = (
    *OPERATORS,
    "linear_attention_step",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "short_conv",
    "block_sparse_attention",
    "select_hip",
)
"""What the commands check and time one by one: every operator, and after them the functions of a room that take
arguments of another make. ``bench/cases/<name>.py`` holds each."""
