"""``iokernels.nn.FlashAttention`` against ``torch.nn.MultiheadAttention`` in float64, and its own options by hand."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import iokernels
from iokernels.nn import FlashAttention
from iokernels.testing.budget import FORWARD, GRADIENT, check

EMBED, HEADS, BATCH, ROWS, KEYS = 16, 4, 3, 5, 7
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(**options: Any) -> tuple[nn.MultiheadAttention, FlashAttention]:
    """torch's module and ours, with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for i, parameter in enumerate(theirs.parameters()):
        parameter.data = noise(*parameter.shape, seed=i) * 0.3
    ours = FlashAttention(EMBED, HEADS, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(kind: str, options: dict[str, Any]) -> list[Tensor]:
    """Leaves in the layout that ``options`` ask for; self-attention and shared keys reuse one tensor."""
    rows, keys, layout = ROWS, KEYS if kind != "self" else ROWS, options.get("batch_first", False)

    def leaf(length: int, width: int, seed: int) -> Tensor:
        shape = (length, width) if kind == "unbatched" else (BATCH, length, width) if layout else (length, BATCH, width)
        return noise(*shape, seed=seed).requires_grad_()

    query = leaf(rows, EMBED, 1)
    if kind == "self":
        return [query] * 3
    key = leaf(keys, options.get("kdim") or EMBED, 2)
    return [query, key, key if kind == "shared keys" else leaf(keys, options.get("vdim") or EMBED, 3)]


def padding(keys: int, batched: bool, kind: str) -> Tensor:
    hidden = torch.arange(keys) >= torch.tensor([keys, keys - 1, keys - 3])[:, None]
    hidden = hidden if batched else hidden[1]
    return hidden if kind == "bool" else torch.where(hidden, float("-inf"), noise(*hidden.shape))


def attention_mask(rows: int, keys: int, kind: str) -> Tensor:
    lead = (BATCH * HEADS,) if kind.endswith("per head") else ()
    if kind.startswith("bool"):
        hidden = noise(*lead, rows, keys, seed=5) > 0.8
        hidden[..., 0] = False  # every row keeps a key, since torch makes NaN of those that do not
        return hidden
    return noise(*lead, rows, keys, seed=6)


def call(module: nn.Module, arguments: list[Tensor], **options: Any) -> tuple[Tensor, Tensor | None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched", UserWarning)  # torch's, of two kinds of masks
        return module(*arguments, **options)


def assert_parity(theirs: nn.Module, ours: nn.Module, arguments: list[Tensor], **options: Any) -> None:
    """Output, weights and the gradients of both in every input, mask and parameter."""
    results = []
    for module in (theirs, ours):
        out, weights = call(module, arguments, **options)
        loss = (out * noise(*out.shape, seed=8)).sum()
        if weights is not None:
            loss = loss + (weights * noise(*weights.shape, seed=9)).sum()
        leaves = {id(x): x for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.requires_grad}
        names = [name for name, _ in module.named_parameters()]
        gradients = torch.autograd.grad(loss, [*leaves.values(), *module.parameters()])
        results.append((out, weights, gradients, names))
    (out, weights, gradients, names), (our_out, our_weights, our_gradients, our_names) = results
    assert names == our_names
    torch.testing.assert_close(our_out, out, **EXACT)
    torch.testing.assert_close(our_weights, weights, **EXACT)
    for mine, torchs in zip(our_gradients, gradients, strict=True):
        assert torchs.abs().sum() > 0
        torch.testing.assert_close(mine, torchs, **EXACT)


CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim and vdim": {"kdim": 12, "vdim": 10},
    "kdim, no bias": {"kdim": 12, "bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv, zero_attn, vdim": {"add_bias_kv": True, "add_zero_attn": True, "vdim": 10},
}


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_same_seed_same_parameters_and_state_dict_both_ways(options: dict[str, Any]):
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    following = torch.rand(1)
    torch.manual_seed(3)
    ours = FlashAttention(EMBED, HEADS, **options)
    assert torch.rand(1) == following  # as many numbers were drawn
    expected, state = theirs.state_dict(), ours.state_dict()
    assert [*state] == [*expected]
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    theirs.load_state_dict(state)
    ours.load_state_dict(expected)


def test_signatures_begin_as_torch_does():
    for mine, torchs in (
        (FlashAttention.__init__, nn.MultiheadAttention.__init__),
        (FlashAttention.forward, nn.MultiheadAttention.forward),
    ):
        ours = inspect.signature(mine).parameters
        for (name, parameter), (their_name, theirs) in zip(
            ours.items(), inspect.signature(torchs).parameters.items(), strict=False
        ):
            assert (name, parameter.default) == (their_name, theirs.default)
        extra = [*ours][len(inspect.signature(torchs).parameters) :]
        assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in extra)


@pytest.mark.parametrize("weights", ["none", "averaged", "per head"])
@pytest.mark.parametrize("kind", ["self", "shared keys", "three inputs", "unbatched"])
@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_parity(options: dict[str, Any], kind: str, weights: str):
    if kind in ("self", "shared keys") and ("kdim" in options or "vdim" in options):
        kind = "three inputs"
    theirs, ours = pair(**options)
    assert_parity(
        theirs,
        ours,
        inputs(kind, options),
        need_weights=weights != "none",
        average_attn_weights=weights == "averaged",
    )


MASKS = [
    (pad, mask)
    for pad in (None, "bool", "float")
    for mask in (None, "bool", "float", "bool per head", "float per head")
    if pad or mask
]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("pad", "mask"), MASKS)
@pytest.mark.parametrize("options", [CONSTRUCTIONS["batch first"], CONSTRUCTIONS["bias_kv, zero_attn, vdim"]])
def test_masks(options: dict[str, Any], pad: str | None, mask: str | None, need_weights: bool):
    theirs, ours = pair(**options)
    masks = {
        "key_padding_mask": padding(KEYS, True, pad) if pad else None,
        "attn_mask": attention_mask(ROWS, KEYS, mask) if mask else None,
    }
    assert_parity(theirs, ours, inputs("three inputs", options), need_weights=need_weights, **masks)


