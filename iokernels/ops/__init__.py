"""The operators, one room each."""

OPERATORS = (
    "flash_attention",
    "lean_attention",
    "append_kv",
    "block_sparse_attention",
    "hip_attention",
    "linear_attention",
    "gated_delta_rule",
    "fft_conv",
    "short_conv",
    "flash_rnn",
)
"""Every operator. Its name is the same in ``ops/``, ``tests/ops/`` and ``docs/ops/``; everything that goes over
operators derives from this list."""

CASES = {
    **{name: f"iokernels.ops.{name}.case" for name in OPERATORS},
    "linear_attention_step": "iokernels.ops.linear_attention.case.step",
    "gated_delta_rule_step": "iokernels.ops.gated_delta_rule.case.step",
    "select_hip": "iokernels.ops.hip_attention.case.select",
}
"""What the commands check and time one by one, and the module that describes it: every operator, and the functions of
a room that take arguments of another make."""
