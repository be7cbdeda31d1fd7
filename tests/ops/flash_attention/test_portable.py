"""The backend ``torch`` of flash_attention: values, gradients, precision, memory, and which kernel runs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from iokernels import flash_attention, flash_attention_varlen
from iokernels.ops.flash_attention import portable
from iokernels.ops.flash_attention.dropout import keep_mask, keep_tile
from iokernels.ops.flash_attention.options import Needs, Options
from iokernels.ops.flash_attention.portable import tiles as portable_tiles
from iokernels.ops.flash_attention.portable.tiles import block_sizes
from iokernels.testing.budget import FORWARD, GRADIENT, check, judge


def normal(*shape: int, dtype: torch.dtype = torch.float64, heads_inside: bool = False) -> Tensor:
    """Normal variates [B, H, N, D], in memory [B, N, H, D] if ``heads_inside``."""
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if heads_inside else x


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 7 rows and 5 keys: short sequences then take many of them, with ragged ends."""
    monkeypatch.setattr(portable_tiles, "block_sizes", lambda batch_heads, seqlen_q, windowed: (7, 5))


def loss_of(out: Tensor, lse: Tensor, with_lse: bool) -> Tensor:
    """A scalar with another weight for each element. Rows without keys have an infinite LSE, which is left out."""
    generator = torch.Generator().manual_seed(5)
    loss = (out * torch.rand(out.shape, generator=generator, dtype=torch.float64)).sum()
    if with_lse:
        finite = lse.masked_fill(lse == float("-inf"), 0.0)
        loss = loss + (finite * torch.rand(lse.shape, generator=generator, dtype=torch.float64)).sum()
    return loss


def results(function: Any, leaves: list[Tensor], with_lse: bool, **arguments: Any) -> list[Tensor]:
    """Out, LSE and the gradients of all leaves; the same dropout seed every time."""
    torch.manual_seed(11)
    out, lse = function(return_lse=True, **arguments)
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss_of(out, lse, with_lse), leaves)]


def random_options(pick: random.Random, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    """A combination of options; a mask, bias or slopes with some dimensions of size 1."""

    def scores_shape() -> tuple[int, ...]:
        return tuple(pick.choice((1, size)) for size in (batch, heads, seqlen_q, seqlen_k))

    options: dict[str, Any] = {}
    if pick.random() < 0.5:
        options["causal"] = True
    if pick.random() < 0.4:
        options["window"] = (pick.choice((-1, 0, 3, 50)), pick.choice((-1, 0, 3)))
    if pick.random() < 0.3:
        options["softcap"] = pick.choice((0.5, 3.0))
    if pick.random() < 0.3:
        options["mask"] = torch.rand(scores_shape()) < 0.7
    if pick.random() < 0.4:
        bias = torch.randn(scores_shape(), dtype=torch.float64)
        if pick.random() < 0.3:
            bias[torch.rand(bias.shape) < 0.5] = float("-inf")
        options["bias"] = bias
    if pick.random() < 0.3:
        options["alibi_slopes"] = torch.rand((batch, heads) if pick.random() < 0.5 else (heads,))
    if pick.random() < 0.3:
        options["sinks"] = torch.randn(heads, dtype=torch.float64)
    if pick.random() < 0.3:
        options["dropout_p"] = 0.3
    if pick.random() < 0.3:
        options["scale"] = 0.2
    return options


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12, msg=lambda text, i=index: f"result {i}: {text}")


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("blocks", ["small", "own"])
def test_equals_the_oracle_in_float64(seed: int, blocks: str, request: pytest.FixtureRequest) -> None:
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    pick = random.Random(seed)
    torch.manual_seed(seed)
    batch, kv_heads, group = pick.choice((1, 2, 3)), pick.choice((1, 2)), pick.choice((1, 1, 3))
    heads, width = kv_heads * group, pick.choice((4, 8))
    seqlen_q, seqlen_k = pick.choice((0, 1, 3, 17, 30)), pick.choice((0, 1, 8, 17, 33))
    inside = pick.random() < 0.5
    q = normal(batch, heads, seqlen_q, width, heads_inside=inside)
    k = normal(batch, kv_heads, seqlen_k, width, heads_inside=inside)
    v = normal(batch, kv_heads, seqlen_k, pick.choice((width, 6)), heads_inside=inside)
    options = random_options(pick, batch, heads, seqlen_q, seqlen_k)
    leaves = [x.requires_grad_() for x in (q, k, v, options.get("bias"), options.get("sinks")) if x is not None]

    with_lse = pick.random() < 0.5

    def run(backend: str) -> list[Tensor]:
        return results(flash_attention, leaves, with_lse, q=q, k=k, v=v, backend=backend, **options)

    assert_all_close(run("torch"), run("reference"))


