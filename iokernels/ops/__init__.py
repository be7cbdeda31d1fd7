"""The operators, one room each."""

OPERATORS = ("flash_attention", "lean_attention", "linear_attention", "fft_conv", "flash_rnn", "hip_attention")
"""Every operator. Its name is the same in ``ops/``, ``nn/``, ``bench/cases/``, ``tests/ops/`` and ``docs/ops/``."""
