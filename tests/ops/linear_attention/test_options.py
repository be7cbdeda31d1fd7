"""linear_attention against its oracle: every option, and the edges where such kernels have broken before."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import autotune, lightning_attention, linear_attention
from iokernels.ops.linear_attention.cuda import tuning as tuning_cuda
from iokernels.ops.linear_attention.decays import alibi_slopes, minimax_slopes, retention_slopes
from iokernels.ops.linear_attention.portable import CHUNK
from iokernels.ops.linear_attention.refusals import MAX_CUDA_WIDTH
from iokernels.testing import inputs
from iokernels.testing.budget import check_relative_rms

from ..backends import BACKENDS, CUDA, runs, usual
from .calls import DECAY_LIMITS, LENGTHS, LIMITS, draw, packed, prove, results, tiles

PYTHON = ("torch", "triton")
"""The backends with every option, and with float32."""
WITH_AND_WITHOUT_TAYLOR = (*product(PYTHON, (False, True)), pytest.param("cuda", False, marks=CUDA.marks))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


pytestmark = pytest.mark.tiles(**tiles())


@pytest.mark.parametrize("taylor", [False, True], ids=["linear", "taylor"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize(
    ("segments", "dtype"), [*((1, dtype) for dtype in DTYPES), (3, torch.bfloat16)], ids=lambda x: str(x)
)
def test_every_option(
    segments: int, decay: str | None, normalize: bool, taylor: bool, dtype: torch.dtype, device: str
) -> None:
    given = draw(
        1, 2, 37, 10, 20, dtype=dtype, decay=decay, taylor=taylor, normalize=normalize, state=True, device=device
    )
    with autotune.override(**tiles(segments=segments)):
        prove(given, "triton")
    if segments == 1:
        prove(given, "torch")


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend: str, length: int, device: str) -> None:
    given = draw(1, 1, length, 16, 16, dtype=torch.bfloat16, decay="token", state=True, device=device)
    with autotune.override(**tiles(32, 16, segments=2)):
        prove(given, backend)


@pytest.mark.parametrize("length", [500, 1024])
@pytest.mark.parametrize(("backend", "dtype"), runs(torch.bfloat16, torch.float32), ids=str)
def test_long(backend: str, dtype: torch.dtype, length: int, device: str) -> None:
    given = draw(1, 1, length, 32, 32, dtype=dtype, decay="token", log_decay=-0.01, device=device)
    with autotune.override(**tiles(64, 32)):
        prove(given, backend)


WIDTHS = ((16, 16), (60, 16), (16, 100), (64, 128), (100, 60), (256, 40), (40, 256))


@pytest.mark.parametrize(
    ("backend", "widths"),
    [
        *product(PYTHON, WIDTHS),
        *(pytest.param("cuda", widths, marks=CUDA.marks) for widths in WIDTHS if max(widths) <= MAX_CUDA_WIDTH),
    ],
    ids=str,
)
def test_widths(backend: str, widths: tuple[int, int], device: str) -> None:
    given = draw(1, 1, 40, *widths, dtype=torch.bfloat16, decay="token", state=True, device=device)
    with autotune.override(**tiles(16, 64, segments=2)):
        prove(given, backend)


@pytest.mark.parametrize("widths", [(5, 33), (24, 16), (32, 16)], ids=str)
def test_taylor_widths(widths: tuple[int, int], device: str) -> None:
    """More than one slice of V, over which dq and dk add up, and keys that fill no tile."""
    given = draw(
        1, 2, 20, *widths, dtype=torch.float32, taylor=True, normalize=True, decay="token", state=True, key_heads=1,
        device=device,
    )  # fmt: skip
    prove(given, "torch")
    prove(given, "triton")


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize(("backend", "dtype"), runs(torch.bfloat16, torch.float32), ids=str)
def test_grouped_heads(backend: str, dtype: torch.dtype, key_heads: int, device: str) -> None:
    normalize = backend != "cuda"
    given = draw(1, 4, 20, dtype=dtype, key_heads=key_heads, decay="token", normalize=normalize, device=device)
    found = prove(given, backend)
    repeated = given | {name: given[name].repeat_interleave(4 // key_heads, 1) for name in ("q", "k")}
    torch.testing.assert_close(found["out"], results(repeated, backend)["out"])


@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -20.0, -1e4, float("-inf")])
@pytest.mark.parametrize(("backend", "dtype"), runs(*DTYPES), ids=str)
def test_gates(backend: str, dtype: torch.dtype, log_decay: float, device: str) -> None:
    """From never to at once. The gradient of a decay of e^-20 a step is of that order, which float16 does not have.
    With a gradient of the state it is the difference of two sums that are much larger: without one here."""
    given = draw(1, 2, 40, dtype=dtype, decay="token", device=device)
    given["log_decay"] = torch.full_like(given["log_decay"], log_decay)
    vanishes = log_decay < -20.0 or (log_decay == -20.0 and dtype == torch.float16 and backend != "torch")
    found = prove(given, backend, skip=("dlog_decay",) if vanishes else (), state_gradient=log_decay > -20.0)
    assert found["dlog_decay"].isfinite().all()
    if vanishes:
        assert found["dlog_decay"].abs().max() < 1e-6
    if log_decay < -20.0:  # nothing but the token itself is left
        alone = torch.einsum("bhnd,bhnd->bhn", given["q"].double(), given["k"].double()) * 16**-0.5
        torch.testing.assert_close(found["out"].double(), alone[..., None] * given["v"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_from_soft_to_strong(backend: str, device: str) -> None:
    """Each token its own, over five orders of magnitude: a strong one must not blur those after it."""
    given = draw(1, 2, 100, dtype=usual(backend), decay="token", device=device)
    generator = torch.Generator().manual_seed(3)
    given["log_decay"] = -(10.0 ** (5 * torch.rand(1, 2, 100, generator=generator) - 4)).to(device)
    prove(given, backend)


@pytest.mark.parametrize("layout", ["bnhd", "seq_major", "padded", "strided", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: Any, device: str) -> None:
    """Every element beside the tensors is NaN: whoever reads it shows it."""
    q, k, v = inputs.attention(6, 2, 2, 2, 20, 20, 24, dtype=torch.bfloat16, device=device, layout=layout)
    given = {"q": q, "k": k, "v": v, "log_decay": -torch.rand(2, 20, 2, device=device).transpose(1, 2)}
    out = prove(given, backend)["out"]
    in_order = out.transpose(1, 2) if v.stride(1) < v.stride(2) else out
    assert in_order.is_contiguous(), "out follows the memory order of v"


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_the_gradient(backend: str, device: str) -> None:
    given = draw(2, 2, 40, dtype=usual(backend), decay="token", device=device)
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v", "log_decay")}
    gradients = []
    for name, dtype in ((backend, usual(backend)), ("reference", torch.float64)):
        own = {key: x.detach().to(dtype).requires_grad_() for key, x in leaves.items()}
        out = linear_attention(**{**given, **own}, backend=name)
        dout = torch.tensor(0.5, dtype=dtype, device=device).expand(out.shape)
        gradients.append(torch.autograd.grad(out, list(own.values()), dout))
    for name, x, y in zip(leaves, *gradients, strict=True):
        limits = DECAY_LIMITS if name == "log_decay" else LIMITS
        check_relative_rms(x.flatten(), y.flatten(), limit=limits[usual(backend)], what=name)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
@pytest.mark.parametrize(("backend", "taylor"), WITH_AND_WITHOUT_TAYLOR)
def test_scale(backend: str, taylor: bool, scale: float, device: str) -> None:
    dtype = usual(backend)
    given = draw(1, 1, 40, 8, 16, dtype=dtype, taylor=taylor, decay="head", state=True, device=device)
    given["scale"] = scale
    found, truth = results(given, backend), results(given, "reference", torch.float64)
    for name, x in found.items():
        limit = (DECAY_LIMITS if name == "dlog_decay" else LIMITS)[dtype]
        check_relative_rms(x.flatten(), truth[name].flatten(), limit=max(limit, 1e-4), what=name)
    assert truth["out"].abs().max() > 0.05 or scale == 0.0


@pytest.mark.parametrize("segments", [1, 9], ids=["whole", "split"])
@pytest.mark.parametrize("options", [("token", False, False), ("head", False, True), ("token", True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed(dtype: torch.dtype, options: tuple[str, bool, bool], segments: int, device: str) -> None:
    """Sequences of length 0 and 1 among longer ones, and rows of none at the end."""
    decay, taylor, normalize = options
    given = draw(
        1, 2, sum(LENGTHS) + 5, 10, 16, dtype=dtype, decay=decay, taylor=taylor, normalize=normalize, state=True,
        device=device,
    )  # fmt: skip
    given = packed(given, LENGTHS)
    with autotune.override(**tiles(16, 16, segments)):
        found = prove(given, "triton")
    others = [found, prove(given, "torch")] if segments == 1 else [found]
    for one in others:
        assert (one["out"][sum(LENGTHS) :] == 0).all()
        assert all((one[name][sum(LENGTHS) :] == 0).all() for name in ("dq", "dk", "dv"))
        # Without tokens a state stays what it was.
        assert torch.equal(one["state"][1], given["initial_state"][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_each_sequence_alone(backend: str, device: str) -> None:
    drawn = draw(1, 2, sum(LENGTHS), dtype=usual(backend), decay="token", state=True, device=device)
    given = packed(drawn, LENGTHS)
    whole = results(given, backend)
    for index, (start, stop) in enumerate(pairwise(given["cu_seqlens"].tolist())):
        alone = {name: given[name][start:stop].transpose(0, 1).unsqueeze(0) for name in ("q", "k", "v", "log_decay")}
        alone["initial_state"] = given["initial_state"][index : index + 1]
        out, state = linear_attention(**alone, return_state=True, backend=backend)
        torch.testing.assert_close(whole["out"][start:stop], out.squeeze(0).transpose(0, 1))
        torch.testing.assert_close(whole["state"][index : index + 1], state)


@pytest.mark.parametrize("offsets", [[0, 99, 40], [-5, 20, 10], [30, 10, 2**30], [0, 0, -(2**31)]], ids=str)
@pytest.mark.parametrize("backend", ["triton", CUDA])
def test_offsets_out_of_range_do_no_harm(backend: str, offsets: list[int], device: str) -> None:
    """On a GPU nobody reads them before the kernels do."""
    from iokernels.ops.linear_attention.op import backward_op, forward_op
    from iokernels.ops.linear_attention.options import Options

    q = torch.randn(1, 2, 40, 16, device=device, dtype=usual(backend))
    decay = -torch.rand(1, 2, 40, device=device)
    options = Options(decay, cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device))
    with autotune.override(**tiles(16, 16, 2)):
        out, state, denominator = forward_op(q, q, q, backend, *options)
        needs = [True, True, True, True, False]
        gradients = backward_op(out, state, q, q, q, None, state, denominator, needs, backend, *options)
    assert all(x.isfinite().all() for x in (out, state, *gradients))


@pytest.mark.parametrize(("backend", "taylor"), WITH_AND_WITHOUT_TAYLOR)
def test_states_chain(backend: str, taylor: bool, device: str) -> None:
    """Two halves, with the state handed on, are the whole: values and gradients."""
    dtype, normalize = usual(backend), backend != "cuda"
    given = draw(
        1, 2, 40, 8, 16, dtype=dtype, decay="token", taylor=taylor, normalize=normalize, state=True, device=device
    )  # fmt: skip
    whole = results(given, backend)
    names = ("q", "k", "v", "log_decay", "initial_state")
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    at, state, outs = 23, leaves["initial_state"], []
    for rows in (slice(0, at), slice(at, None)):
        part = {name: leaves[name][:, :, rows] for name in names[:4]}
        out, state = linear_attention(
            **{**given, **part, "initial_state": state}, return_state=True, backend=backend
        )  # fmt: skip
        outs.append(out)
    out = torch.cat(outs, 2)
    generator = torch.Generator().manual_seed(1)
    douts = [
        (size * torch.randn(x.shape, generator=generator)).to(dtype).to(x) for x, size in ((out, 1.0), (state, 0.1))
    ]
    gradients = torch.autograd.grad([out, state], list(leaves.values()), douts)
    near = 1e-4 if dtype == torch.float32 else 2e-2
    for name, x in zip(("out", "state", *(f"d{name}" for name in names)), (out, state, *gradients), strict=True):
        torch.testing.assert_close(x.detach(), whole[name], rtol=near, atol=near)


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, int, int], device: str) -> None:
    given = draw(*shape, dtype=usual(backend), decay="token", state=True, device=device)
    found = results(given, backend)
    assert found["out"].shape == given["v"].shape
    assert torch.equal(found["state"], given["initial_state"])
    assert found["dinitial_state"].isfinite().all()
    assert found["dinitial_state"].abs().sum() > 0 or shape[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_alone(backend: str, device: str) -> None:
    given = draw(1, 2, 40, dtype=usual(backend), decay="token", state=True, device=device)
    together = results(given, backend)
    for name in ("q", "k", "v", "log_decay", "initial_state"):
        leaf = given[name].detach().requires_grad_()
        out, state = linear_attention(**{**given, name: leaf}, return_state=True, backend=backend)
        generator = torch.Generator().manual_seed(1)
        douts = [
            (size * torch.randn(x.shape, generator=generator)).to(given["v"].dtype).to(x)
            for x, size in ((out, 1.0), (state, 0.1))
        ]
        (gradient,) = torch.autograd.grad([out, state], [leaf], douts)
        # Where decays want none, the pair of a token and itself is rounded as all others are.
        check_relative_rms(gradient.flatten(), together[f"d{name}"].flatten(), limit=LIMITS[usual(backend)], what=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_run(backend: str, device: str) -> None:
    normalize = backend != "cuda"
    given = draw(1, 2, 40, dtype=torch.bfloat16, decay="token", normalize=normalize, state=True, device=device)
    with autotune.override(**tiles(segments=3)):
        first, second = results(given, backend), results(given, backend)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_decays_restarts(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer sequences are cut for it, whatever the configuration says: here at 48 rows, with a half-full tail."""
    from iokernels.ops.linear_attention.triton import launch_backward

    monkeypatch.setattr(launch_backward, "RESTART", 48)
    monkeypatch.setattr(tuning_cuda, "SEGMENT", 48)
    prove(draw(1, 2, 130, dtype=torch.bfloat16, decay="token", state=True, log_decay=-1.0, device=device), backend)


