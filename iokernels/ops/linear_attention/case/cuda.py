"""The CUDA kernels of linear_attention: their configurations, their IO accounts, and compiling them without a GPU.

Counted as threads request bytes: an address that is the same for a warp once for the warp. The model is exact.
"""

from __future__ import annotations

from typing import Any

import torch

from iokernels.ops.linear_attention.cuda.tuning import (
    BACKWARD_K,
    BACKWARD_Q,
    BACKWARD_V,
    FORWARD,
    KERNELS,
    SEGMENT,
    Config,
)
from iokernels.ops.linear_attention.options import Needs, empty_denominator, empty_state
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.accounts import Account, Accounts, Bytes, Configs
from iokernels.testing.case.shape import Shape

from .accounts import NAIVE, floor_bytes, naive_bytes, problem, state_bytes
from .compile import learns, meta_call
from .shapes import VOCABULARY
from .traffic import Problem

_OFFSETS = 8  # the begin and end of a packed sequence, int32
_NUMBER = 4  # bytes of a log decay, an r, a dg, an element of a share


def crossing(shape: Shape, kernel: str) -> bool:
    """Whether ``kernel`` takes part in the gradient of decays."""
    return learns(shape) and kernel in (BACKWARD_Q, BACKWARD_K)


def launcher(shape: Shape, dtype: torch.dtype) -> Any:
    """What the launchers know of a call."""
    from iokernels.ops.linear_attention.cuda.launch import Launch

    return Launch(*meta_call(shape, dtype))


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Config]:
    """The configuration that each kernel would be launched with."""
    call = launcher(shape, dtype)
    return {kernel: call.config(kernel, crossing(shape, kernel)) for kernel in KERNELS}


