"""nn.DecodeAttention and nn.KVCache: decoding from a cache is recomputing, and the cache keeps its books."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iokernels
from iokernels import UnsupportedError
from iokernels.nn import DecodeAttention, FlashAttention, KVCache
from iokernels.nn.kv_cache.pages import Pages


class TinyGPT(nn.Module):
    """Two blocks of attention and MLP over 31 tokens, with random weights."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 32)
        self.attentions = nn.ModuleList(
            DecodeAttention(32, 4, rotary=8, max_positions=64, **attention) for _ in range(2)
        )
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, 31)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        nn.init.normal_(self.embed.weight)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed(tokens)
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(nn.functional.layer_norm(x, (32,)), cache, layer=layer)
            x = x + mlp(nn.functional.layer_norm(x, (32,)))
        return self.head(nn.functional.layer_norm(x, (32,)))

    def new_cache(self, batch: int, capacity: int, **options: Any) -> KVCache:
        made: Any = self.attentions[0]
        return made.new_cache(batch, capacity, layers=2, **options)


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3]]


def padded(prompts: list[list[int]]) -> Tensor:
    longest = max(map(len, prompts))
    return torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])


@torch.no_grad()
def recomputed(model: TinyGPT, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from all the text before it."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@torch.no_grad()
def decoded(model: Callable[..., Tensor], cache: KVCache, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of a batch, each prompt and then each token read once."""
    lengths = [len(prompt) for prompt in prompts]
    cache.extend(lengths)
    logits = model(padded(prompts).to(cache.k.device), cache)
    newest = logits[torch.arange(len(prompts)), torch.tensor(lengths) - 1].argmax(-1)
    text = [newest]
    for _ in range(count - 1):
        cache.extend(1)
        newest = model(newest[:, None], cache)[:, -1].argmax(-1)
        text.append(newest)
    return torch.stack(text, 1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("attention", "page"),
    [
        ({}, None), ({}, 4), ({"num_kv_heads": 2}, None), ({"num_kv_heads": 1}, 16),
        ({"num_kv_heads": 2, "window": (6, 0), "softcap": 3.0, "sinks": True, "interleaved": True}, 1),
    ],
    ids=["dense", "paged", "grouped", "paged, one head", "everything"],
)  # fmt: skip
def test_greedy_decoding_is_recomputing_token_for_token(
    attention: dict[str, Any], page: int | None, dtype: torch.dtype
) -> None:
    model = TinyGPT(**attention).to(dtype)
    cache = model.new_cache(3, 40, page=page)
    expected = [recomputed(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) == 3, "three different texts"
    assert len({token for text in expected for token in text}) > 8, "not one token over and over"
    assert decoded(model, cache, PROMPTS, 20) == expected
    assert cache.lengths == cache.seqlens.tolist() == [7 + 19, 1 + 19, 18 + 19]
    cache.reset()
    assert decoded(model, cache, PROMPTS, 3) == [text[:3] for text in expected]


def test_greedy_decoding_on_triton(device: str) -> None:
    model, twin = (TinyGPT(num_kv_heads=2, backend=backend) for backend in ("triton", "torch"))
    twin.load_state_dict(model.state_dict())
    expected = [recomputed(twin, prompt, 4) for prompt in PROMPTS]
    model.to(device)
    assert decoded(model, model.new_cache(3, 24, page=4), PROMPTS, 4) == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("page", [None, 4])
def test_a_quantised_cache_is_close(dtype: torch.dtype, page: int | None) -> None:
    model = TinyGPT(num_kv_heads=2)
    text = torch.randint(31, (2, 30))
    cache = model.new_cache(2, 30, page=page, dtype=dtype)
    with torch.no_grad():
        exact = model(text)
        cache.extend(10)
        model(text[:, :10], cache)
        logits = []
        for token in text[:, 10:].split(1, dim=1):
            cache.extend(1)
            logits.append(model(token, cache))
    error = (torch.cat(logits, 1) - exact[:, 10:]).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-4 < error < (0.03 if dtype == torch.int8 else 0.1)


def test_under_autocast_a_cache_has_the_dtype_of_the_projections() -> None:
    module = DecodeAttention(24, 4, rotary=6, max_positions=80)
    x = torch.randn(2, 12, 24)
    exact = module(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = module.new_cache(2, 12)
        assert cache.k.dtype == torch.bfloat16
        pieces = []
        for piece in x.split([5, 1, 6], dim=1):
            cache.extend(piece.shape[1])
            pieces.append(module(piece, cache))
    error = (torch.cat(pieces, 1).float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < error < 0.02


@pytest.mark.parametrize("page", [None, 4])
def test_a_prompt_in_pieces_is_a_prompt(page: int | None) -> None:
    """Pieces of 1, of a few, and of more rows than one call of lean_attention takes."""
    module = DecodeAttention(24, 4, num_kv_heads=2, rotary=6, max_positions=80, dtype=torch.float64)
    x = torch.randn(2, 61, 24, dtype=torch.float64)
    cache = module.new_cache(2, 61, page=page)
    with torch.no_grad():
        whole, pieces = module(x), []
        for piece in x.split([5, 1, 16, 3, 36], dim=1):
            cache.extend(piece.shape[1])
            pieces.append(module(piece, cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_kv_heads": 2}, {"sinks": True, "window": (3, 0)}])
def test_parameters_are_those_of_flash_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    ours = DecodeAttention(24, 4, **options)
    torch.manual_seed(1)
    theirs = FlashAttention(24, 4, batch_first=True, causal=True, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 24, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    ours(x).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_angles_survive_half_precision_and_empty_modules() -> None:
    module = DecodeAttention(16, 2, rotary=8, max_positions=70)
    exact = module.cos.clone()
    assert module.half().cos.dtype == torch.float32
    assert torch.equal(module.bfloat16().cos, exact)
    with torch.device("meta"):
        later = DecodeAttention(16, 2, rotary=8, max_positions=70)
    assert torch.equal(later.to_empty(device="cpu").cos, exact)


def test_a_step_compiles_once() -> None:
    """``extend`` outside, the model inside: lengths and pages change, the graph does not."""
    torch._dynamo.reset()
    model = TinyGPT(num_kv_heads=2)
    expected = decoded(model, model.new_cache(3, 40, page=4), PROMPTS, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = model.new_cache(3, 40, page=4)

    def run(tokens: Tensor, cache: KVCache) -> Tensor:
        if cache.in_prompt:
            return model(tokens, cache)
        with torch._dynamo.config.patch(error_on_recompile=max(cache.lengths) > 20):
            return compiled(tokens, cache)

    assert decoded(run, cache, PROMPTS, 12) == expected


@pytest.mark.parametrize("page", [None, 1, 4])
def test_beams_reorder(page: int | None) -> None:
    """Each sequence goes on from another's keys; later keys of one do not reach the other."""
    torch.manual_seed(0)
    cache = KVCache(3, 20, 2, 4, layers=2, page=page, dtype=torch.float64)
    k, v = (torch.randn(2, 3, 2, 12, 4, dtype=torch.float64) for _ in range(2))

    def append(count: int, at: int) -> None:
        cache.extend(count)
        for layer in range(2):
            cache.append(k[layer, :, :, at : at + count], v[layer, :, :, at : at + count], layer=layer)

    append(6, 0)
    cache.reorder([2, 2, 0])
    append(3, 6)
    cache.reorder([1, 0, 0])
    append(3, 9)
    # Which of the three first wrote each key that a sequence has now.
    writers = [(2, 1, 0), (2, 0, 1), (2, 0, 2)]
    for sequence, parts in enumerate(writers):
        for layer in range(2):
            for held, new in zip(cache.read(sequence, layer=layer), (k[layer], v[layer]), strict=True):
                expected = [new[writer, :, start : start + count] for writer, start, count in
                            zip(parts, (0, 6, 9), (6, 3, 3), strict=True)]  # fmt: skip
                assert torch.equal(held, torch.cat(expected, 1))
    if cache.pages is not None:
        used = {p for table in cache.pages.tables for p in table}
        assert cache.pages.free == cache.k.shape[1] - len(used)
        cache.reset()
        assert cache.pages.free == cache.k.shape[1]


@pytest.mark.parametrize("page", [None, 4])
def test_truncating_forgets_the_newest_keys(page: int | None) -> None:
    torch.manual_seed(0)
    cache = KVCache(2, 16, 1, 4, page=page)
    first, rejected, again = (torch.randn(2, 1, n, 4) for n in (6, 5, 2))
    for rows in (first, rejected):
        cache.extend(rows.shape[2])
        cache.append(rows, rows)
    cache.truncate([7, 6])
    assert cache.seqlens.tolist() == cache.lengths == [7, 6]
    cache.extend(2)
    cache.append(again, again)
    assert torch.equal(cache.read(0)[0], torch.cat([first[0], rejected[0, :, :1], again[0]], 1))
    assert torch.equal(cache.read(1)[1], torch.cat([first[1], again[1]], 1))
    cache.reset([0])
    assert cache.lengths == [0, 8]
    if cache.pages is not None:
        assert cache.pages.free == 8 - 2


def test_a_pool_smaller_than_all_capacities() -> None:
    """Memory follows the lengths; where it does not suffice nothing changes, and what is given back serves others."""
    cache = KVCache(2, 16, 1, 4, page=4, pages=5)
    cache.extend([11, 3])
    assert cache.pages is not None
    assert cache.pages.free == 1
    before = repr(cache)
    with pytest.raises(ValueError, match="2 more pages are needed and 1 are free"):
        cache.extend(5)
    with pytest.raises(ValueError, match="sequence 0 would have 17 keys; the capacity is 16"):
        cache.extend([6, 0])
    assert repr(cache) == before
    assert cache.seqlens.tolist() == [11, 3]
    cache.truncate([0, 3])
    cache.extend([0, 13])
    assert cache.lengths == [0, 16]
    assert cache.block_table is not None
    assert cache.block_table[0].tolist() == [-1] * 4
    assert sorted(cache.block_table[1].tolist())[0] >= 0


def test_pages_are_copied_only_while_others_use_them() -> None:
    pages = Pages(3, 4, 10)
    assert pages.grow([0, 0, 0], [6, 0, 0]) == []
    pages.reorder([0, 0, 0])
    assert pages.free == 8
    # Two of three leave the half-full page; the last may keep it. The full page stays common.
    assert pages.needed([6, 6, 6], [7, 7, 7]) == 2
    copies = pages.grow([6, 6, 6], [7, 7, 7])
    assert len(copies) == 2
    assert {source for source, _ in copies} == {pages.tables[2][1]}
    assert len({table[1] for table in pages.tables}) == 3
    assert len({table[0] for table in pages.tables}) == 1
    assert pages.needed([7, 7, 7], [8, 8, 8]) == 0
    for sequence in range(3):
        pages.shrink(sequence, 0)
    assert pages.free == 10


def test_scales_of_heads_are_those_of_each_layer() -> None:
    torch.manual_seed(0)
    scales = torch.tensor([[0.01, 0.03], [0.02, 0.05]])
    cache = KVCache(1, 4, 2, 8, layers=2, dtype=torch.int8, k_scale=scales, v_scale=scales[1])
    new = torch.rand(1, 2, 3, 8)
    cache.extend(3)
    for layer, used in ((0, (scales[0], scales[1])), (1, (scales[1], scales[1]))):
        cache.append(new, new, layer=layer)
        for held, scale in zip(cache.read(0, layer=layer), used, strict=True):
            saturated = torch.minimum(new[0], 127 * scale[:, None, None])
            assert ((held - saturated).abs() <= scale[:, None, None] * 0.501).all()


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: KVCache(0, 4, 1, 4), ValueError, "batch is 0"),
    (lambda: KVCache(1, 4, 1, 4, pages=3), ValueError, "pages is given without page"),
    (lambda: KVCache(1, 4, 1, 4, dtype=torch.int32), TypeError, "dtype is int32"),
    (lambda: KVCache(1, 4, 2, 4, k_scale=torch.ones(3)), ValueError, "k_scale has shape"),
    (lambda: KVCache(2, 4, 1, 4).extend([1]), ValueError, "one for each of 2 sequences"),
    (lambda: KVCache(2, 4, 1, 4).extend(-1), ValueError, "at least 0"),
    (lambda: KVCache(1, 4, 1, 4).append(*torch.zeros(2, 1, 1, 2, 4)), ValueError, "the last extend was by 0"),
    (lambda: KVCache(1, 4, 1, 4).truncate([1]), ValueError, "can only get shorter"),
    (lambda: KVCache(2, 4, 1, 4).reorder([0, 2]), ValueError, "one of 2 sequences"),
    (lambda: DecodeAttention(10, 4), ValueError, "num_heads a divisor"),
    (lambda: DecodeAttention(8, 4, num_kv_heads=3), ValueError, "num_kv_heads is 3"),
    (lambda: DecodeAttention(8, 2, rotary=3, max_positions=9), ValueError, "rotary is 3"),
    (lambda: DecodeAttention(8, 2, rotary=2), ValueError, "both must be positive"),
    (lambda: DecodeAttention(8, 2)(torch.zeros(1, 2, 9)), ValueError, "x has shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_cache_takes_no_gradients_and_no_ragged_rows_at_the_end() -> None:
    module = DecodeAttention(8, 2)
    cache = module.new_cache(2, 8)
    cache.extend(3)
    with pytest.raises(UnsupportedError, match="none flows through a cache"):
        module(torch.zeros(2, 3, 8), cache)
    with torch.no_grad():
        module(torch.zeros(2, 3, 8), cache)
        cache.extend([2, 1])
        with pytest.raises(ValueError, match="the last extend was by different counts"):
            module(torch.zeros(2, 2, 8), cache)


def test_names() -> None:
    assert iokernels.nn.KVCache is KVCache
    assert "DecodeAttention" in iokernels.nn.__all__
    text = repr(DecodeAttention(8, 2, rotary=4, max_positions=9))
    assert text.startswith("DecodeAttention(\n  8, num_heads=2, num_kv_heads=2, rotary=4")
