"""One case: a call of the library, the same by an oracle, and what must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from iokernels import UnsupportedError
from iokernels.testing.layouts import storage_of, written_elsewhere

from .jitter import Jitter
from .limits import FAST_EXPONENTIAL, SHORT, UNIT, judge

Results = dict[str, Tensor]


class Wrong(Exception):
    """A result or an outcome that is not right; the message says what."""


class Refused(Exception):
    """An error that says which argument cannot be written to, its negative bit being set: a right answer."""


@dataclass
class Case:
    """What a number means for an operator.

    ``run`` takes ``args``, tensors, numbers and words, and calls the library; ``oracle`` takes the same with float64
    tensors and knows only the formula. Both return their results by name. Of the oracle's, names that begin with an
    underscore are for ``check``.
    """

    operator: str
    run: Callable[[dict[str, Any]], Results]
    oracle: Callable[[dict[str, Any]], Results]
    args: dict[str, Any]
    notes: dict[str, str]
    dtype: torch.dtype
    """In which the operator computes; float32 where it is None of the floating ones."""
    dtypes: dict[str, torch.dtype]
    """Of the results."""
    gradients: tuple[str, ...] = ()
    """The arguments whose gradients are compared."""
    writes: tuple[str, ...] = ()
    """The arguments that the call changes. ``run`` and ``oracle`` return them among their results."""
    exact: tuple[str, ...] = ()
    """The results that have one right value in every bit."""
    still: tuple[str, ...] = ()
    """The arguments that the strays do not move, because the operator does not round them."""
    rms: Mapping[torch.dtype, float] = field(default_factory=dict)
    """What the operator's page promises of half precision, as a relative root mean square of a row."""
    whole: tuple[str, ...] = ()
    """The results that this promise is made for as a whole, not by row."""
    single: tuple[str, ...] = ()
    """The results that are float32 throughout in calls of half precision, and are held to that."""
    seed: int | None = None
    """Of torch's generator, before each call: for what is random by design."""
    constant: tuple[str, ...] = ()
    """The results that have no gradient."""
    cancels: tuple[str, ...] = ()
    """The arguments whose gradient is a difference of sums over ``out * d out``, and has their rounding errors."""
    sound: tuple[str, ...] = ()
    """The arguments that ``run`` itself reads, so that they are never made wrong."""
    least: float = 0.0
    """An error that every result may have: what is left where numbers near 1 cancel."""
    factors: tuple[str, ...] = ()
    """The arguments that enter the results in sums of products alone; see :func:`bounds`."""
    slack: float = 1.0
    """A factor of what the strays allow, for an operator whose intermediate values are larger than its results."""
    check: Callable[[Results, Results], None] | None = None
    """Compares what was got with what the oracle says, where :mod:`.limits` is no measure; raises :class:`Wrong`."""

    @property
    def backend(self) -> str:
        return self.args["backend"]

    def describe(self) -> str:
        """The call, an argument a line."""
        lines = []
        for name, value in self.args.items():
            if value is None or value is False:
                continue
            lines.append(f"    {name} = {self.notes.get(name, repr(value))}")
        if self.gradients:
            lines.append(f"    gradients of {', '.join(self.gradients)}")
        return "\n".join(lines)


def prove(case: Case, generator: torch.Generator, twice: bool) -> float:
    """Run a case and compare all that it must keep. Returns the largest share of an allowed error that was used.

    Raises:
        Wrong: what is not right.
    """
    args = dict(case.args)
    before = {name: storage_of(x) for name, x in args.items() if isinstance(x, Tensor)}
    # A copy of the arguments as they are now, for the oracle: the call may change some in place.
    given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in args.items()}
    got, got_gradients, cotangents = _run(case, args, generator)
    for name, bytes_before in before.items():
        if name not in case.writes:
            if not torch.equal(storage_of(args[name]), bytes_before):
                raise Wrong(f"the call modified {name}")
        elif written_elsewhere(args[name], bytes_before):
            raise Wrong(f"the call wrote beside {name}, into memory of its storage that it does not show")
    if twice:
        _same_bits(case, before, got, got_gradients, cotangents)
    return _compare(case, given, got, got_gradients, cotangents, generator)


