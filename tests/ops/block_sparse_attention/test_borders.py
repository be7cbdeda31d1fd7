"""block_sparse_attention at its borders: what is shared by heads, wrong entries, layouts, no rows, no keys, and scores
that are negative, enormous or no numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iokernels import BlockIndex, UnsupportedError, block_sparse_attention, select_window
from iokernels.ops.block_sparse_attention.triton.tuning import DKV, DQ, FWD, Config

BACKENDS = ("reference", "torch", "triton")
NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.tiles(**dict.fromkeys((FWD, DQ, DKV), Config(32, 16, 1, 4, 2)))


negative_view: Any = getattr(torch, "_neg_view")  # noqa: B009, PyTorch has no other name for it


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lists(**changes: Any) -> BlockIndex:
    """Two query blocks of 16 rows, five key blocks of 8 keys, one list for each of two key heads."""
    given: dict[str, Any] = {
        "indices": ints([[[0, 3], [1, 4]], [[2, 99], [0, 2]]]), "counts": ints([[2, 2], [1, 2]]), "block_q": 16,
        "block_k": 8, "sink": 2, "window": 4, "q_len": 20, "kv_len": 40,
    }  # fmt: skip
    return BlockIndex(**(given | changes))


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, h, n, 8, dtype=dtype) for h, n in ((4, 20), (2, 40), (2, 40)))  # pyright: ignore


def results(
    backend: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, dout: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, index, return_lse=True, backend=backend, **options)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out) if dout is None else dout.to(out)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], [q, k, v], [dout, lse.isfinite().to(lse)])]


def agree(backend: str, *tensors: Tensor, index: BlockIndex, twin: BlockIndex | None = None, **options: Any) -> None:
    """The results are those of the reference in float64, for the index or its twin."""
    found = results(backend, *tensors, index=index, **options)
    truth = results("reference", *(x.double() for x in tensors), index=index if twin is None else twin, **options)
    rtol = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(found[0].dtype, 2e-5)
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_that_share_one_list_share_its_sink_and_window(backend: str, causal: bool) -> None:
    shared = lists(indices=ints([[[0, 3], [1, 4]]]), counts=ints([[2, 2]]), sink=ints(5), window=ints(7))
    agree(backend, *qkv(), index=shared, twin=replace(shared, sink=5, window=7), causal=causal)
    one = replace(shared, sink=ints(5), window=7)
    agree(backend, *qkv(), index=one, twin=replace(shared, sink=5, window=7), causal=causal)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_diagonal_and_the_window_begin_anywhere_in_a_step(backend: str) -> None:
    """Of sixteen keys, for rows that lie at any distance from them: one key too many or too few shows."""
    for keys in range(33, 49):
        q, k = torch.randn(1, 1, 16, 8), torch.randn(1, 1, keys, 8)
        blocks = torch.arange(-(-keys // 8), dtype=torch.int32).view(1, 1, 1, -1)
        window = 3 * (keys % 2)
        index = BlockIndex(blocks, ints([[blocks.numel()]]), 16, 8, sink=5, window=window, q_len=16, kv_len=keys)
        agree(backend, q, k, k, index=index)


def test_a_list_for_each_query_head_ends_its_sink_and_window_anywhere() -> None:
    """Also with the first key of a tile of sixteen, and in any head of a group."""
    for sink, window in ((ints(0, 1, 17, 33), ints(0, 1, 17, 0)), (ints(17, 0, 0, 1), ints(3, 16, 0, 33))):
        entries, counts = torch.arange(5, dtype=torch.int32).expand(1, 4, 2, 5), ints([[5, 3], [0, 5], [5, 5], [3, 0]])
        index = BlockIndex(entries, counts, 16, 8, sink=sink, window=window, q_len=20, kv_len=40)
        for causal in (True, False):
            agree("triton", *qkv(), index=index, causal=causal)


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of memory whose others must not be read."""
    room = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), NAN if x.is_floating_point() else 2**30)
    room[..., ::2] = x
    return room[..., ::2]