def test_a_floating_mask_takes_a_gradient():
    theirs, ours = pair(batch_first=True)
    mask = attention_mask(ROWS, KEYS, "float").requires_grad_()
    assert_parity(theirs, ours, inputs("three inputs", {"batch_first": True}), attn_mask=mask, need_weights=False)


@pytest.mark.parametrize("pad", [None, "bool"])
def test_masks_of_a_single_sequence(pad: str | None):
    theirs, ours = pair()
    hidden = padding(KEYS, False, pad) if pad else None
    for mask in (attention_mask(ROWS, KEYS, "bool"), attention_mask(ROWS, KEYS, "float per head")[:HEADS]):
        assert_parity(theirs, ours, inputs("unbatched", {}), attn_mask=mask, key_padding_mask=hidden)


@pytest.mark.parametrize("pad", [None, "bool"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_is_causal(need_weights: bool, pad: str | None):
    theirs, ours = pair(batch_first=True)
    x = inputs("self", {"batch_first": True})
    hidden = padding(ROWS, True, pad) if pad else None
    triangle = torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)
    options = {"is_causal": True, "key_padding_mask": hidden, "need_weights": need_weights}
    assert_parity(theirs, ours, x, attn_mask=triangle, **options)
    torch.testing.assert_close(ours(*x, **options), ours(*x, attn_mask=triangle, **options))
    causal = FlashAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, causal=True)
    causal.load_state_dict(ours.state_dict())
    torch.testing.assert_close(causal(*x, **{**options, "is_causal": False}), ours(*x, **options))


def test_is_causal_is_a_hint_where_lengths_differ():
    theirs, ours = pair(batch_first=True)
    triangle = torch.ones(ROWS, KEYS, dtype=torch.bool).triu(1)
    x = inputs("three inputs", {"batch_first": True})
    assert_parity(theirs, ours, x, attn_mask=triangle, is_causal=True, need_weights=False)
    with pytest.raises(ValueError, match="is_causal is True without attn_mask"):
        ours(*x, is_causal=True)


