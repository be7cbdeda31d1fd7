"""The exceptions that callers see, beside the builtin ``ValueError`` and ``TypeError``."""


class UnsupportedError(RuntimeError):
    """A valid call that the named backend cannot run.

    The message says why, and which backends can.
    """
