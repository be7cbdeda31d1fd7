"""What the commands know of an operator: one frozen :class:`Case`, filled in by ``case/`` of its room.

``check``, ``bench`` and the tests use the same object, so they cannot disagree on inputs, costs or options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from iokernels.autotune import Tunable
from iokernels.ops import CASES
from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case.accounts import Accounts
from iokernels.testing.case.shape import Shape, UsageError, Vocabulary

Pass = Literal["fwd", "bwd", "both"]
PASSES: tuple[Pass, ...] = ("fwd", "bwd", "both")
"""Forward without a graph, backward alone, and forward followed by backward."""


class Limit(NamedTuple):
    """The relative RMS error that a result may have, over rows of its last ``over`` dimensions (0: all of it)."""

    relative_rms: float
    over: int = 1


Outputs = dict[str, Tensor]
"""The results of one forward call by name."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradients that its backward pass starts from.

    ``tensors`` are the arguments that want gradients, by name (leaves); ``options`` all the others, keyword to value;
    ``output_gradients`` holds one tensor for every output that takes part in the backward pass. ``seed`` is what
    torch's generator is set to before a call that is compared with another.
    """

    shape: Shape
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    output_gradients: Mapping[str, Tensor]
    seed: int = 0

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype: fresh leaves of the same strides. ``options`` stay as they are."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_(x.requires_grad)

        def gradient(name: str, x: Tensor) -> Tensor:
            # Statistics are float32 whatever the inputs are; only float64 inputs make them float64.
            return x.to(dtype) if x.dtype == self.dtype or dtype == torch.float64 else x

        return replace(
            self,
            tensors={name: leaf(x) for name, x in self.tensors.items()},
            output_gradients={name: gradient(name, x) for name, x in self.output_gradients.items()},
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor."""
        return next(iter(self.tensors.values())).dtype


@dataclass(frozen=True)
class Point:
    """One combination of options that ``check`` proves. ``quick`` marks the few that ``--quick`` keeps."""

    name: str
    shape: Shape
    quick: bool = False


@dataclass(frozen=True)
class Implementation:
    """What one backend of an operator takes, for ``list``: a test holds it against the dispatcher."""

    dtypes: tuple[torch.dtype, ...]
    widths: str
    passes: str = "fwd, bwd"


Prepare = Callable[[Inputs], Callable[[], Outputs]]
"""Turns inputs into a call without arguments, doing outside it what a user would do once (a mask, a compilation).
Raises :class:`iokernels.UnsupportedError`, whose text says why, where it does not compute the same function."""


@dataclass(frozen=True)
class Compilation:
    """How the kernels of one backend of an operator are compiled without a GPU.

    ``launch(shape, dtype, pass)`` launches the kernels of a pass through their real launchers with meta tensors.
    ``points`` are the shapes and dtypes that together compile every branch of every kernel. ``spills`` is how many
    bytes a thread the worst of them is known to keep in local memory, as the operator's page says.
    """

    launch: Callable[[Shape, torch.dtype, Pass], None]
    points: tuple[tuple[Shape, torch.dtype], ...]
    spills: int = 0


