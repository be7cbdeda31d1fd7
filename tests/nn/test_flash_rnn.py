"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` against those of torch; ``nn.SLSTM`` against its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import iokernels
from iokernels.nn.flash_rnn import GRU, LSTM, RNN, SLSTM, SLSTMState

from .stepping import check_from_nothing_by_steps, check_generation_continues_training

PAIRS = {"lstm": (LSTM, torch.nn.LSTM), "gru": (GRU, torch.nn.GRU), "elman": (RNN, torch.nn.RNN)}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first, two directions": {"batch_first": True, "bidirectional": True},
    "layers, without bias": {"num_layers": 3, "bias": False},
    "layers, two directions": {"num_layers": 2, "bidirectional": True},
}


def dense(ours: Any, name: str) -> Tensor:
    """A parameter of ours as torch's: recurrent weights of several heads as a block-diagonal matrix."""
    weight = ours.get_parameter(name)
    if not name.startswith("weight_hh") or ours.num_heads == 1:
        return weight
    rows = weight.unflatten(0, (-1, ours.num_heads, weight.shape[1]))
    return torch.cat([torch.block_diag(*gate.unbind(0)) for gate in rows.unbind(0)])


def pair(cell: str, heads: int, backend: str | None, **mode: Any) -> tuple[Any, Any]:
    """Ours and torch's with the same function, float64."""
    torch.manual_seed(0)
    one, other = PAIRS[cell]
    ours = one(5, 8, dtype=torch.float64, num_heads=heads, backend=backend, **mode)
    torchs = other(5, 8, dtype=torch.float64, **mode)
    torchs.load_state_dict({name: dense(ours, name).detach() for name, _ in ours.named_parameters()})
    return ours, torchs


