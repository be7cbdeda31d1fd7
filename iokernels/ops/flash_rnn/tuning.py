"""Launch parameters."""


def max_width(gates: int, itemsize: int) -> int:
    """Widest head."""
    return 128 if itemsize == 2 else 64
