"""The CUDA kernel of linear_attention: its configurations, its IO account, and compiling it without a GPU.

Counted as threads request bytes: an address that is the same for a warp once for the warp. The model is exact.
"""

from __future__ import annotations

from typing import Any

import torch

from iokernels.bench.accounts import Account, Accounts, Bytes, Configs
from iokernels.bench.case import Compilation, Pass
from iokernels.bench.cases.linear_attention_accounts import NAIVE, floor_bytes, naive_bytes, problem, state_bytes
from iokernels.bench.cases.linear_attention_kernels import meta_call
from iokernels.bench.cases.linear_attention_shapes import VOCABULARY
from iokernels.bench.shape import Shape
from iokernels.ops.linear_attention.options import empty_in_order_of, empty_state
from iokernels.ops.linear_attention.tuning_cuda import KERNEL, Config

_OFFSETS = 8  # the begin and end of a packed sequence, int32
_DECAY = 4  # bytes of a log decay


def launcher(shape: Shape, dtype: torch.dtype) -> Any:
    """What the launcher knows of a call."""
    from iokernels.ops.linear_attention.cuda import Launch

    return Launch(*meta_call(shape, dtype))


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Config]:
    """The configuration that the call would be launched with."""
    return {KERNEL: launcher(shape, dtype).config}


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of the kernel, which runs forward only: q and k, and decays, once for each slice of v's columns."""
    call, config = problem(shape, dtype), configs[KERNEL]
    blocks_of_a_head = -(-shape.dv // config.width)
    blocks = len(call.lengths) * call.heads * blocks_of_a_head
    if not blocks:
        return {}
    decays = {"none": 0, "head": sum(map(bool, call.lengths)) * call.heads, "token": call.visited}[call.decay_form]
    keys = 2 * call.visited * call.key_width * call.itemsize
    read = blocks_of_a_head * (keys + decays * _DECAY) + call.values_bytes
    read += state_bytes(shape) if call.initial_state else 0
    read += blocks * config.num_warps * _OFFSETS if call.packed else 0
    written = call.values_bytes + state_bytes(shape)
    floor = floor_bytes(shape, dtype, "fwd") - written
    return {"linear_attention_cuda_kernel": Account("fwd", Bytes(floor, written), Bytes(read, written))}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernel with meta tensors: there is one, of the forward pass."""
    if which != "bwd":
        one = launcher(shape, dtype)
        one.run(empty_in_order_of(one.v, shape.dv), empty_state(one.q, one.v, one.options))


COMPILATION = Compilation(
    launch=launch,
    # Every form of decay, both dtypes, aligned and not, packed, and the widths.
    points=tuple(
        (VOCABULARY.parse(text), dtype)
        for text, dtype in (
            ("b=4,h=32,n=4k,d=128,learn=0", torch.bfloat16),
            ("b=4,h=64,hk=1,n=4k,d=128,dv=64,decay=1,state=1", torch.bfloat16),
            ("b=8,h=32,n=4k,d=128,packed=1,decay=1", torch.float16),
            ("b=1,h=8,n=16k,d=64,decay=0", torch.bfloat16),
            ("b=1,h=8,n=4k,d=16,learn=0", torch.float16),
            ("b=2,h=8,n=4k,d=100,dv=90,decay=1,state=1", torch.float16),
        )
    ),
)

_SHAPES = (
    ("b=2,h=2,n=70,d=24,dv=40,learn=0,bnhd=1", torch.bfloat16),
    ("b=1,h=4,hk=2,n=37,d=20,dv=24,decay=1,state=1", torch.float16),
    ("b=4,h=2,n=70,d=24,dv=40,decay=1,packed=1,empty=1,state=1", torch.bfloat16),
    ("b=4,h=2,n=40,d=24,dv=40,learn=0,packed=1,empty=1", torch.float16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs={KERNEL: Config(chunk=32, num_warps=2)},
)
