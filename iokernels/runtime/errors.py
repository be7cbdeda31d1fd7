"""The exceptions that callers see, beside the builtin ``ValueError`` and ``TypeError``."""


class UnsupportedError(RuntimeError):
    """A valid call that the named backend cannot run.

    The message says why, and which backends can.
    """


class KernelError(RuntimeError):
    """A CUDA kernel could not be compiled, loaded, launched or emulated."""


class KernelCompileError(KernelError):
    """A compiler refused a kernel. The message has its log."""


class KernelLaunchError(KernelError):
    """The driver refused to load or to launch a kernel. The message has its error and what was asked of it."""


class KernelFault(KernelError, AssertionError):
    """The emulator stopped a kernel: a stray access, a race, a deadlock. The message says where."""