@dataclass(frozen=True)
class Tuning:
    """The kernels of an operator whose launch parameters can be tuned.

    ``tunables`` has them by name, and ``kernels(shape)`` names those that a call of ``shape`` launches.
    ``problem(shape, dtype, kernel, device)`` is what the choice for one of them depends on, and
    ``launch(shape, dtype, kernel)`` launches it with meta tensors. ``leaves`` names the arguments whose gradients make
    a backward pass launch it, those of them that a call has: none for a kernel of the forward pass.
    ``functions`` has the names of kernel functions that do not begin as the tunable does.
    """

    tunables: Mapping[str, Tunable[Any]]
    kernels: Callable[[Shape], tuple[str, ...]]
    problem: Callable[[Shape, torch.dtype, str, DeviceSpec], Any]
    launch: Callable[[Shape, torch.dtype, str], None]
    leaves: Mapping[str, tuple[str, ...]]
    functions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One operator.

    ``make_inputs(shape, dtype, device, seed)`` draws inputs; the same arguments give the same values.
    ``run(inputs, backend)`` calls the public function. ``flops(shape, pass)`` counts the floating-point operations
    that the algorithm cannot avoid, ``floor_bytes(shape, dtype, pass)`` the bytes when each input is read once and each
    output written once. ``reference_bytes(shape)`` estimates what the float64 reference needs for both passes, and
    ``smaller(shape)`` is a cheaper shape with the same options (itself when there is none). ``peers(device)`` maps a
    name to a :data:`Prepare`, or to the reason why it is missing. ``check_points()`` covers every option. ``accounts``,
    ``compilation`` and ``tuning`` describe Triton kernels, and are None where there are none; ``cuda_accounts`` and
    ``cuda_compilation`` those in CUDA C++.

    ``passes`` are those that the operator has: forward alone where it takes no gradients. ``limit(name, dtype)`` is
    what the output or gradient (``d`` and the argument) of that name may be wrong by; without it the budget is a
    multiple of the error of the eager formula (:mod:`iokernels.testing.budget`). ``documented`` names the case on
    whose page the functions are documented, where it is another.
    """

    operator: str
    functions: tuple[str, ...]
    vocabulary: Vocabulary
    implementations: Mapping[str, Implementation]
    suites: Mapping[str, tuple[Shape, ...]]
    make_inputs: Callable[[Shape, torch.dtype, torch.device, int], Inputs]
    run: Callable[[Inputs, str], Outputs]
    flops: Callable[[Shape, Pass], int]
    floor_bytes: Callable[[Shape, torch.dtype, Pass], int]
    reference_bytes: Callable[[Shape], int]
    smaller: Callable[[Shape], Shape]
    check_points: Callable[[], tuple[Point, ...]]
    peers: Callable[[torch.device], Mapping[str, Prepare | str]] = field(default=lambda device: {})
    accounts: Accounts | None = None
    compilation: Compilation | None = None
    cuda_accounts: Accounts | None = None
    cuda_compilation: Compilation | None = None
    tuning: Tuning | None = None
    passes: tuple[Pass, ...] = PASSES
    limit: Callable[[str, torch.dtype], Limit] | None = None
    documented: str = ""

    @property
    def page(self) -> str:
        """The name of the page that documents the functions."""
        return self.documented or self.operator

    def differentiates(self, backend: str) -> bool:
        """Whether the operator has gradients, and ``backend`` computes them."""
        return "bwd" in self.passes and "bwd" in self.implementations[backend].passes

    def suite(self, name: str) -> tuple[Shape, ...]:
        """The shapes of a suite. Raises :class:`UsageError`."""
        if name not in self.suites:
            raise UsageError(f"suite: {self.operator} has no suite {name!r}; it has {', '.join(self.suites)}")
        return self.suites[name]

    def passes_of(self, asked: tuple[Pass, ...] | None) -> tuple[Pass, ...]:
        """Those of ``asked`` that the operator has; all that it can do at once if nothing was asked for.

        Raises:
            UsageError: it has none of them.
        """
        if asked is None:
            return self.passes[-1:]
        found: tuple[Pass, ...] = tuple(which for which in self.passes if which in asked)
        if not found:
            raise UsageError(f"--pass is {','.join(asked)}, and {self.operator} takes no gradients: it has fwd only")
        return found

    @property
    def usual_suite(self) -> str:
        """The suite for a GPU: ``train``, or the first that is not ``quick`` where nothing is trained."""
        return "train" if "train" in self.suites else next((name for name in self.suites if name != "quick"), "quick")

    def within(self, shape: Shape, limit: int) -> Shape:
        """``shape``, or the first of its :attr:`smaller` ones whose reference fits into ``limit`` bytes."""
        while self.reference_bytes(shape) > limit and (smaller := self.smaller(shape)) != shape:
            shape = smaller
        return shape


def load(operator: str) -> Case:
    """The case of an operator. Raises :class:`UsageError` for a name that is none."""
    if operator not in CASES:
        raise UsageError(f"there is no operator {operator!r}; there are {', '.join(CASES)}")
    return import_module(CASES[operator]).CASE


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
"""Dtypes by the names that the command line takes."""


def dtype_name(dtype: torch.dtype) -> str:
    """``bf16`` for ``torch.bfloat16``."""
    return next(name for name, value in DTYPES.items() if value == dtype)
