"""The recurrent cells in Triton: their pointwise equations, forward and backward, once.

A cell's forward function takes its ``values`` and ``states`` (see :mod:`.cells`, which has the same equations for
PyTorch) as tuples of float32 tiles ``[BLOCK_B, BLOCK_D]`` and returns the next states. Its backward function takes the
values, the states before and after the step and the gradients of the states after it; it returns the gradients of the
values and those of the states before, as far as they do not come through R. Of ``previous``, h is there only for cells
that declare ``reads_h``. Rows and columns of padding are zero throughout, and nothing divides by them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from iokernels.ops.shared.triton_tiles import LOG2E, tanh


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``, without an exponential that can overflow."""
    decay = tl.exp2(tl.abs(x) * -LOG2E)
    return tl.where(x >= 0.0, 1.0, decay) / (1.0 + decay)


@triton.jit
def log_sigmoid(x):
    """``log(1 / (1 + exp(-x)))``, likewise."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp2(tl.abs(x) * -LOG2E))


@triton.jit
def lstm_forward(values, states):
    """States h, c; gates i, f, z, o."""
    i, f, z, o = values
    c = sigmoid(f) * states[1] + sigmoid(i) * tanh(z)
    return sigmoid(o) * tanh(c), c


@triton.jit
def lstm_backward(values, previous, states, dstates):
    """See the module."""
    i, f, z, o = sigmoid(values[0]), sigmoid(values[1]), tanh(values[2]), sigmoid(values[3])
    t = tanh(states[1])
    dh, dc = dstates
    dc += dh * o * (1.0 - t * t)
    dvalues = (
        dc * z * i * (1.0 - i),
        dc * previous[1] * f * (1.0 - f),
        dc * i * (1.0 - z * z),
        dh * t * o * (1.0 - o),
    )
    return dvalues, (tl.zeros_like(dh), dc * f)


@triton.jit
def gru_forward(values, states):
    """State h; gates r and z, then the recurrent and the input part of n."""
    r, z, s, x = values
    n = tanh(x + sigmoid(r) * s)
    return (n + sigmoid(z) * (states[0] - n),)


@triton.jit
def gru_backward(values, previous, states, dstates):
    """See the module."""
    r, z, s = sigmoid(values[0]), sigmoid(values[1]), values[2]
    n = tanh(values[3] + r * s)
    dh = dstates[0]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dvalues = (dn * s * r * (1.0 - r), dh * (previous[0] - n) * z * (1.0 - z), dn * r, dn)
    return dvalues, (dh * z,)


@triton.jit
def elman_forward(values, states):
    """State h; one gate."""
    return (tanh(values[0]),)


@triton.jit
def elman_backward(values, previous, states, dstates):
    """See the module."""
    h = tanh(values[0])
    return (dstates[0] * (1.0 - h * h),), (tl.zeros_like(h),)


@triton.jit
def slstm_forward(values, states):
    """States h, c, n, m; gates i, f, z, o."""
    i, f, z, o = values
    _h, c, n, m = states
    # Where nothing was stored yet, the stabiliser of the past means nothing.
    f = log_sigmoid(f) + tl.where(n == 0.0, float("-inf"), m)
    m = tl.maximum(f, i)
    i, f = tl.exp2((i - m) * LOG2E), tl.exp2((f - m) * LOG2E)
    c = f * c + i * tanh(z)
    n = f * n + i
    return sigmoid(o) * c / n, c, n, m


@triton.jit
def slstm_backward(values, previous, states, dstates):
    """See the module. The stabiliser counts as a constant."""
    _h, c, n, m = states
    _hp, cp, np, mp = previous
    dh, dc, dn, _dm = dstates
    i = tl.exp2((values[0] - m) * LOG2E)
    f = tl.exp2((log_sigmoid(values[1]) + tl.where(np == 0.0, float("-inf"), mp) - m) * LOG2E)
    z, o = tanh(values[2]), sigmoid(values[3])
    inverse = 1.0 / tl.where(n == 0.0, 1.0, n)
    h = o * c * inverse
    dc += dh * o * inverse
    dn -= dh * h * inverse
    dvalues = (
        i * (z * dc + dn),
        f * sigmoid(-values[1]) * (cp * dc + np * dn),
        dc * i * (1.0 - z * z),
        dh * h * (1.0 - o),
    )
    none = tl.zeros_like(dh)
    return dvalues, (none, dc * f, dn * f, none)


FORWARD: dict[str, Any] = {
    "lstm": lstm_forward,
    "gru": gru_forward,
    "elman": elman_forward,
    "slstm": slstm_forward,
}
"""The forward function of every cell."""

BACKWARD: dict[str, Any] = {
    "lstm": lstm_backward,
    "gru": gru_backward,
    "elman": elman_backward,
    "slstm": slstm_backward,
}
"""The backward function of every cell."""
