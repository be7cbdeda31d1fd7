"""The operators, one room each."""

OPERATORS = ("flash_attention", "flash_rnn")
"""Every operator. Its name is the same in ``ops/``, ``nn/``, ``bench/cases/``, ``tests/ops/`` and ``docs/ops/``."""
