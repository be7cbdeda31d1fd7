"""Which backend runs a call.

The rule, in order:

1. ``backend="..."`` of the call: that backend runs, or ``UnsupportedError`` says why it cannot.
2. The innermost :func:`use_backend`: the same.
3. Neither: the first backend of the device's list that accepts the call. On a GPU ``triton``, then ``torch``;
   anywhere else ``torch``. ``reference`` is never chosen for anyone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from .errors import UnsupportedError
from .registration.transforms import derivative
from .scoped import Scoped

BACKENDS = ("reference", "torch", "triton", "cuda")

PREFERENCE: Mapping[str, tuple[str, ...]] = {"cuda": ("triton", "torch")}
"""Device type to the backends tried for it, best first. Types not listed here use ``torch``."""

Refusal = Callable[[], str | None]
"""Returns why a backend cannot run a call, as the end of a sentence, or None when it can."""

_override: Scoped[str | None] = Scoped(None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator called inside on the backend ``name``, unless the call names its own.

    The setting belongs to the process, not to the thread: compiled code and the threads of a backward pass or a data
    loader have to see it. Of several the one entered last counts, in whichever order they end; each ends its own
    alone. A thread that wants a backend for itself names it in the call. An operator that cannot run there raises
    :class:`~iokernels.UnsupportedError`; nothing falls back.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name is {name!r}; it must be one of {', '.join(BACKENDS)}")
    with _override.set(name):
        yield


def requested(backend: str | None) -> str | None:
    """The backend that the call or an enclosing :func:`use_backend` names, if any."""
    return _override.value if backend is None else backend


def choose(operator: str, backend: str | None, device_type: str, refusals: Mapping[str, Refusal]) -> str:
    """Apply the rule above.

    ``backend`` is what :func:`requested` returned; ``refusals`` holds one entry for each backend that the
    operator has.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{operator}: backend is {backend!r}; it must be None or one of {', '.join(refusals)}")
    asked = derivative()
    if asked is not None and backend != "reference":
        which = "no backend that is chosen by default has" if backend is None else f"backend {backend!r} has not"
        able = refusals.get("reference", lambda: "there is none")() is None
        raise UnsupportedError(
            f"{operator}: the call asks for {asked}, which {which}. "
            + ("Backends that can: reference." if able else "No other backend can either.")
        )
    if backend is not None:
        reason = refusals[backend]() if backend in refusals else "it has no such implementation"
        if reason is None:
            return backend
        able = [name for name, refuses in refusals.items() if name != backend and refuses() is None]
        raise UnsupportedError(
            f"{operator}: backend {backend!r} cannot run this call: {reason}. "
            + (f"Backends that can: {', '.join(able)}." if able else "No other backend can either.")
        )
    reasons = []
    for name in PREFERENCE.get(device_type, ("torch",)):
        reason = refusals[name]() if name in refusals else "it has no such implementation"
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedError(f"{operator}: no backend can run this call on {device_type} ({'; '.join(reasons)}).")