def test_padding_does_not_become_a_matrix(monkeypatch: pytest.MonkeyPatch):
    seen = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.update(options)
        return iokernels.flash_attention(q, k, v, **options)

    monkeypatch.setattr("iokernels.nn.flash_attention.flash_attention", spy)
    ours = FlashAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    x = inputs("self", {"batch_first": True})
    hidden, triangle = padding(ROWS, True, "bool"), torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)
    ours(*x, key_padding_mask=hidden)
    assert seen["mask"].shape == (BATCH, 1, 1, ROWS)
    ours(*x, key_padding_mask=hidden, attn_mask=triangle)
    assert seen["mask"].shape == (1, 1, ROWS, ROWS)
    assert seen["bias"].shape == (BATCH, 1, 1, ROWS)
    ours(*x, key_padding_mask=padding(ROWS, True, "float"), attn_mask=triangle, is_causal=True)
    assert (seen["mask"], seen["bias"].shape, seen["causal"]) == (None, (BATCH, 1, 1, ROWS), True)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_fully_padded_sequence_gives_the_output_bias(evaluate: bool, need_weights: bool):
    """torch's module gives this in training without weights, and NaN otherwise."""
    _, ours = pair(batch_first=True)
    ours.train(not evaluate)
    x = inputs("self", {"batch_first": True})
    hidden = torch.zeros(BATCH, ROWS, dtype=torch.bool)
    hidden[1] = True
    out, weights = ours(*x, key_padding_mask=hidden, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(ROWS, EMBED))
    assert out[0].std() > 0.01
    if weights is not None:
        assert not weights[1].any()
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(ROWS, dtype=torch.float64))
    gradients = torch.autograd.grad(out.sum(), [x[0], *ours.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][1].any()


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_a_fully_padded_sequence_sees_the_added_key(options: dict[str, Any]):
    theirs, ours = pair(batch_first=True, **options)
    hidden = padding(KEYS, True, "bool")
    hidden[1] = True
    assert_parity(theirs, ours, inputs("three inputs", {"batch_first": True}), key_padding_mask=hidden)


@pytest.mark.parametrize("batch_first", [False, True])
def test_evaluation_matches_the_inference_path_of_torch(batch_first: bool):
    theirs, ours = (m.eval() for m in pair(batch_first=batch_first, dropout=0.4))
    x = inputs("self", {"batch_first": batch_first})
    hidden = padding(ROWS, True, "bool")
    with torch.inference_mode():
        for options in ({}, {"key_padding_mask": hidden}, {"need_weights": False, "key_padding_mask": hidden}):
            torch.testing.assert_close(ours(*x, **options), theirs(*x, **options), **EXACT)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}])
def test_dropout_only_in_training(options: dict[str, Any]):
    _, ours = pair(dropout=0.5, **options)
    x = inputs("three inputs", options)
    torch.manual_seed(0)
    first, second = ours(*x)[0], ours(*x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, ours(*x)[0])
    ours.eval()
    exact = ours(*x)[0]
    assert torch.equal(exact, ours(*x)[0])
    ours.train()
    mean = torch.stack([ours(*x, need_weights=False)[0] for _ in range(400)]).mean(0)
    assert (mean - exact).abs().mean() < 0.1 * (first - exact).abs().mean()