@pytest.mark.parametrize("seed", range(25))
def test_packed_equals_the_oracle_in_float64(seed: int, small_blocks: None) -> None:
    pick = random.Random(1000 + seed)
    torch.manual_seed(seed)
    sequences, kv_heads, group, width = pick.choice((1, 3, 4)), pick.choice((1, 2)), pick.choice((1, 3)), 8
    lengths_q = [pick.choice((0, 1, 9, 16)) for _ in range(sequences)]
    lengths_k = [pick.choice((0, 1, 8, 19)) for _ in range(sequences)]
    offsets_q, offsets_k = ([sum(n[:i]) for i in range(sequences + 1)] for n in (lengths_q, lengths_k))
    spare = pick.choice((0, 3))
    q = normal(offsets_q[-1] + spare, kv_heads * group, width)
    k, v = (normal(offsets_k[-1] + spare, kv_heads, width) for _ in range(2))
    longest_q, longest_k = max(lengths_q) + spare, max(lengths_k) + spare
    options = random_options(pick, sequences, kv_heads * group, longest_q, longest_k)
    leaves = [x.requires_grad_() for x in (q, k, v, options.get("bias"), options.get("sinks")) if x is not None]
    packing = {
        "cu_seqlens_q": torch.tensor(offsets_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(offsets_k, dtype=torch.int32),
        "max_seqlen_q": longest_q,
        "max_seqlen_k": longest_k,
    }

    def run(backend: str) -> list[Tensor]:
        return results(flash_attention_varlen, leaves, True, q=q, k=k, v=v, backend=backend, **packing, **options)

    actual = run("torch")
    assert_all_close(actual, run("reference"))
    out, lse = actual[:2]
    assert not out[offsets_q[-1] :].any()
    assert (lse[:, offsets_q[-1] :] == float("-inf")).all()


def test_rows_past_max_seqlen_and_offsets_past_the_tensors() -> None:
    """The operator below the public checks: as on a GPU, where nobody reads the offsets."""
    torch.manual_seed(0)
    q, k, v = (normal(1, 2, 12, 8) for _ in range(3))

    def run(offsets: list[int], longest: int) -> tuple[Tensor, Tensor]:
        cu = torch.tensor(offsets, dtype=torch.int32)
        options = Options(cu_seqlens_q=cu, cu_seqlens_k=cu, scale=0.3, window_right=0, max_seqlen_q=longest)
        return portable.forward(q, k, v, options)

    whole, whole_lse = run([0, 5, 12], 7)
    cut, cut_lse = run([0, 5, 12], 4)
    for start, stop in ((0, 5), (5, 12)):
        torch.testing.assert_close(cut[:, :, start : start + 4], whole[:, :, start : start + 4])
        assert not cut[:, :, start + 4 : stop].any()
        assert (cut_lse[:, :, start + 4 : stop] == float("-inf")).all()
    torch.testing.assert_close(run([-3, 5, 99], 12)[0], whole)
    backwards, lse = run([0, 5, 2], 12)  # a negative length is an empty sequence
    torch.testing.assert_close(backwards[:, :, :5], whole[:, :, :5])
    torch.testing.assert_close(lse[:, :, :5], whole_lse[:, :, :5])
    assert not backwards[:, :, 5:].any()


COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap": {"window": (3, 1), "softcap": 2.0},
    "mask, slopes": {
        "mask": torch.rand(2, 1, 6, 8, generator=torch.Generator().manual_seed(1)) < 0.6,
        "alibi_slopes": torch.tensor([0.3, 0.1, 0.2, 0.05]),
    },
    "bias over heads": {"bias": (1, 4, 1, 8)},
    "bias, sinks, causal": {"bias": (2, 1, 6, 8), "sinks": (4,), "causal": True},
    "all but mask": {
        "bias": (1, 1, 6, 1),
        "sinks": (4,),
        "window": (4, 2),
        "softcap": 1.5,
        "dropout_p": 0.25,
        "alibi_slopes": torch.tensor([0.3, 0.1, 0.2, 0.05]),
        "scale": 0.7,
    },
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_gradcheck(name: str, small_blocks: None) -> None:
    torch.manual_seed(2)
    q, k, v = normal(2, 4, 6, 3), normal(2, 2, 8, 3), normal(2, 2, 8, 2)
    options = dict(COMBINATIONS[name])
    learnt = [key for key in ("bias", "sinks") if key in options]
    leaves = [q, k, v, *(normal(*options.pop(key)) for key in learnt)]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)  # gradcheck calls this many times: the same weights must be dropped
        q, k, v, *rest = leaves
        arguments: dict[str, Any] = {**options, **dict(zip(learnt, rest, strict=True))}
        return flash_attention(q, k, v, backend="torch", return_lse=True, **arguments)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


