"""The oracle of linear_attention against the recurrence itself, and the chunked backend's gradients in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from iokernels import linear_attention
from iokernels.ops.linear_attention import portable
from iokernels.ops.linear_attention.reference import feature_rows

from .calls import draw

OPTIONS = list(product((None, "head", "token"), (False, True), (False, True)))


@pytest.mark.parametrize(("decay", "taylor", "normalize"), OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_formula_is_the_recurrence(backend: str, decay: str | None, taylor: bool, normalize: bool) -> None:
    """S_t = a_t S_{t-1} + f(k_t) w_t^T, token by token, with the numerator and the normaliser apart."""
    given = draw(
        2, 4, 30, 5, 7, key_heads=2, dtype=torch.float64, decay=decay, taylor=taylor, normalize=normalize, state=True
    )
    given["initial_state"] = given["initial_state"].double()
    out, state = linear_attention(**given, scale=0.3, return_state=True, backend=backend)
    q, k = (given[name].repeat_interleave(2, 1) for name in ("q", "k"))
    values = given["v"]
    if normalize:
        values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    expected = given["initial_state"]
    for t in range(30):
        if decay is not None:
            g = given["log_decay"].double()
            expected = expected * (g.exp().view(1, -1, 1, 1) if g.dim() == 1 else g[:, :, t].exp()[..., None, None])
        expected = expected + feature_rows(k[:, :, t], taylor)[..., :, None] * values[:, :, t, None, :]
        seen = q[:, :, t] * 0.3
        row = feature_rows(seen, taylor)
        if taylor:
            row = torch.cat([row[..., :6], row[..., 6:] / 2], -1)
        found: Tensor = (row[..., None, :] @ expected).squeeze(-2)
        if normalize:
            found = found[..., :-1] / found[..., -1:]
        torch.testing.assert_close(out[:, :, t], found)
    torch.testing.assert_close(state, expected)


def test_taylor_features_make_the_polynomial() -> None:
    x, y = torch.randn(2, 6, dtype=torch.float64)
    t = x @ y
    row = feature_rows(x, True)
    row = torch.cat([row[:7], row[7:] / 2])
    torch.testing.assert_close(row @ feature_rows(y, True), 1 + t + t * t / 2)


@pytest.mark.parametrize(("decay", "taylor", "normalize"), OPTIONS, ids=str)
def test_gradients(decay: str | None, taylor: bool, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "CHUNK", 4)
    given = draw(
        1, 2, 10, 3, 2, key_heads=1, dtype=torch.float64, decay=decay, taylor=taylor, normalize=normalize, state=True
    )
    given["initial_state"] = given["initial_state"].double()
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    leaves = [given[name].double().requires_grad_() for name in names]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(
            **{**given, **dict(zip(names, tensors, strict=True))}, return_state=True, backend="torch"
        )

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("taylor", [False, True])
def test_gradients_of_packed_sequences(taylor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "CHUNK", 4)
    q, k, v = torch.randn(3, 12, 2, 2, dtype=torch.float64).unbind(0)
    decay = -torch.rand(12, 2, dtype=torch.float64)
    offsets = torch.tensor([0, 5, 5, 6, 11], dtype=torch.int32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, decay)]

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(
            q, k, v, log_decay=decay, feature_map="taylor" if taylor else None, cu_seqlens=offsets, return_state=True,
            backend="torch",
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves)


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """No allocation is as large as a tile of a few chunks, but those of the results."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes())
            return out

    sizes = []
    for length in (1024, 4096):
        x = torch.randn(1, 1, length, 16, requires_grad=True)
        with Largest() as largest:
            linear_attention(x, x, x, log_decay=-torch.rand(1), backend="torch").sum().backward()
        sizes.append(largest.elements)
    assert sizes[1] <= 4 * max(sizes[0], 1024 * 16 * 4)
    assert sizes[1] < 4 * 4096 * 4096 // 8


def test_second_derivatives() -> None:
    from iokernels import UnsupportedError

    given = draw(1, 1, 6, 3, 2, dtype=torch.float64, decay="token")
    q = given["q"].requires_grad_()
    for backend in ("torch", "reference"):
        out = linear_attention(**given, backend=backend)
        (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        if backend == "reference":
            (second,) = torch.autograd.grad(gradient.sum(), q)
            assert second.abs().max() > 0
        else:
            with pytest.raises(UnsupportedError, match="reference"):
                gradient.sum().backward()