def _run(
    case: Case, args: dict[str, Any], generator: torch.Generator, cotangents: Results | None = None
) -> tuple[Results, Results, Results]:
    leaves = {name: args[name].detach().requires_grad_() for name in case.gradients}
    if case.seed is not None:
        torch.manual_seed(case.seed)
    with torch.set_grad_enabled(bool(case.gradients)):
        try:
            got = case.run({**args, **leaves})
        except Exception as error:
            if any(args[name].is_neg() and outcome_is_named(error, {name}) for name in case.writes):
                raise Refused from error
            raise Wrong(f"the call raised {short(error)}") from error
    for name, dtype in case.dtypes.items():
        if got[name].dtype != dtype:
            raise Wrong(f"{name} is {got[name].dtype}; it should be {dtype}")
    if not case.gradients:
        return got, {}, {}
    outputs = [name for name in got if name not in case.constant]
    if cotangents is None:
        cotangents = {name: torch.randn(got[name].shape, generator=generator).to(got[name].dtype) for name in outputs}
    linked = [name for name in outputs if got[name].requires_grad]
    try:
        pulled = torch.autograd.grad(
            [got[name] for name in linked], list(leaves.values()), [cotangents[name] for name in linked],
            allow_unused=True,
        )  # fmt: skip
    except Exception as error:
        raise Wrong(f"the backward pass raised {short(error)}") from error
    found = {}
    for name, gradient in zip(leaves, pulled, strict=True):
        gradient = torch.zeros_like(leaves[name]) if gradient is None else gradient
        if gradient.dtype != leaves[name].dtype or gradient.shape != leaves[name].shape:
            raise Wrong(f"the gradient of {name} is {gradient.dtype} {list(gradient.shape)}")
        found[f"gradient of {name}"] = gradient.detach()
    return {name: x.detach() for name, x in got.items()}, found, cotangents


def _same_bits(case: Case, before: Mapping[str, Tensor], got: Results, gradients: Results, cotangents: Results) -> None:
    got = {name: x.clone() for name, x in got.items()}
    args = dict(case.args)
    for name in case.writes:
        torch.empty(0, dtype=torch.uint8).set_(args[name].untyped_storage()).copy_(before[name])
    again, gradients_again, _ = _run(case, args, torch.Generator(), cotangents)
    for name, x in {**got, **gradients}.items():
        if not torch.equal(_bits(x), _bits({**again, **gradients_again}[name])):
            raise Wrong(f"{name} has other bits when the call is made again")


def _bits(x: Tensor) -> Tensor:
    return storage_of(x.detach().resolve_neg().clone(memory_format=torch.contiguous_format))


def _compare(
    case: Case, given: dict[str, Any], got: Results, gradients: Results, cotangents: Results,
    generator: torch.Generator,
) -> float:  # fmt: skip
    expected = evaluate(case, given, cotangents, torch.float64)
    found = {**got, **gradients}
    for name, x in expected.items():
        if name.startswith("_"):
            continue
        if name not in found:
            raise Wrong(f"there is no {name}")
        if found[name].shape != x.shape:
            raise Wrong(f"{name} has shape {list(found[name].shape)}; it should have {list(x.shape)}")
    if case.check is not None:
        case.check(found, expected)
        return 0.0
    of_unit: dict[float | None, list[Results]] = {}

    def strays(unit: float | None) -> list[Results]:
        if unit not in of_unit:
            of_unit[unit] = _strays(case, given, cotangents, generator, unit)
        return of_unit[unit]

    worst = 0.0
    for name, x in expected.items():
        if name.startswith("_"):
            continue
        if name in case.exact:
            same = (found[name].double() == x) | (found[name].isnan() & x.isnan())
            if not bool(same.all()):
                at = tuple(int(i) for i in torch.unravel_index((~same).int().argmax(), x.shape))
                raise Wrong(f"{name} at {at}: got {found[name][at].item()}, expected {x[at].item()}, exactly")
            continue
        work = found[name].dtype if found[name].dtype.itemsize <= case.dtype.itemsize else case.dtype
        work = found[name].dtype if name in case.single else work
        if work == torch.float16 and x.isfinite().any() and x[x.isfinite()].abs().max() > 3e4:
            continue  # it may overflow
        whole = name in case.whole or name.startswith("gradient")
        promised = case.rms.get(case.dtype)
        if promised is not None and (x.numel() if whole else x[..., :1].numel() and x.shape[-1]) < SHORT:
            promised = None  # a mean over so few may have cancelled
        unit = None if promised is None and name not in case.single else UNIT[torch.float32]
        least = FAST_EXPONENTIAL if name in case.single else case.least
        if name.removeprefix("gradient of ") in case.cancels and name.startswith("gradient"):
            sums = sum(float((expected[n] * cotangents[n].double()).abs().sum()) for n in cotangents)
            least = 4.0 * UNIT[case.dtype] * sums
        around = [s[name] for s in strays(unit)]
        passed = x.isfinite() & (x.abs() > torch.finfo(found[name].dtype).max)
        if case.factors and bool((x.isfinite() & ~found[name].isfinite()).any()):
            passed |= x.isfinite() & ~bounds(case, given)[name].isfinite()
        verdict = judge(
            found[name], x, around, work, rms=promised, least=least, slack=case.slack,
            whole=promised is not None and whole, passed=passed,
        )  # fmt: skip
        worst = max(worst, verdict.ratio)
        if verdict.ratio > 1.0:
            raise Wrong(f"{name}: {verdict}")
    return worst