def test_nothing_at_the_end_of_a_chunk_is_lost(device: str) -> None:
    """The portable backend's own chunk, at its edges."""
    for length in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK):
        prove(draw(1, 1, length, 8, 8, dtype=torch.float32, decay="token", device=device), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_lightning_attention(backend: str, device: str) -> None:
    given = draw(1, 4, 40, dtype=usual(backend), device=device)
    q, k, v = given["q"], given["k"], given["v"]
    near = 2e-3 if backend == "cuda" else 1e-5
    slopes = alibi_slopes(4, device=device).requires_grad_()
    out = lightning_attention(q, k, v, slopes=slopes, scale=1.0, backend=backend)
    assert torch.equal(out, linear_attention(q, k, v, log_decay=-slopes, scale=1.0, backend=backend))
    order = torch.arange(40, device=device)
    apart = (order[:, None] - order[None, :]).double()
    weights = (q.double() @ k.double().mT) * torch.exp(-slopes.double()[:, None, None] * apart)
    expected = weights.masked_fill(apart < 0, 0.0) @ v.double()
    check_relative_rms(out.flatten(2), expected.flatten(2), limit=near, what="out")
    (gradient,) = torch.autograd.grad(out.sum(), slopes)
    (truth,) = torch.autograd.grad(expected.sum(), slopes)
    check_relative_rms(gradient, truth, limit=10 * near, what="dslopes")


def test_decays_by_name() -> None:
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    # What ALiBi's authors' own code gives for 12 heads: those of 8, then every other one of 16.
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected))
    kept = torch.exp(-retention_slopes(4).double())
    torch.testing.assert_close(kept, 1 - 2.0 ** -torch.arange(5.0, 9.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(minimax_slopes(8, 0, 80), alibi_slopes(8) * (1 + 1e-5))
    assert 0 < minimax_slopes(8, 79, 80).max() < 1e-5
    with pytest.raises(ValueError, match="layer is 3"):
        minimax_slopes(8, 3, 3)
    with pytest.raises(ValueError, match="heads is 0"):
        alibi_slopes(0)


def test_a_wrong_answer_fails(device: str) -> None:
    """The limits are tight enough: zeros, a dropped token and a scale off by one in fifty all fail."""
    given = draw(1, 1, 40, dtype=torch.bfloat16, decay="token", device=device)
    truth = results(given, "reference", torch.float64)["out"].flatten(2)
    dropped = given | {"v": torch.cat([torch.zeros_like(given["v"][:, :, :1]), given["v"][:, :, 1:]], 2)}
    wrong: list[Tensor] = [truth * 0, truth * 1.02, results(dropped, "reference", torch.float64)["out"].flatten(2)]
    for x in wrong:
        with pytest.raises(AssertionError):
            check_relative_rms(x, truth, limit=8e-3, what="out")