def _walk(call: Problem, config: Config, y: int, z: int) -> tuple[int, int]:
    """What every walk reads: x and y, decays and offsets, once for each slice of z's columns, and z once; then the
    slices."""
    slices = -(-z // config.width)
    blocks = len(call.lengths) * call.heads * slices
    decays = {"none": 0, "head": sum(map(bool, call.lengths)) * call.heads, "token": call.visited}[call.decay_form]
    read = slices * (2 * call.visited * y * call.itemsize + decays * _NUMBER) + call.visited * z * call.itemsize
    return read + (blocks * config.num_warps * _OFFSETS if call.packed else 0), slices


def forward(call: Problem, config: Config) -> Bytes:
    """q, k and decays once for each slice, v and out once, states at both ends."""
    read, _ = _walk(call, config, call.key_width, call.value_width)
    return Bytes(read + (call.states if call.initial_state else 0), call.values_bytes + call.states)


def backward_v(call: Problem, config: Config) -> Bytes:
    """k, q and decays once for each slice, dO and dv once, the gradients of the states at both ends."""
    read, _ = _walk(call, config, call.key_width, call.value_width)
    written = call.values_bytes + (call.states if call.initial_state else 0)
    return Bytes(read + (call.states if call.dstate else 0), written)


def _segments(call: Problem) -> int:
    """Bytes of the states where segments end that are not the last of their sequence."""
    return sum((max(length, 1) - 1) // SEGMENT for length in call.lengths) * call.heads * call.state


def _share(call: Problem) -> int:
    """Bytes of an element of dq and dk as the kernels write them."""
    return call.itemsize if call.heads == call.key_heads else _NUMBER


def backward_q(call: Problem, config: Config) -> Bytes:
    """dO, v and decays once for each slice, k and dq once; for the gradient of decays also q, an r for each slice, and
    the states where segments end."""
    read, slices = _walk(call, config, call.value_width, call.key_width)
    read += call.states if call.initial_state else 0
    written = call.visited * call.key_width * _share(call)
    if call.crossing:
        read += call.visited * call.key_width * call.itemsize
        written += slices * call.visited * _NUMBER + _segments(call)
    return Bytes(read, written)


def backward_k(call: Problem, config: Config) -> Bytes:
    """v, dO and decays once for each slice, q and dk once; for the gradient of decays also k, r, the states where
    segments end, and a dg for each slice."""
    read, slices = _walk(call, config, call.value_width, call.key_width)
    read += call.states if call.dstate else 0
    written = call.visited * call.key_width * _share(call)
    if call.crossing:
        read += call.visited * (call.key_width * call.itemsize + _NUMBER) + _segments(call)
        # Sequences without tokens have no decay to meet their state.
        read += sum(map(bool, call.lengths)) * call.heads * call.state if call.dstate else 0
        written += slices * call.visited * _NUMBER
    return Bytes(read, written)


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel that one forward and backward pass launches."""
    call = problem(shape, dtype)
    if not call.states:
        return {}
    written = call.values_bytes + state_bytes(shape)
    floor = Bytes(floor_bytes(shape, dtype, "fwd") - written, written)
    found = {f"{FORWARD}_kernel": Account("fwd", floor, forward(call, configs[FORWARD]))}
    if call.rows:
        decays, number = call.decay_bytes, call.visited * _NUMBER if call.crossing else 0
        initial, last = (call.states if given else 0 for given in (call.initial_state, call.dstate))
        keys = call.keys_bytes * (2 if call.crossing else 1)
        values, ends = 2 * call.values_bytes, _segments(call) if call.crossing else 0
        met = last + number + ends if call.crossing else 0
        floors = {
            BACKWARD_Q: Bytes(keys + values + decays + initial, call.keys_bytes + number + ends),
            BACKWARD_K: Bytes(keys + values + decays + last + met, call.keys_bytes + number),
            BACKWARD_V: Bytes(2 * call.keys_bytes + call.values_bytes + decays + last, call.values_bytes + initial),
        }
        models = {BACKWARD_Q: backward_q, BACKWARD_K: backward_k, BACKWARD_V: backward_v}
        for kernel, least in floors.items():
            found[f"{kernel}_kernel"] = Account("bwd", least, models[kernel](call, configs[kernel]))
    return found


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.linear_attention.cuda import launch as cuda

    if which != "bwd":
        cuda.forward(*meta_call(shape, dtype))
    if which != "fwd":
        backward(shape, dtype, Needs(True, True, True, learns(shape), bool(shape.get("state"))))


def backward(shape: Shape, dtype: torch.dtype, needs: Needs) -> None:
    """Launch the kernels that these gradients take with meta tensors."""
    from iokernels.ops.linear_attention.cuda import launch as cuda

    q, k, v, options = meta_call(shape, dtype)
    state = empty_state(q, v, options)
    cuda.backward(
        v, state if shape.get("state") else None, q, k, v, None, state if needs.log_decay else None,
        empty_denominator(v, options), options, needs,
    )  # fmt: skip


COMPILATION = Compilation(
    launch=launch,
    # Every form of decay, with and without its gradient, both dtypes, aligned and not, packed, shared keys, the widths.
    points=tuple(
        (VOCABULARY.parse(text), dtype)
        for text, dtype in (
            ("b=4,h=32,n=4k,d=128,learn=0", torch.bfloat16),
            ("b=4,h=64,hk=1,n=4k,d=128,dv=64,decay=1,state=1", torch.bfloat16),
            ("b=8,h=32,n=4k,d=128,packed=1,decay=1", torch.float16),
            ("b=1,h=8,n=16k,d=64,decay=0", torch.bfloat16),
            ("b=1,h=8,n=4k,d=16,learn=0", torch.float16),
            ("b=4,h=32,n=2k,d=64", torch.bfloat16),
            ("b=2,h=8,n=4k,d=100,dv=90,decay=1,state=1", torch.float16),
        )
    ),
)

_SHAPES = (
    ("b=2,h=2,n=70,d=24,dv=40,learn=0,bnhd=1", torch.bfloat16),
    ("b=1,h=4,hk=2,n=37,d=20,dv=24,decay=1,state=1", torch.float16),
    ("b=4,h=2,n=70,d=24,dv=40,decay=1,packed=1,empty=1,state=1", torch.bfloat16),
    ("b=4,h=2,n=40,d=24,dv=40,learn=0,packed=1,empty=1", torch.float16),
    ("b=1,h=1,n=1030,d=8,dv=8", torch.float16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    # One warp where there are several slices of columns.
    test_configs={
        FORWARD: Config(chunk=32, num_warps=2),
        BACKWARD_Q: Config(chunk=32, num_warps=1),
        BACKWARD_K: Config(chunk=16, num_warps=1),
        BACKWARD_V: Config(chunk=64, num_warps=2),
    },
)