def bounds(case: Case, given: Mapping[str, Any]) -> Results:
    """The oracle in the dtype of sums, of factors that are positive and at least 1, without decays.

    A product of such factors bounds each part of it, and a sum of such products each sum of some: where this is finite,
    no order in which the formula can be worked out has a number in it that overflows.
    """

    def raised(name: str, x: Any) -> Any:
        if name in case.factors:
            return x.detach().abs().clamp(min=1.0) if isinstance(x, Tensor) else x if x is None else max(abs(x), 1.0)
        return torch.zeros_like(x) if name == "log_decay" and x is not None else x

    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        return evaluate(replace(case, gradients=()), {n: raised(n, x) for n, x in given.items()}, {}, dtype)


def evaluate(
    case: Case, given: Mapping[str, Any], cotangents: Results, dtype: torch.dtype, jitter: Jitter | None = None
) -> Results:
    """The oracle's results and gradients of the ``given`` arguments, computed in ``dtype``, as float64.

    ``jitter`` is what the oracle applies to the intermediate values that kernels round.
    """
    dtypes = {name: x.dtype for name, x in given.items() if isinstance(x, Tensor)}
    args: dict[str, Any] = {"jitter": jitter or Jitter(), "dtypes": dtypes}
    for name, x in given.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach().to(dtype).clone(memory_format=torch.contiguous_format).resolve_neg()
            if name in case.gradients:
                x.requires_grad_()
        args[name] = x
    with torch.set_grad_enabled(bool(case.gradients)):
        results = case.oracle(args)
    found = {name: x.detach() if name.startswith("_") else x.detach().double() for name, x in results.items()}
    if case.gradients:
        names = [name for name in cotangents if results[name].requires_grad]
        leaves = [args[name] for name in case.gradients]
        pulled: Any = [None] * len(leaves)
        if names:
            pulled = torch.autograd.grad(
                [results[name] for name in names], leaves, [cotangents[name].to(dtype) for name in names],
                allow_unused=True,
            )  # fmt: skip
        for name, leaf, gradient in zip(case.gradients, leaves, pulled, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(leaf).double() if gradient is None else gradient.double()
    return found


def _strays(
    case: Case, given: Mapping[str, Any], cotangents: Results, generator: torch.Generator, unit: float | None
) -> list[Results]:
    """The oracle of arguments that were moved, and the oracle in float32; see :mod:`.limits`."""

    single = UNIT[torch.float64 if case.dtype == torch.float64 else torch.float32]
    own_unit = UNIT[case.dtype] if unit is None or case.rms else unit

    def moved(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or name in case.still:
            return x
        own = case.dtype if x.dtype.itemsize > case.dtype.itemsize else x.dtype
        return Jitter(UNIT.get(own, 0.0) if unit is None else unit, 0.0, generator)(x.detach().double())

    found = []
    for side in (1.0, -1.0):
        inputs = {name: moved(name, x) for name, x in given.items()}
        values = Jitter(own_unit, single, generator, side)
        found.append(evaluate(case, inputs, cotangents, torch.float64, values))
    if case.dtype != torch.float64:
        found.append(evaluate(case, given, cotangents, torch.float32))
    return found


def short(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def outcome_is_named(error: BaseException, names: set[str]) -> bool:
    """Whether an error is one of those that a wrong call may end in, and names an argument."""
    return isinstance(error, (ValueError, TypeError, UnsupportedError)) and any(n in str(error) for n in names)
