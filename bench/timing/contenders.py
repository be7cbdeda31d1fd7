"""Who is timed: an operator's backends and whatever else could be called, each proved right before it gets a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from iokernels.bench.timing import machine
from iokernels.runtime import device as devices
from iokernels.testing.case import Case, Inputs, Outputs, Prepare
from iokernels.testing.case.proof import Proof, Verdict
from iokernels.testing.case.shape import Shape, UsageError

_CPU_REFERENCE_BYTES = 2**30
"""On a CPU the float64 reference may take this much: more would take minutes."""


@dataclass(frozen=True)
class Contender:
    """A row to be: a backend or a peer, or the reason why it has no time."""

    name: str
    kind: str
    prepare: Prepare | None = None
    status: str = ""
    reason: str = ""


def contenders(case: Case, device: torch.device, backends: Sequence[str] | None = None) -> list[Contender]:
    """The backends (all but the reference, or the named ones) and then the peers of an operator on ``device``.

    Raises :class:`UsageError` for a backend that the operator does not have.
    """
    found = []
    for name in backends or [name for name in case.implementations if name != "reference"]:
        if name not in case.implementations:
            raise UsageError(f"{case.operator} has no backend {name!r}; it has {', '.join(case.implementations)}")
        refusal = machine.backend_refusal(name, device)
        if refusal is not None:
            found.append(Contender(name, "backend", None, "refused", refusal))
        elif name == "triton" and devices.INTERPRET:
            found.append(Contender(name, "backend", None, "not timed", "interpreter: not timed"))
        elif name == "cuda" and device.type == "cpu":
            found.append(Contender(name, "backend", None, "not timed", "emulator: not timed"))
        else:
            found.append(Contender(name, "backend", partial(_backend, case, name)))
    for name, peer in case.peers(device).items():
        if isinstance(peer, str):
            found.append(Contender(name, "peer", None, "missing", peer))
        else:
            found.append(Contender(name, "peer", peer))
    return found


def _backend(case: Case, backend: str, inputs: Inputs) -> Callable[[], Outputs]:
    return partial(case.run, inputs, backend)


def baseline(among: Sequence[Contender], named: str | None) -> str | None:
    """The name of the row that the others are compared with: the named one, or the first peer that is here."""
    names = [contender.name for contender in among]
    if named is not None and named not in names:
        raise UsageError(f"--baseline is {named!r}; the rows are {', '.join(names)}")
    peers = [contender.name for contender in among if contender.kind == "peer" and contender.prepare is not None]
    return named or next(iter(peers), None)


def prove(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, among: Sequence[Contender], seed: int
) -> tuple[Shape, dict[str, Verdict]]:
    """Prove every contender, at ``shape`` or at a smaller one whose float64 reference can be computed here."""
    limit = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _CPU_REFERENCE_BYTES
    checked = case.within(shape, limit)
    proof = Proof(case, checked, dtype, device, seed)
    found = {}
    for contender in among:
        if contender.prepare is not None:
            found[contender.name] = proof.judge(
                lambda inputs, prepare=contender.prepare: prepare(inputs)(),
                gradients_too=contender.name not in case.implementations or case.differentiates(contender.name),
            )
    return checked, found
