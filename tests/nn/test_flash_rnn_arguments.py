"""What the recurrent modules are given by mistake: taken for what it says, or refused by an error that names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from iokernels.nn.flash_rnn import GRU, LSTM, RNN, SLSTM, SLSTMState

HUGE = 10**400
X = torch.ones(2, 5, 8)
SIZES = ["8", 8.0, True, -8, 0, HUGE, 2**40, None, torch.ones(2)]
FLAGS = [1, "x", None, 0.0]

REFUSED: list[tuple[str, list[Any]]] = [
    *[(name, SIZES) for name in ("input_size", "hidden_size", "num_layers", "num_heads")],
    *[(name, FLAGS) for name in ("bias", "batch_first", "bidirectional")],
    ("dropout", ["x", None, 2, -0.1, True, float("nan"), HUGE, 1j, torch.ones(2)]),
    ("proj_size", [1, "x", -1]),
    ("device", ["nowhere", 3.5]),
    ("dtype", ["float32", torch.int32, torch.complex64, 3]),
    ("backend", ["cudnn", 5, ["torch"], True]),
]


@pytest.mark.parametrize(("name", "values"), REFUSED, ids=[name for name, _ in REFUSED])
def test_an_argument_that_cannot_be(name: str, values: list[Any]) -> None:
    for module in (LSTM, GRU, RNN):
        if name == "proj_size" and module is not LSTM:
            continue
        for value in values:
            with pytest.raises((TypeError, ValueError), match=rf"^(LSTM|GRU|RNN|flash_rnn): .*\b{name}\b"):
                module(**{"input_size": 8, "hidden_size": 8, name: value})(X)


SLSTM_REFUSED: list[tuple[str, list[Any]]] = [
    ("embed_dim", SIZES),
    ("num_heads", SIZES),
    ("conv_size", ["4", 4.0, True, -1, HUGE, None]),
    ("bias", FLAGS),
    ("norm_eps", ["x", None, -1, float("nan"), float("inf"), HUGE, torch.ones(2)]),
    ("device", ["nowhere", 3.5]),
    ("dtype", ["float32", torch.int32, torch.complex64, 3]),
    ("backend", ["cudnn", 5, ["torch"], True]),
]


@pytest.mark.parametrize(("name", "values"), SLSTM_REFUSED, ids=[name for name, _ in SLSTM_REFUSED])
def test_an_argument_that_slstm_cannot_have(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"^(SLSTM|flash_rnn): .*\b{name}\b"):
            SLSTM(**{"embed_dim": 8, "num_heads": 2, name: value})(X)


def test_numbers_of_numpy() -> None:
    ones: list[Any] = [np.int32(1), np.int64(1)]
    others: list[Any] = [np.True_, np.False_, np.float32(0.0), np.float32(1e-5)]
    yes, no, rate, epsilon = others
    for one in ones:
        LSTM(8 * one, 8 * one, one, yes, no, rate, no, num_heads=2 * one)(X)
        SLSTM(8 * one, 2 * one, conv_size=4 * one, bias=yes, norm_eps=epsilon).init_state(one)


INPUTS: list[tuple[Any, str]] = [
    ("x", "str"),
    (None, "NoneType"),
    (np.ones((2, 5, 8), dtype=np.float32), "ndarray"),
    (X.to_sparse(), "sparse_coo"),
    (X.int(), "int32"),
    (X.double(), "float64"),
    (X.to("meta"), "meta"),
    (X[..., :7], r"\[2, 5, 7\]"),
    (X[0, 0], r"\[8\]"),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_input_that_is_none() -> None:
    nested = torch.nested.nested_tensor([X[0], X[1, :3]]), torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)
    for net, name in ((LSTM(8, 8), "LSTM: input"), (GRU(8, 8, num_heads=2), "GRU: input"), (SLSTM(8, 2), "SLSTM: x")):
        for x, found in [*INPUTS, *((one, "nested") for one in nested)]:
            with pytest.raises((TypeError, ValueError), match=rf"^{name} (is|has|.*num.*).*{found}"):
                net(x)


STATES: list[tuple[Any, str]] = [
    ("h", "str"),
    (5, "int"),
    (torch.zeros(1, 5, 8).int(), "int32"),
    (torch.zeros(1, 5, 8).to_sparse(), "sparse_coo"),
    (torch.zeros(1, 5, 8, device="meta"), "meta"),
    (torch.zeros(1, 4, 8), r"\[1, 4, 8\]; it must be \[1, 5, 8\]"),
    (torch.zeros(5, 8), r"\[5, 8\]"),
]


@pytest.mark.parametrize("heads", [1, 2])
def test_a_state_that_is_none(heads: int) -> None:
    for state, found in STATES:
        with pytest.raises((TypeError, ValueError), match=rf"^LSTM: .*hx.* {found}"):
            LSTM(8, 8, num_heads=heads)(X, (torch.zeros(1, 5, 8), state))
        with pytest.raises((TypeError, ValueError), match=rf"^GRU: .*hx.* {found}"):
            GRU(8, 8, num_heads=heads)(X, state)


def test_a_state_that_slstm_cannot_take() -> None:
    net, token = SLSTM(8, 2), X[:, :1]
    conv, memory = net.init_state(2)
    wrong: list[tuple[Any, str]] = [
        (None, "state is None"),
        ("s", "state is str"),
        (memory, "state is Tensor"),
        (SLSTMState(conv, "m"), "state.memory is str"),  # pyright: ignore[reportArgumentType]
        (SLSTMState(conv.int(), memory), "state.conv is int32"),
        (SLSTMState(conv.to_sparse(), memory), "state.conv is of the layout sparse_coo"),
        (net.init_state(3), r"state.conv has shape \[3, 3, 8\]; .* must be 2"),
        (SLSTMState(conv, memory[:3]), r"state.memory has shape \[3, 2, 2, 4\]; .* must be 4"),
        (net.init_state(2, dtype=torch.float64), "state.memory is float64; it must be float32 where x is float32"),
        (net.init_state(2, device="meta"), "state.conv is on meta; it must be on cpu"),
        (SLSTMState(conv[:1].expand(2, -1, -1), memory), "state.conv is expanded"),
        (SLSTMState(conv, memory[:, :1].expand(-1, 2, -1, -1)), "state.memory is expanded"),
    ]
    for state, message in wrong:
        with torch.no_grad(), pytest.raises((TypeError, ValueError), match=f"^SLSTM: {message}"):
            net.step(token, state)
    for batch in ("2", 2.5, True, -1, HUGE):
        with pytest.raises((TypeError, ValueError), match=r"^SLSTM: batch is"):
            net.init_state(batch)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^SLSTM: dtype is"):
        net.init_state(2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"^SLSTM: return_state is str"):
        net(X, return_state="yes")  # pyright: ignore[reportArgumentType]


def test_a_state_need_not_have_the_dtype_of_x() -> None:
    """The inputs that the convolution saw are only read; autocast changes neither part of a state."""
    net = SLSTM(8, 2)
    state = net.init_state(2, dtype=torch.bfloat16)
    with torch.no_grad():
        assert net.step(X[:, :1], state).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert net.step(X[:, :1], state).dtype == torch.bfloat16
    assert (state.conv.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
    assert state.memory.abs().max() > 0