def by_hand(module: FlashAttention, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Grouped attention with every option, head by head, for one sequence ``[N, E]``."""
    heads, kv_heads, width = module.num_heads, module.num_kv_heads, module.head_dim
    assert module.in_proj_weight is not None
    projected = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    rows, keys = torch.arange(len(x))[:, None], torch.arange(len(x))
    outs, weights = [], []
    for head in range(heads):
        group = head // (heads // kv_heads)
        q = projected[:, head * width : (head + 1) * width]
        k, v = (
            projected[:, start + group * width : start + (group + 1) * width]
            for start in (module.embed_dim, module.embed_dim + kv_heads * width)
        )
        scores = (module.scale or width**-0.5) * q @ k.T
        scores = module.softcap * torch.tanh(scores / module.softcap) if module.softcap else scores
        left, right = module.window or (-1, -1)
        outside = torch.zeros(len(x), len(x), dtype=torch.bool)
        outside |= (keys < rows - left) & (left >= 0)
        outside |= (keys > rows + right) & (right >= 0)
        outside |= (keys > rows) & module.causal
        outside |= hidden if hidden is not None else torch.tensor(False)
        scores = scores.masked_fill(outside, float("-inf"))
        sink = scores.new_full((len(x), 1), float("-inf"))
        if module.sinks is not None:
            sink = module.sinks[head].expand(len(x), 1)
        zero = sink.new_full(sink.shape, 0.0 if module.add_zero_attn else float("-inf"))
        if module.bias_k is not None and module.bias_v is not None:
            mine = slice(group * width, (group + 1) * width)
            added = (module.scale or width**-0.5) * q @ module.bias_k[0, :, mine].T
            added = module.softcap * torch.tanh(added / module.softcap) if module.softcap else added
            scores = torch.cat([scores, added], -1)
            v = torch.cat([v, module.bias_v[0, :, mine]])
        p = torch.softmax(torch.cat([scores, zero, sink], -1), -1)
        outs.append(p[:, : len(v)] @ v)
        weights.append(p[:, : len(v) + module.add_zero_attn])
    return module.out_proj(torch.cat(outs, -1)), torch.stack(weights)


OPTIONS: dict[str, dict[str, Any]] = {
    "two heads of keys": {"num_kv_heads": 2},
    "one head of keys": {"num_kv_heads": 1, "causal": True},
    "window": {"window": (2, 1)},
    "causal window": {"window": (2, -1), "causal": True},
    "softcap and scale": {"softcap": 1.5, "scale": 0.9, "num_kv_heads": 2},
    "sinks": {"sinks": True, "causal": True},
    "sinks and a zero key": {"sinks": True, "add_zero_attn": True, "softcap": 2.0, "window": (1, 0)},
    "no bias": {"bias": False, "num_kv_heads": 2, "sinks": True},
    "an added key": {"add_bias_kv": True, "num_kv_heads": 2, "softcap": 1.5, "sinks": True, "window": (1, 0)},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_by_hand(options: dict[str, Any], padded: bool):
    module = FlashAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for i, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=i) * 0.4
    x = noise(ROWS, EMBED).requires_grad_()
    hidden = torch.arange(ROWS) == ROWS - 1 if padded else None
    actual = module(x, x, x, key_padding_mask=hidden, average_attn_weights=False)
    expected = by_hand(module, x, hidden)
    leaves = [x, *module.parameters()]
    for mine, hand in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, hand, **EXACT)
        dout = noise(*hand.shape, seed=4)
        for gradient, by_autograd in zip(
            torch.autograd.grad(mine, leaves, dout, retain_graph=True, allow_unused=True),
            torch.autograd.grad(hand, leaves, dout, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            if by_autograd is None:
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(gradient, by_autograd, **EXACT)


def test_grouped_parameters_are_smaller():
    module = FlashAttention(EMBED, HEADS, num_kv_heads=1, add_bias_kv=True)
    assert module.in_proj_weight is not None
    assert module.in_proj_weight.shape == (EMBED + 2 * EMBED // HEADS, EMBED)
    assert module.bias_k is not None
    assert module.bias_k.shape == (1, 1, EMBED // HEADS)


@pytest.mark.parametrize("options", [{}, {"sinks": True, "num_kv_heads": 2, "add_bias_kv": True, "window": (3, 0)}])
def test_copies(options: dict[str, Any]):
    module = FlashAttention(EMBED, HEADS, dtype=torch.float64, **options)
    x = inputs("self", {})
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        assert other.in_proj_weight is not module.in_proj_weight
        assert torch.equal(other(*x)[0], module(*x)[0])


# Dynamo makes an instance of every autograd.Function that it traces, and torch warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"sinks": True, "num_kv_heads": 2, "add_bias_kv": True, "window": (3, 0)}])
def test_compiles_whole(options: dict[str, Any]):
    module = FlashAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        x = noise(2, length, EMBED)
        actual, expected = (m(x, x, x, need_weights=False, is_causal=True)[0] for m in (compiled, module))
        torch.testing.assert_close(actual, expected, **EXACT)
        for mine, eager in zip(
            *(torch.autograd.grad(out.square().sum(), [*module.parameters()]) for out in (actual, expected)),
            strict=True,
        ):
            torch.testing.assert_close(mine, eager, **EXACT)
    torch.compiler.reset()


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_inside_the_encoder_of_torch(norm_first: bool, evaluate: bool):
    def encoder(flash: bool) -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, batch_first=True, norm_first=norm_first)
        if flash:
            layer.self_attn = FlashAttention(EMBED, HEADS, batch_first=True)  # pyright: ignore[reportAttributeAccessIssue]
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train(not evaluate)

    theirs, ours = encoder(False), encoder(True)
    ours.load_state_dict(theirs.state_dict())
    x = noise(BATCH, ROWS, EMBED)
    hidden = padding(ROWS, True, "bool")
    minus_infinity = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    triangle = nn.Transformer.generate_square_subsequent_mask(ROWS, dtype=torch.float64)
    with torch.set_grad_enabled(not evaluate):
        for options in (
            {},
            {"src_key_padding_mask": hidden},
            {"mask": triangle, "is_causal": True},
            {"mask": triangle, "src_key_padding_mask": minus_infinity, "is_causal": True},
        ):
            torch.testing.assert_close(ours(x, **options), theirs(x, **options), **EXACT)


def test_the_encoder_does_not_pass_over_our_options():
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, batch_first=True).double().eval()
    x = noise(BATCH, ROWS, EMBED)
    flash = FlashAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64).eval()
    layer.self_attn = flash  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        before = layer(x)
        flash.causal = True
        after = layer(x)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_exact_as_torch(dtype: torch.dtype):
    theirs, ours = (m.to(dtype) for m in pair(batch_first=True))
    x = inputs("self", {"batch_first": True})[0].detach().to(dtype)
    results = []
    for module, leaf in ((ours, x), (copy.deepcopy(theirs).double(), x.double()), (theirs, x)):
        leaf = leaf.clone().requires_grad_()
        out, weights = module(leaf, leaf, leaf)
        dout = noise(*out.shape).to(out.dtype)
        results.append((out, weights, *torch.autograd.grad(out, [leaf, *module.parameters()], dout)))
    assert {tensor.dtype for tensor in results[0]} == {dtype}
    what = ["output", "weights", "query", *(name for name, _ in ours.named_parameters())]
    for name, actual, exact, low in zip(what, *results, strict=True):
        check(actual, exact, low, factor=FORWARD if name in ("output", "weights") else GRADIENT, what=name)


def test_autocast():
    ours = FlashAttention(EMBED, HEADS, batch_first=True)
    x = noise(2, 6, EMBED).float()
    exact = ours(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(x, x, x)
    assert out.dtype == torch.bfloat16
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.02)


X = torch.zeros(2, 5, EMBED)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "heads do not divide": ({"num_heads": 3}, {}, ValueError, "num_heads 3"),
    "kv heads do not divide": ({"num_kv_heads": 3}, {}, ValueError, "num_kv_heads is 3"),
    "dropout of 1": ({"dropout": 1.0}, {}, ValueError, "dropout is 1.0"),
    "query width": ({}, {"query": X[..., :8]}, ValueError, "query has shape"),
    "key width": ({"kdim": 8}, {}, ValueError, "key has shape"),
    "lengths": ({}, {"value": X[:, :4]}, ValueError, "value has shape"),
    "batch": ({}, {"key": X[:1], "value": X[:1]}, ValueError, "key has shape"),
    "rank": ({}, {"query": X[None]}, ValueError, "query has 4 dimensions"),
    "not a tensor": ({}, {"query": [1.0]}, TypeError, "query is list"),
    "padding shape": ({}, {"key_padding_mask": torch.zeros(2, 6).bool()}, ValueError, "key_padding_mask has shape"),
    "padding dtype": ({}, {"key_padding_mask": torch.zeros(2, 5).int()}, TypeError, "key_padding_mask is int32"),
    "mask shape": ({}, {"attn_mask": torch.zeros(5, 6)}, ValueError, "attn_mask has shape"),
    "mask heads": ({}, {"attn_mask": torch.zeros(3, 5, 5)}, ValueError, "attn_mask has shape"),
    "mask rank": ({}, {"attn_mask": torch.zeros(1, 2, 4, 5, 5)}, ValueError, "attn_mask has 5 dimensions"),
    "window": ({"window": (-2, 0)}, {}, ValueError, "window is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case: str):
    construction, arguments, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        FlashAttention(**{"embed_dim": EMBED, "num_heads": HEADS, "batch_first": True, **construction})(
            **{"query": X, "key": X, "value": X, **arguments}
        )
