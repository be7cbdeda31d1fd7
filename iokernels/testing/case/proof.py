"""Is a result right? Outputs and gradients against the float64 reference, on the same inputs.

The error of a result may be a small multiple of the error that the reference itself makes when it runs in the low
precision (:mod:`iokernels.testing.budget`). It is reported as a fraction of that budget: up to 1 is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.registration.precision import eagerly
from iokernels.testing.budget import FORWARD, GRADIENT, Element, fail, judge, relative_rms, worst_of_rows
from iokernels.testing.case import Case, Inputs, Outputs, Shape

_FLOAT32_TO_FLOAT64 = 1e6
"""How much smaller than in float32 an error in float64 must be. Its precision is 5e8 times higher."""

Run = Callable[[Inputs], Outputs]
"""A forward call on given inputs, differentiable."""


@dataclass(frozen=True)
class Verdict:
    """What was found: ``ok``, ``wrong``, ``refused`` (a valid call that this backend does not take) or ``failed``.

    ``ratio`` is the worst error as a fraction of its budget and ``where`` the tensor that has it; ``reason`` is a
    sentence for the other outcomes. Of a wrong result it names the worst element.
    """

    status: str
    ratio: float | None = None
    where: str = ""
    reason: str = ""

    @property
    def bad(self) -> bool:
        """Whether this makes a command fail: a refusal does not."""
        return self.status in ("wrong", "failed")

    def __str__(self) -> str:
        if self.ratio is None:
            return self.status
        return f"{self.status} {self.ratio:.2g}x" + (f" ({self.where})" if self.status == "wrong" else "")

    def require_ok(self, of: str = "") -> None:
        """Raise an AssertionError that says what was found, and how it is repeated, unless it is ``ok``."""
        if self.status != "ok":
            fail(": ".join(filter(None, (of, str(self), self.reason))))


def results(inputs: Inputs, run: Run, *, gradients_too: bool = True) -> dict[str, Tensor]:
    """Outputs and gradients of one call by name, detached. Torch's generator is set to the seed of the inputs."""
    torch.manual_seed(inputs.seed)
    if not gradients_too:
        with torch.no_grad():
            return {name: output.detach() for name, output in run(inputs).items()}
    outputs = run(inputs)
    used = [name for name in inputs.output_gradients if name in outputs]
    wanted = {name: x for name, x in inputs.tensors.items() if x.requires_grad}
    gradients: tuple[Tensor | None, ...] = ()
    if wanted:
        gradients = torch.autograd.grad(
            [outputs[name] for name in used],
            list(wanted.values()),
            [inputs.output_gradients[name] for name in used],
            allow_unused=True,
        )
    found = {name: output.detach() for name, output in outputs.items()}
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return found


class Proof:
    """The truth for one set of inputs, computed once and held against any number of implementations.

    The largest error in a small tensor is a matter of luck: with ``draws`` above 1 the budget follows the worst of that
    many draws of such inputs, the one that is judged among them.
    """

    def __init__(
        self, case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, *, draws: int = 1
    ) -> None:
        def reference(inputs: Inputs) -> Outputs:
            return case.run(inputs, "reference")

        self._limit = case.limit
        # What eager arithmetic of this precision makes of the same formula. For float64 there is nothing more exact
        # to compare with, so a millionth of the budget of float32 is allowed.
        precision = torch.float32 if dtype == torch.float64 else dtype
        self._unlucky: dict[str, float] = {}
        for draw in reversed(range(draws)):
            self.inputs = case.make_inputs(shape, dtype, device, seed + draw)
            self.truth = results(self.inputs.to(torch.float64), reference)
            with eagerly():
                self.low = results(self.inputs if dtype == precision else self.inputs.to(precision), reference)
            for name, low in self.low.items():
                self._unlucky[name] = max(self._unlucky.get(name, 0.0), _largest_error(low, self.truth[name]))

    def judge(self, run: Run, *, gradients_too: bool = True) -> Verdict:
        """Run an implementation on these inputs and compare all that it returns. Never raises for a broken one.

        Without ``gradients_too`` it runs while no gradients are recorded, and its outputs alone are compared: for one
        that has no others.
        """
        try:
            return self._compare(results(self.inputs, run, gradients_too=gradients_too))
        except UnsupportedError as refusal:
            return Verdict("refused", reason=str(refusal))
        except Exception as error:  # a kernel may break in any way: it is reported, and the others still run
            return Verdict("failed", reason=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")

    def _compare(self, found: dict[str, Tensor]) -> Verdict:
        worst, where, element = 0.0, "", None
        for name, actual in found.items():
            truth = self.truth[name]
            dtype = torch.float64 if self.inputs.dtype == torch.float64 else self.low[name].dtype
            for what, is_, must_be in (("shape", actual.shape, truth.shape), ("dtype", actual.dtype, dtype)):
                if is_ != must_be:
                    reason = f"{name} has the {what} {_plain(is_)} and should have {_plain(must_be)}"
                    return Verdict("wrong", float("inf"), name, reason)
            ratio, at = self._of_budget(name, actual) if self._limit is None else self._of_limit(name, actual)
            if ratio > worst:
                worst, where, element = ratio, name, at
        if worst <= 1.0:
            return Verdict("ok", worst, where)
        reason = f"the error of {where} is {worst:.3g} times what its precision allows, most {element}"
        return Verdict("wrong", worst, where, reason)

    def _of_budget(self, name: str, actual: Tensor) -> tuple[float, Element | None]:
        truth, low = self.truth[name], self.low[name]
        factor = GRADIENT if name.removeprefix("d") in self.inputs.tensors else FORWARD
        judgement = judge(actual, truth, low, factor=factor)
        more = factor * (self._unlucky[name] - _largest_error(low, truth))
        ratio = replace(judgement, limit=judgement.limit + more).ratio
        return ratio * (_FLOAT32_TO_FLOAT64 if self.inputs.dtype == torch.float64 else 1.0), judgement.worst

    def _of_limit(self, name: str, actual: Tensor) -> tuple[float, Element | None]:
        assert self._limit is not None
        allowed, over = self._limit(name, self.inputs.dtype)
        dims = tuple(range(max(actual.dim() - over, 0), actual.dim())) if over else tuple(range(actual.dim()))
        errors = relative_rms(actual, self.truth[name], dims)
        if not errors.numel():
            return 0.0, None
        return errors.max().item() / allowed, worst_of_rows(actual, self.truth[name], dims)


def prove_point(case: Case, backend: str, shape: Shape, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Hold a backend to the reference on one shape.

    Raises:
        AssertionError: it is wrong, breaks or refuses. The message names the tensor and its worst element.
    """
    verdict = Proof(case, shape, dtype, torch.device(device)).judge(lambda inputs: case.run(inputs, backend))
    verdict.require_ok(f"{case.operator}, {backend}, {_plain(dtype)}, {shape}")


def _largest_error(low: Tensor, truth: Tensor) -> float:
    """The largest error where there is a finite number to miss."""
    errors = torch.where(truth.isfinite(), low.double() - truth, 0.0).abs()
    return errors.max().item() if errors.numel() else 0.0


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")