LAYOUTS = {
    "last stride of two": strided,
    "dimensions turned round": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "expanded over heads": lambda x: x[:, :1].expand(x.shape) if x.dim() > 1 else x[:1].expand(x.shape),
    "last dimension first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "negative bit": lambda x: negative_view((-x).clone()) if x.is_floating_point() else x.flip(0).flip(0),
    "imaginary part of a conjugate": lambda x: (
        torch.complex(torch.zeros_like(x), -x).conj().imag if x.is_floating_point() else x[None].clone()[0]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_layout_changes_a_result(backend: str, layout: str) -> None:
    """Of every tensor, those of the index included."""
    view = LAYOUTS[layout]
    whole: dict[str, Tensor] = dict(zip("qkv", qkv(), strict=True))
    index = lists(
        indices=ints([[[0, 3], [1, 4]], [[2, 4], [0, 2]]]),
        counts=ints([[2, -1], [1, 2]]),
        sink=ints(2, 5),
        window=ints(4, 0),
    )
    whole |= {"dout": torch.randn(1, 4, 20, 8), "indices": index.indices, "counts": index.counts}
    whole |= {"sink": ints(2, 5), "window": ints(4, 0)}

    def run(name: str, given: dict[str, Tensor]) -> list[Tensor]:
        own = replace(index, **{field: given[field] for field in ("indices", "counts", "sink", "window")})
        return results(name, *(given[x] for x in "qkv"), index=own, dout=given["dout"])

    # One by one where dimensions are turned round, which is where an operand that was forgotten shows.
    together = [tuple(whole)] if layout != "dimensions turned round" else [(name,) for name in whole]
    for names in together:
        changed = whole | {name: view(whole[name]) for name in names}
        plain = {key: x.resolve_neg().clone(memory_format=torch.contiguous_format) for key, x in changed.items()}
        for x, y in zip(run(backend, changed), run("reference", plain), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5, msg=lambda text, at=names: f"{at}: {text}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": ints([[[0, 3], [4, 4]], [[2, 99], [0, 2]]])}, r"a block twice: indices\[0, 0, 1, 1\] is 4"),
        ({"counts": ints([[2, 3], [1, 2]])}, r"-1 to 2, the length of the lists: counts\[0, 0, 1\] is 3"),
        ({"counts": ints([[2, 2], [-2, 2]])}, r"counts\[0, 1, 0\] is -2"),
        ({"sink": ints(1, -3)}, r"sink has negative values; .*: sink\[1\] is -3"),
        ({"window": ints(-1, 0)}, r"window\[0\] is -1"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_entries_are_named_alike_on_every_backend(backend: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*qkv(), lists(**changes), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_in_any_order_are_right(backend: str) -> None:
    turned = lists(indices=ints([[[3, 0], [4, 1]], [[2, 99], [2, 0]]]))
    agree(backend, *qkv(), index=turned, twin=lists())


@pytest.mark.parametrize("number", [5, 2**28, 2**29 + 1, 2**31 - 1, -1, -(2**28), -(2**31)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_that_no_block_has_names_no_key(backend: str, number: int) -> None:
    wrong = lists(indices=ints([[[0, number], [1, 4]], [[2, 99], [0, 2]]]))
    agree(backend, *qkv(), index=wrong, twin=lists(counts=ints([[1, 2], [1, 2]])))
    with pytest.raises(ValueError, match=rf"0 to 4, .*: indices\[0, 0, 0, 1\] is {number}$"):
        wrong.validate(deep=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_somebody_reads_must_exist_and_no_others(backend: str) -> None:
    q, pages = torch.randn(2, 2, 3, 8), torch.randn(6, 2, 8, 8)
    index = BlockIndex(
        ints([[[0, 3, -1]]], [[[1, 99, 0]]]), ints([[3]], [[2]]), 16, 8, sink=3, window=5, q_len=3, kv_len=48
    )  # fmt: skip
    options: dict[str, Any] = {"cache_seqlens": ints(45, 22), "backend": backend}

    def run(table: Tensor) -> Tensor:
        return block_sparse_attention(q, pages, pages, index, block_table=table, **options)

    # Keys 0-7, 24-31 and, of a window of five of three rows, 38-44; then 0-2, 8-15 and 15-21.
    evicted = ints([0, -1, 10**8, 1, 2, 3], [4, 5, 0, -1, 99, 7])
    out = run(evicted)
    assert out.isfinite().all()
    for sequence, page in ((0, 0), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2)):
        for wrong in (-1, 6, 10**8):
            table = evicted.clone()
            table[sequence, page] = wrong
            with pytest.raises(ValueError, match=rf"block_table\[{sequence}, {page}\] is {wrong}$"):
                run(table)
    everything = replace(index, counts=ints([[-1]], [[0]]))
    with pytest.raises(ValueError, match=r"block_table\[0, 1\] is -1"):
        block_sparse_attention(q, pages, pages, everything, block_table=evicted, **options)


def test_more_keys_than_kernels_number_are_refused_by_name() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 2**29 + 1, 8)
    index = BlockIndex(ints([[[0]]]), ints([[1]]), 1, 8, q_len=1, kv_len=2**29 + 1)
    with pytest.raises(UnsupportedError, match="it has 536870913 keys, and its kernels number up to 536870912"):
        block_sparse_attention(q, k, k, index, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_without_end(backend: str) -> None:
    q, k, v = qkv()
    for much in (2**31, 2**63, 10**400):
        unbounded = lists(window=much)
        agree(backend, q, k, v, index=unbounded, twin=lists(window=1000))
        assert unbounded.to_mask(causal=True).equal(lists(window=1000).to_mask(causal=True))
    agree(backend, q, k, v, index=lists(sink=10**400), twin=lists(sink=40))


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_zero_and_below(backend: str, dtype: torch.dtype, scale: float) -> None:
    """The scale comes first, then the mask: nothing hidden becomes the largest."""
    if backend == "reference" and dtype != torch.float32:
        dtype = torch.float64
    for causal in (True, False):
        agree(backend, *qkv(dtype), index=lists(), scale=scale, causal=causal)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_shows_where_it_is_seen_and_only_there(backend: str, value: float) -> None:
    q, k, v = qkv()
    plain = block_sparse_attention(q, k, v, lists(), return_lse=True, backend=backend)
    seen = lists().to_mask(causal=True).repeat_interleave(2, 1)
    for name, place in (("q", (0, 1, 7)), ("k", (0, 0, 25)), ("k", (0, 1, 38))):
        given = {"q": q.clone(), "k": k.clone()}
        given[name][place] = value
        bad = torch.zeros(1, 4, 20, dtype=torch.bool)
        if name == "q":
            bad[place] = True
        else:
            heads = slice(2 * place[1], 2 * place[1] + 2)
            bad[:, heads] = seen[:, heads, :, place[2]]
        assert bad.any()
        assert not bad.all()
        found = block_sparse_attention(given["q"], given["k"], v, lists(), return_lse=True, backend=backend)
        for x, y in zip(found, plain, strict=True):
            torch.testing.assert_close(x[~bad], y[~bad], rtol=1e-6, atol=1e-6)
            # An infinite score of either sign is one; a row of which all are -inf has no key.
            wrong = ~x[bad].isfinite() if value == INF and name == "k" and x.dim() == 3 else x[bad].isnan()
            assert wrong.all() or (value == INF and name == "k")


@pytest.mark.parametrize("size", [1e9, -1e9, -1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_equal_scores_of_any_size_is_a_mean(backend: str, size: float) -> None:
    q, k, v = qkv()
    q, k = q * 0, k * 0
    q[..., 0], k[..., 0] = 1.0, size
    index = select_window(q, k, sink=0, window=8, block_q=16)
    out, lse = block_sparse_attention(q, k, v, index, scale=1.0, return_lse=True, backend=backend)
    means = v.unfold(2, 8, 1).mean(-1)[:, :, -20:].repeat_interleave(2, 1)
    torch.testing.assert_close(out, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, size), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("batch", "heads", "rows", "keys"), [(0, 2, 5, 9), (1, 2, 0, 9), (1, 2, 5, 0), (1, 0, 5, 9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_nothing(backend: str, batch: int, heads: int, rows: int, keys: int) -> None:
    q, k = torch.randn(batch, heads, rows, 8), torch.randn(batch, 2, keys, 8)
    index = select_window(q, k, sink=2, window=3).validate(deep=True)
    assert index.to_mask().shape == (batch, 1, rows, keys)
    assert index.transpose().starts.shape == (batch, 1, -(-keys // 8) + 1)
    found = results(backend, q, k, k, index)
    assert [x.shape for x in found] == [q.shape, q.shape[:3], q.shape, k.shape, k.shape]
    assert all((x == 0).all() for x in found[2:])


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_can_be_written_to(backend: str, heads_last: bool) -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else x for x in qkv())
    q.requires_grad_()
    out, lse = block_sparse_attention(q, k, v, lists(), return_lse=True, backend=backend)
    expected = out.detach() * 2 + 1
    out *= 2
    out += 1
    lse += 1
    torch.testing.assert_close(out.detach(), expected)
    assert out.requires_grad