def states_for(ours: Any, batch: int | None) -> Any:
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    size = (rows, 8) if batch is None else (rows, batch, 8)
    drawn = [torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return tuple(drawn) if ours.cell == "lstm" else drawn[0]


def tensors_of(found: Any) -> list[Tensor]:
    out, last = found
    out = out.data if isinstance(out, PackedSequence) else out
    return [out, *(last if isinstance(last, tuple) else (last,))]


def assert_same(ours: Any, torchs: Any, x: Any, hx: Any) -> None:
    """Outputs, states, and the gradients of input, initial states and parameters."""
    actual, expected = tensors_of(ours(x, hx)), tensors_of(torchs(x, hx))
    upstream = [torch.randn_like(y) for y in expected]
    leaves = [y for y in (x, *(hx if isinstance(hx, tuple) else (hx,))) if isinstance(y, Tensor) and y.requires_grad]
    names = [name for name, _ in ours.named_parameters()]
    wholes = [dense(ours, name) for name in names]
    # Gradients of ours reach its blocks; those of torch's are looked at in the blocks only.
    found = torch.autograd.grad(actual, [*leaves, *(ours.get_parameter(name) for name in names)], upstream)
    wanted = torch.autograd.grad(expected, [*leaves, *(torchs.get_parameter(name) for name in names)], upstream)
    blocks = torch.autograd.grad(wholes, [ours.get_parameter(name) for name in names], wanted[len(leaves) :])
    for one, other in zip((*actual, *found), (*expected, *wanted[: len(leaves)], *blocks), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize(("heads", "backend"), [(1, None), (1, "reference"), (2, "torch")])
def test_it_is_the_module_of_torch(heads: int, backend: str | None, cell: str, mode: str) -> None:
    """One head through PyTorch's kernels, one head through flash_rnn, and two heads: a block-diagonal matrix."""
    ours, torchs = pair(cell, heads, backend, **MODES[mode])
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    assert_same(ours, torchs, x, states_for(ours, 3 if ours.batch_first else 7))
    assert_same(ours, torchs, x, None)
    one = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert_same(ours, torchs, one, states_for(ours, None))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("cell", PAIRS)
@pytest.mark.parametrize(("heads", "backend"), [(1, None), (1, "reference"), (2, "torch")])
def test_packed_sequences(heads: int, backend: str | None, cell: str, ordered: bool) -> None:
    ours, torchs = pair(cell, heads, backend, num_layers=2, bidirectional=True)
    lengths = (6, 6, 2, 1) if ordered else (2, 6, 1, 6)
    x = pack_sequence([torch.randn(n, 5, dtype=torch.float64) for n in lengths], enforce_sorted=ordered)
    assert_same(ours, torchs, x, states_for(ours, 4))
    assert_same(ours, torchs, x, None)
    out, expected = ours(x)[0], torchs(x)[0]
    for one, other in zip(out[1:], expected[1:], strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("cell", PAIRS)
def test_a_wrong_weight_shows(cell: str) -> None:
    ours, torchs = pair(cell, 2, None)
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    ours.weight_hh_l0.data[-1, -1] += 1e-3
    with pytest.raises(AssertionError):
        assert_same(ours, torchs, x, None)


@pytest.mark.parametrize("cell", PAIRS)
def test_state_dicts_load_both_ways(cell: str) -> None:
    one, other = PAIRS[cell]
    made: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(3)
    ours = one(5, 8, **made)
    torch.manual_seed(3)
    torchs = other(5, 8, **made)
    x = torch.randn(6, 2, 5)
    assert torch.equal(ours(x)[0], torchs(x)[0]), "the same seed draws the same weights"
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.reset_parameters()
    assert not torch.equal(ours(x)[0], torchs(x)[0])
    ours.load_state_dict(torchs.state_dict())
    assert torch.equal(ours(x)[0], torchs(x)[0])
    ours.reset_parameters()
    torchs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x)[0], torchs(x)[0])
    heads, fresh = one(5, 8, num_heads=4, **made), one(5, 8, num_heads=4, **made)
    gates = heads.weight_hh_l0.shape[0] // 8
    assert heads.weight_hh_l1_reverse.shape == (gates * 8, 2)
    assert "num_heads=4" in repr(heads)
    fresh.load_state_dict(heads.state_dict())
    assert torch.equal(copy.deepcopy(fresh)(x)[0], heads(x)[0])
    assert torch.equal(heads.double()(x.double())[0].float().round(decimals=4), fresh(x)[0].round(decimals=4))


def test_dropout_between_layers_in_training_only() -> None:
    torch.manual_seed(0)
    net = LSTM(5, 8, 2, dropout=0.5, num_heads=2)
    x = torch.randn(6, 2, 5)
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    without = LSTM(5, 8, 2, num_heads=2)
    without.load_state_dict(net.state_dict())
    assert torch.equal(net(x)[0], without(x)[0])
    net.train()
    net.dropout = 1.0
    nothing = net(x)[0]
    gates = net.get_parameter("bias_ih_l1").view(4, 2, 4).expand(2, 6, 4, 2, 4)  # all that is left of its input
    weight, bias = (net.get_parameter(f"{name}_hh_l1") for name in ("weight", "bias"))
    h = iokernels.flash_rnn(gates, weight.view(4, 2, 4, 4), bias.view(4, 2, 4))
    torch.testing.assert_close(nothing, h.transpose(0, 1).flatten(2))


def test_one_head_on_the_cpu_runs_the_kernels_of_torch(monkeypatch: Any) -> None:
    """Unless another backend is asked for, by name or for all calls."""
    called: list[int] = []
    monkeypatch.setattr("iokernels.nn.flash_rnn.flash_rnn", lambda gates, *_, **__: called.append(1) or 1 / 0)
    net, x = LSTM(5, 8), torch.randn(3, 2, 5)
    net(x)
    assert called == []
    for ask in (lambda: LSTM(5, 8, backend="reference")(x), lambda: LSTM(5, 8, num_heads=2)(x)):
        with pytest.raises(ZeroDivisionError):
            ask()
    with iokernels.use_backend("reference"), pytest.raises(ZeroDivisionError):
        net(x)
    assert len(called) == 3


def test_low_precision_and_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 8)
    for net in (LSTM(8, 8, num_heads=2), SLSTM(8, 2)):
        exact = net(x)[0] if isinstance(net, LSTM) else net(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = net(x)[0] if isinstance(net, LSTM) else net(x)
        assert (cast - exact).norm() < 0.03 * exact.norm()
    low = GRU(8, 8, num_heads=2, dtype=torch.bfloat16)
    assert {y.dtype for y in tensors_of(low(x.bfloat16()))} == {torch.bfloat16}
    assert low(x.bfloat16(), torch.zeros(1, 2, 8, dtype=torch.bfloat16))[0].isfinite().all()


def test_compiles_without_graph_breaks() -> None:
    x = torch.randn(3, 5, 8)
    lstm, slstm = LSTM(8, 8, 2, num_heads=2, bidirectional=True), SLSTM(8, 2)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    for one, other in zip(tensors_of(compiled(x)), tensors_of(lstm(x)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(slstm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), slstm(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTM(5, 8, proj_size=4), r"LSTM: proj_size is 4; it must be 0"),
        (lambda: RNN(5, 8, nonlinearity="relu"), r"RNN: nonlinearity is 'relu'; it must be 'tanh'"),
        (lambda: GRU(5, 8, num_heads=3), r"GRU: num_heads is 3; it must divide hidden_size, which is 8"),
        (lambda: SLSTM(8, 3), r"SLSTM: num_heads is 3; it must divide embed_dim, which is 8"),
        (lambda: SLSTM(8, 2, conv_size=-1), r"SLSTM: conv_size is -1"),
        (lambda: LSTM(5, 8)(torch.randn(3, 2, 6)), r"LSTM: input has shape \[3, 2, 6\]; .* input_size, which is 5"),
        (lambda: LSTM(5, 8)(torch.randn(5)), r"LSTM: input has shape \[5\]; it must have 3 dimensions, or 2"),
        (lambda: LSTM(5, 8)(torch.randn(3, 2, 5), torch.zeros(1, 2, 8)), r"LSTM: hx must be a pair \(h, c\)"),
        (lambda: GRU(5, 8)(torch.randn(3, 2, 5), torch.zeros(1, 3, 8)), r"GRU: hx has h of shape \[1, 3, 8\]"),
        (lambda: SLSTM(8, 2)(torch.randn(2, 5, 9)), r"SLSTM: x has .*dimension 2 \(embed_dim\) must be 8"),
        (lambda: SLSTM(8, 2).step(torch.randn(1, 1, 8), SLSTM(8, 2).init_state(1)), r"SLSTM: .*no gradient"),
    ],
)  # fmt: skip
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_refused_dtype() -> None:
    with pytest.raises(TypeError, match=r"LSTM: input is float64; the parameters are float32"):
        LSTM(5, 8)(torch.randn(3, 2, 5, dtype=torch.float64))


def slstm_by_definition(net: SLSTM, x: Tensor) -> Tensor:
    """One sequence [N, E], head by head and token by token; without a stabiliser, which small gates do not need."""
    before = max(net.conv_size - 1, 0)
    past = torch.cat([x.new_zeros(before, net.embed_dim), x])
    seen = x
    if net.conv_weight is not None and net.conv_bias is not None:
        rows = [(past[t : t + net.conv_size] * net.conv_weight[:, 0].T).sum(0) for t in range(len(x))]
        seen = F.silu(torch.stack(rows) + net.conv_bias)
    outs = []
    for head in range(net.num_heads):
        columns = slice(head * net.head_dim, (head + 1) * net.head_dim)
        h = c = n = x.new_zeros(net.head_dim)
        rows = []
        for t in range(len(x)):
            i, f, z, o = (
                net.weight_ih[gate, head] @ source[t, columns]
                + net.weight_hh[gate, head] @ h
                + (0 if net.bias is None else net.bias[gate, head])
                for gate, source in enumerate((seen, seen, x, x))
            )
            c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
            h = o.sigmoid() * c / n
            centred = h - h.mean()
            rows.append(centred / (centred.square().mean() + net.norm_eps).sqrt() * net.norm_weight[columns])
        outs.append(torch.stack(rows))
    return torch.cat(outs, 1)


def slstm(**options: Any) -> SLSTM:
    torch.manual_seed(0)
    net = SLSTM(12, 3, **{"dtype": torch.float64, **options})
    torch.nn.init.normal_(net.norm_weight)
    return net


@pytest.mark.parametrize("options", [{}, {"conv_size": 0}, {"bias": False, "conv_size": 1}], ids=str)
def test_slstm_is_what_it_says(options: dict[str, Any]) -> None:
    net = slstm(**options)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    found = net(x)
    torch.testing.assert_close(found, torch.stack([slstm_by_definition(net, row) for row in x]))
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("options", [{}, {"conv_size": 0}], ids=str)
def test_slstm_generation_continues_training(options: dict[str, Any]) -> None:
    check_generation_continues_training(slstm(**options))


def test_slstm_from_nothing_by_steps() -> None:
    check_from_nothing_by_steps(slstm())
    low = SLSTM(12, 3, dtype=torch.bfloat16).init_state(2)
    assert isinstance(low, SLSTMState)
    assert (low.conv.dtype, low.memory.dtype) == (torch.bfloat16, torch.float32)


def test_slstm_forgets_slowly_at_first() -> None:
    net = SLSTM(64, 2)
    assert net.bias is not None
    kept = net.bias[1].sigmoid()
    assert 0.95 < kept.min() < 0.96 < 0.997 < kept.max() < 0.998
    assert not net.bias[[0, 2, 3]].any()
