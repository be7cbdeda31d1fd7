"""Every module in every situation of PyTorch's that people put modules in; what is expected stands on the page."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from iokernels import UnsupportedError

from .page import cells
from .subjects import BATCH, LENGTH, MODULES, Module

SITUATIONS: dict[str, Callable[[Module], None]] = {}


def situation(name: str) -> Callable[[Callable[[Module], None]], Callable[[Module], None]]:
    def enter(check: Callable[[Module], None]) -> Callable[[Module], None]:
        SITUATIONS[name] = check
        return check

    return enter


def made(subject: Module, **options: Any) -> nn.Module:
    return subject.make(**options).eval()


def same(actual: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(subject: Module, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a weighted sum of the result, by the input and all parameters."""
    x = x.detach().requires_grad_()
    y = subject.call(module, x)
    weights = torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(y)
    return list(torch.autograd.grad((y * weights).sum(), [x, *module.parameters()], allow_unused=True))


def same_gradients(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            same(one, other, tolerance)


@situation("deepcopy, pickle")
def check_copies(subject: Module) -> None:
    module, x = made(subject), subject.input()
    expected = subject.call(module, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        same(subject.call(twin, x), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
        same(subject.call(module, x), expected)


@situation("meta")
def check_meta(subject: Module) -> None:
    """Shapes without memory; then real memory and the parameters of another, copied or assigned."""
    module, x = made(subject), subject.input()
    expected = subject.call(module, x)
    for assign in (False, True):
        empty = made(subject, device="meta")
        shape = subject.call(empty, x.to("meta"))
        assert (shape.shape, shape.device.type, shape.dtype) == (expected.shape, "meta", expected.dtype)
        if not assign:
            empty = empty.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in empty.parameters():
                    parameter.fill_(float("nan"))
        found = empty.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
        assert not found.missing_keys
        assert not found.unexpected_keys
        if assign:
            assert all(not parameter.is_meta for parameter in empty.parameters())
        same(subject.call(empty, x), expected)


@situation("state_dict")
def check_state_dict(subject: Module) -> None:
    """Through a file, as ``torch.load`` opens it by default."""
    module, x, file = made(subject), subject.input(), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = made(subject)
    other.load_state_dict(torch.load(file))
    same(subject.call(other, x), subject.call(module, x))


@situation("bfloat16 and back")
def check_round_trip(subject: Module) -> None:
    """What is derived from nothing stored in the state_dict does not lose bits on the way."""
    module, x = made(subject), subject.input()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    expected = subject.call(module, x)
    same(subject.call(copy.deepcopy(module).bfloat16().float(), x), expected)
    same(subject.call(copy.deepcopy(module).half().float().double().float(), x), expected, 2e-3)


@situation("half precision")
def check_half(subject: Module) -> None:
    module, x = made(subject), subject.input()
    expected = subject.call(module, x)
    for dtype in (torch.bfloat16, torch.float16):
        y = subject.call(copy.deepcopy(module).to(dtype), x.to(dtype))
        assert y.dtype == dtype
        same(y.float(), expected, 0.1 if dtype == torch.bfloat16 else 0.02)


@situation("autocast")
def check_autocast(subject: Module) -> None:
    module, x = made(subject), subject.input()
    expected = subject.call(module, x)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = subject.call(module, x)
    assert y.dtype == torch.bfloat16
    same(y.float(), expected, 0.1)
    y.float().square().sum().backward()
    for wanted in (x, *module.parameters()):
        assert wanted.grad is None or (wanted.grad.dtype == torch.float32 and wanted.grad.isfinite().all())


@situation("functional_call")
def check_functional_call(subject: Module) -> None:
    """Plain tensors in place of parameters, gradients by them, and nothing left behind."""
    module, x = made(subject), subject.input()
    before = subject.call(module, x)
    tensors = {name: p.detach() * 1.5 for name, p in module.named_parameters()}
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(tensors[name])

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return subject.call(self.inner, x)

    def result(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(Called(), {f"inner.{name}": p for name, p in values.items()}, (x,))

    same(result(tensors, x), subject.call(other, x), 1e-6)
    wanted = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    result(wanted, x).square().sum().backward()
    subject.call(other, x).square().sum().backward()
    for name, parameter in other.named_parameters():
        found = wanted[name].grad
        assert (found is None) == (parameter.grad is None)
        if found is not None and parameter.grad is not None:
            same(found, parameter.grad, 1e-4)
    same(subject.call(module, x), before)


@situation("parametrized")
def check_parametrized(subject: Module) -> None:
    """``weight_norm`` and ``prune`` on every matrix: parameters become plain tensors that are made anew."""
    from torch.nn.utils import prune

    module, x = made(subject), subject.input()
    expected = subject.call(module, x)
    held = [
        (part, name)
        for part in module.modules()
        for name, p in part.named_parameters(recurse=False)
        if p.dim() > 1 and "bias" not in name
    ]
    assert held
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for part, name in held:
            parametrizations.weight_norm(part, name)
        same(subject.call(module, x), expected, 1e-5)
        subject.call(module, x).square().sum().backward()
        assert all(p.grad is not None for name, p in module.named_parameters() if "original" in name and p.numel())

        module = made(subject)
        held = [
            (part, name)
            for part in module.modules()
            for name, p in part.named_parameters(recurse=False)
            if p.dim() > 1 and "bias" not in name
        ]
        for part, name in held:
            prune.l1_unstructured(part, name, amount=0.0)
        subject.call(module, x).square().sum().backward()
        assert all(p.grad is not None for name, p in module.named_parameters() if name.endswith("_orig") and p.numel())


@situation("empty")
def check_empty(subject: Module) -> None:
    """No sequences, or sequences of no length."""
    module = made(subject)
    for batch, length in ((0, LENGTH), (BATCH, 0), (0, 0)):
        x = subject.input(batch, length).requires_grad_()
        y = subject.call(module, x)
        assert y.shape == subject.shape(batch, length)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert all(p.grad is None or not p.grad.count_nonzero() for p in module.parameters())


@situation("compile")
def check_compile(subject: Module) -> None:
    """One graph forward and backward, and one for all lengths."""
    torch._dynamo.reset()
    module, x = made(subject), subject.input()
    compiled = torch.compile(
        lambda module, x: subject.call(module, x), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (LENGTH, LENGTH + 3):
        x = subject.input(length=length)
        same(compiled(module, x), subject.call(module, x), 1e-5)
        weights = torch.linspace(0.5, 1.5, x.numel()).view(x.shape)
        x.requires_grad_()
        (compiled(module, x) * weights).sum().backward()
        found, x.grad = x.grad, None
        assert found is not None
        (subject.call(module, x) * weights).sum().backward()
        assert x.grad is not None
        same(found, x.grad, 1e-4)


class Called(nn.Module):
    """One tensor in, one out, for what takes modules alone."""

    def __init__(self, subject: Module, module: nn.Module) -> None:
        super().__init__()
        self.subject, self.inner = subject, module

    def forward(self, x: Tensor) -> Tensor:
        return self.subject.call(self.inner, x)


@situation("export")
def check_export(subject: Module) -> None:
    """With parameters that want gradients, which the exported module still gives."""
    module, x = made(subject), subject.input()
    exported: Any = torch.export.export(Called(subject, module), (x,)).module()
    y = exported(x)
    same(y, subject.call(module, x), 1e-6)
    y.square().sum().backward()
    found = {name.removeprefix("inner."): p.grad for name, p in exported.named_parameters()}
    subject.call(module, x).square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            other = found[name]
            assert other is not None, name
            same(other, parameter.grad, 1e-4)


@situation("jit.trace")
def check_trace(subject: Module) -> None:
    module, x = made(subject), subject.input()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(Called(subject, module), (x,), check_trace=False)
        other = subject.input()
        same(traced(other), subject.call(module, other), 1e-5)


@situation("checkpoint")
def check_checkpoint(subject: Module) -> None:
    from torch.utils.checkpoint import checkpoint

    module, x = made(subject), subject.input()
    whole = Module(subject.make, subject.shape, lambda m, x: checkpoint(subject.call, m, x, use_reentrant=False))  # type: ignore[arg-type,return-value]
    same_gradients(gradients(whole, module, x), gradients(subject, module, x))


@situation("in place")
def check_in_place(subject: Module) -> None:
    """``y += x`` on the result, as residual streams are written."""
    module, x = made(subject), subject.input()

    def added(module: nn.Module, x: Tensor) -> Tensor:
        y = subject.call(module, x)
        y += x
        return y

    def plain(module: nn.Module, x: Tensor) -> Tensor:
        return subject.call(module, x) + x

    one, other = (Module(subject.make, subject.shape, call) for call in (added, plain))
    same_gradients(gradients(one, module, x), gradients(other, module, x))


@situation("nested")
def check_nested(subject: Module) -> None:
    module, x = made(subject), subject.input()
    parts = [row[: n + 1] for n, row in enumerate(x)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject.call(module, torch.nested.nested_tensor(parts, layout=torch.jagged))


@situation("jvp")
def check_forward_mode(subject: Module) -> None:
    module, x = made(subject), subject.input()
    way, step = torch.randn_like(x), 1e-6
    found = torch.func.jvp(lambda x: subject.call(module, x), (x,), (way,))[1]
    module, x, way = module.double(), x.double(), way.double()
    expected = (subject.call(module, x + step * way) - subject.call(module, x - step * way)) / (2 * step)
    same(found.double(), expected, 1e-4)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@situation("FSDP2")
def check_fsdp(subject: Module) -> None:
    """Sharded over a group, in full precision and with parameters cast to bfloat16 for the forward pass."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It warns of results that are views, for what "in place" tries: nothing is added in place here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    module, x = made(subject), subject.input()
    expected = subject.call(module, x)
    for policy, tolerance in ((MixedPrecisionPolicy(), 1e-5), (MixedPrecisionPolicy(param_dtype=torch.bfloat16), 0.1)):
        root = Called(subject, copy.deepcopy(module))
        fully_shard(root, mp_policy=policy)
        y = root(x)
        same(y.float(), expected, tolerance)
        y.float().square().sum().backward()
        for name, parameter in root.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.to_local().isfinite().all(), name  # type: ignore[attr-defined]


@situation("state")
def check_state(subject: Module) -> None:
    """Owned, not a view of the prompt; loadable by default; stepping it leaves the prompt's backward alone."""
    module, x = made(subject), subject.input().requires_grad_()
    y, state = module(x, return_state=True)
    expected = torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]
    for part in state:
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size(), "a state owns its memory"
    file = io.BytesIO()
    torch.save(tuple(state), file)
    file.seek(0)
    kept = type(state)(*torch.load(file))
    with torch.no_grad():
        token = torch.randn(*x.shape[:1], 1, x.shape[2])
        detached = type(state)(*(part.detach() for part in state))
        one, other = module.step(token, detached), module.step(token, kept)  # type: ignore[operator]
    same(one, other)
    same(torch.autograd.grad(y.square().sum(), x)[0], expected)
    wrong = type(state)(*(part[:1].expand(3, *part.shape[1:]).clone() for part in state))
    with pytest.raises((ValueError, TypeError), match=r"state|initial|batch|memory|conv"):
        module(x, wrong)
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=r"state|initial|batch|memory|conv"):
        module.step(token, wrong)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("row", "column", "says"), cells("Modules"), ids=lambda text: text.replace(" ", "-"))
def test_a_module_does_what_the_page_says(row: str, column: str, says: str, group: None) -> None:
    subject, check = MODULES[row], SITUATIONS[column]
    if says == "none":
        assert column == "state"
        assert not subject.stateful
    elif says == "refused":
        with pytest.raises((UnsupportedError, TypeError, ValueError), match=r"^\w+: "):
            check(subject)
    elif says == "raises":  # what PyTorch says of torch.nn's modules too
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|does not support"):
            check(subject)
    else:
        assert says == "yes"
        check(subject)


def test_the_page_has_every_module_and_situation() -> None:
    from iokernels import nn as ours

    table = cells("Modules")
    assert {row for row, _, _ in table} == set(MODULES)
    assert {column for _, column, _ in table} == set(SITUATIONS)
    named = {row.partition(",")[0] for row, _, _ in table}
    modules = {name for name in ours.__all__ if issubclass(getattr(ours, name), nn.Module)}
    assert named == modules - {"ImplicitFilter"}, "ImplicitFilter is a part of HyenaOperator"
