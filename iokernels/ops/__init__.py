"""The operators, one room each."""

OPERATORS = ("flash_attention", "fft_conv")
"""Every operator. Its name is the same in ``ops/``, ``nn/``, ``bench/cases/``, ``tests/ops/`` and ``docs/ops/``."""