def naive(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softcap: float) -> Tensor:
    """The formula run eagerly in the dtype of its inputs, with equal heads."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        rows, keys = scores.shape[-2:]
        visible = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1) @ v


def with_gradients(function: Any, inputs: list[Tensor], dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "width", "magnitude", "causal", "softcap"),
    [
        (113, 203, 64, 1.0, True, 0.0),
        (128, 128, 64, 1.0, True, 0.0),
        (256, 97, 32, 4.0, False, 0.0),
        (96, 96, 40, 8.0, False, 5.0),
        (1, 7, 16, 1.0, False, 0.0),
    ],
)
def test_error_budget(
    dtype: torch.dtype, seqlen_q: int, seqlen_k: int, width: int, magnitude: float, causal: bool, softcap: float
) -> None:
    torch.manual_seed(4)
    q, k, v = (normal(2, 3, n, width, dtype=dtype) for n in (seqlen_q, seqlen_k, seqlen_k))
    inputs, dout = [q * magnitude, k, v], normal(2, 3, seqlen_q, width, dtype=dtype)
    options: dict[str, Any] = {"causal": causal, "softcap": softcap}
    exact = with_gradients(lambda *x: naive(*x, **options), inputs, dout, torch.float64)
    low = with_gradients(lambda *x: naive(*x, **options), inputs, dout, dtype)
    actual = with_gradients(lambda *x: flash_attention(*x, backend="torch", **options), inputs, dout, dtype)
    for name, factor, a, n, e in zip(
        ("out", "dq", "dk", "dv"), (FORWARD, *(GRADIENT,) * 3), actual, low, exact, strict=True
    ):
        assert a.dtype == dtype
        check(a, e, n, factor=factor, what=name)
        if magnitude == 1.0:
            assert not judge(torch.zeros_like(a), e, n, factor=factor).within, f"{name}: zeros pass"
            assert not judge(a * 1.1, e, n, factor=factor).within, f"{name}: 10% off passes"


def test_half_precision_gradients_stay_exact_in_long_sequences() -> None:
    """PyTorch's CPU kernel adds dk and dv up in half precision and fails this budget: it must not run here."""
    torch.manual_seed(0)
    inputs = [normal(1, 1, 3000, 32, dtype=torch.float16) for _ in range(3)]
    dout = normal(1, 1, 3000, 32, dtype=torch.float16)
    exact = with_gradients(lambda *x: naive(*x, causal=True, softcap=0.0), inputs, dout, torch.float64)
    low = with_gradients(lambda *x: naive(*x, causal=True, softcap=0.0), inputs, dout, torch.float16)
    actual = with_gradients(lambda *x: flash_attention(*x, causal=True, backend="torch"), inputs, dout, torch.float16)
    for name, a, n, e in zip(("out", "dq", "dk", "dv"), actual, low, exact, strict=True):
        check(a, e, n, factor=FORWARD, what=name)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator's result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize(
    "options",
    [
        Options(window_right=0, scale=0.1),
        Options(softcap=3.0, sinks=torch.tensor([0.5, -0.5])),
        Options(bias=torch.zeros(1, 2, 1, 1), alibi_slopes=torch.tensor([[0.3, 0.1]])),
        Options(dropout_p=0.2, dropout_seed=torch.tensor([7]), window_left=300),
    ],
    ids=["causal", "softcap, sinks", "bias, slopes", "dropout, window"],
)
def test_memory_is_linear(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor grows like N x N, in either direction; a bias keeps its own shape."""
    monkeypatch.setattr(portable_tiles, "_TILE_ELEMENTS", 2**14)
    largest = {}
    for length in (512, 1024):
        q = torch.randn(1, 2, length, 8)
        k, v = (torch.randn(1, 1, length, 8) for _ in range(2))
        needs = Needs(True, True, True, bias=options.bias is not None, sinks=options.sinks is not None)
        with LargestTensor() as counter:
            out, lse = portable.forward(q, k, v, options)
            portable.backward(q, lse, q, k, v, out, lse, options, needs)
        largest[length] = counter.elements
    assert largest[512] < 512 * 512
    assert largest[1024] <= 2 * largest[512]


def test_blocks_are_bounded() -> None:
    for batch_heads in (0, 1, 7, 64, 5000):
        for seqlen_q in (0, 1, 5, 100, 10**6):
            for windowed in (False, True):
                m, n = block_sizes(batch_heads, seqlen_q, windowed=windowed)
                assert 1 <= m <= 512
                assert 128 <= n <= 4096
                assert batch_heads * m * n <= max(2**20, batch_heads * 64 * 128)


@pytest.mark.parametrize("poison", ["mask", "bias", "window", "sink"])
def test_rows_without_keys_stay_clean(poison: str) -> None:
    """Out 0 and zero gradients, whatever huge values stand in the rows and keys that nobody sees."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    q[:, :, :3], v[:, :, :2] = 1e30, 1e30
    options: dict[str, Any] = {}
    hidden = torch.zeros(6, 6, dtype=torch.bool)
    hidden[:3] = True
    hidden[:, :2] = True
    if poison in ("mask", "sink"):
        options["mask"] = ~hidden
    if poison == "sink":
        options["sinks"] = torch.zeros(2, requires_grad=True)
    if poison == "bias":
        options["bias"] = torch.zeros(6, 6).masked_fill(hidden, float("-inf")).requires_grad_()
    if poison == "window":  # three keys for six rows: the first three rows stand before the first key
        k, v = k[:, :, 3:], v[:, :, 3:]
        options["causal"] = True
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attention(*leaves, return_lse=True, backend="torch", **options)
    assert not out[:, :, :3].any()
    assert (lse[:, :, :3] == (0.0 if poison == "sink" else float("-inf"))).all()
    dout = torch.randn_like(out)
    dout[:, :, :3] = 1e30
    dlse = torch.where(torch.isfinite(lse), lse.detach(), float("nan"))
    learnt = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    dq, dk, dv, *others = torch.autograd.grad([out, lse], [*leaves, *learnt], [dout, dlse])
    assert not dq[:, :, :3].any()
    for grad in (dq, dk, dv, *others):
        assert torch.isfinite(grad).all()
    assert dq[:, :, 3:].any()
    if poison != "window":
        assert not dk[:, :, :2].any()
        assert not dv[:, :, :2].any()


def test_dropout_of_a_tile_is_that_of_its_positions() -> None:
    seed, heads = torch.tensor([123456789012345]), torch.arange(6).view(2, 3, 1, 1)
    whole = keep_mask(seed, 0.4, heads, torch.arange(20)[:, None], torch.arange(30)[None, :])
    for rows, keys in ((slice(0, 20), slice(0, 30)), (slice(3, 10), slice(5, 6)), (slice(19, 20), slice(7, 29))):
        assert torch.equal(keep_tile(seed, 0.4, heads, rows, keys), whole[:, :, rows, keys])
    assert 0.55 < whole.float().mean().item() < 0.65


@pytest.fixture
def aten_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls that reached PyTorch's CPU kernel."""
    calls: list[str] = []

    def spy(name: str, kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return kernel(*args, **kwargs)

        return call

    for name in ("_ATEN_FORWARD", "_ATEN_BACKWARD"):
        monkeypatch.setattr(portable, name, spy(name, getattr(portable, name)))
    return calls


def expanded(x: Tensor) -> Tensor:
    return x[:, :, :1].expand(x.shape)


@pytest.mark.parametrize(
    ("lengths", "options", "change", "taken"),
    [
        ((9, 9), {}, None, True),
        ((9, 13), {}, None, True),
        ((9, 9), {"causal": True}, None, True),
        ((1, 13), {"causal": True}, None, True),
        ((9, 13), {"causal": True}, None, False),
        ((9, 9), {"window": (3, 0)}, None, False),
        ((9, 9), {"softcap": 1.0}, None, False),
        ((9, 9), {"mask": torch.ones(9, 9, dtype=torch.bool)}, None, False),
        ((9, 9), {"sinks": torch.zeros(2)}, None, False),
        ((9, 9), {"dropout_p": 0.1}, None, False),
        ((0, 9), {}, None, False),
        ((9, 0), {}, None, False),
        ((9, 9), {}, lambda q, k, v: (q, k[:, :1], v[:, :1]), True),
        ((9, 9), {"causal": True}, lambda q, k, v: (q, k[:, :1], v[:, :1]), True),
        ((9, 9), {}, lambda q, k, v: (q, k, v[..., :6]), False),
        ((9, 9), {}, lambda q, k, v: (q[..., ::2], k[..., ::2], v[..., ::2]), False),
        ((9, 9), {}, lambda q, k, v: (q, expanded(k), expanded(v)), False),
        ((9, 9), {}, lambda q, k, v: (q, k[:, :1].expand(k.shape), v[:1].expand(v.shape)), True),
    ],
)
def test_pytorch_kernel_runs_where_it_is_the_same(
    lengths: tuple[int, int], options: dict[str, Any], change: Any, taken: bool, aten_calls: list[str]
) -> None:
    torch.manual_seed(0)
    seqlen_q, seqlen_k = lengths
    q, k, v = (normal(2, 2, n, 8) for n in (seqlen_q, seqlen_k, seqlen_k))
    if change is not None:
        q, k, v = change(q, k, v)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    arguments = {"q": leaves[0], "k": leaves[1], "v": leaves[2], **options}
    actual = results(flash_attention, leaves, False, backend="torch", **arguments)
    members = q.shape[1] // k.shape[1]  # grouped heads: a call for each member of a group
    assert aten_calls == (["_ATEN_FORWARD"] * members + ["_ATEN_BACKWARD"] * members if taken else [])
    assert_all_close(actual, results(flash_attention, leaves, False, backend="reference", **arguments))

    aten_calls.clear()
    results(flash_attention, leaves, True, backend="torch", **arguments)
    assert aten_calls == (["_ATEN_FORWARD"] * members if taken else []), (
        "the gradient of the LSE needs our own backward"
    )


def test_half_precision_backward_is_our_own(aten_calls: list[str]) -> None:
    leaves = [normal(1, 2, 9, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    flash_attention(*leaves, backend="torch").sum().backward()
    assert aten_calls == ["_ATEN_FORWARD"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_a_sum_has_no_strides(dtype: torch.dtype) -> None:
    """``out.sum().backward()`` hands down a dout whose strides are all 0."""
    torch.manual_seed(0)
    leaves = [normal(2, 2, 9, 8, dtype=dtype).requires_grad_() for _ in range(3)]
    grads = torch.autograd.grad(flash_attention(*leaves, backend="torch").sum(), leaves)
    expected = torch.autograd.grad(flash_attention(*leaves, backend="reference").sum(), leaves)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right)
