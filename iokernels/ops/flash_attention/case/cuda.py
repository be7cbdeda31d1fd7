"""The CUDA kernels of flash_attention: their configurations, their IO accounts, and compiling them without a GPU.

Counted as threads request bytes: an address that is the same for a warp once for the warp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from iokernels.ops.flash_attention.cuda.tuning import BACKWARD_KV, BACKWARD_Q, FORWARD, HELD, KERNELS, Config
from iokernels.ops.flash_attention.options import Needs
from iokernels.ops.flash_attention.triton import tuning
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.accounts import Account, Accounts, Bytes, Configs
from iokernels.testing.case.shape import Shape

from . import traffic as io
from .accounts import NAIVE, naive_bytes, problem
from .compile import meta_call
from .shapes import VOCABULARY

_OFFSETS = 16  # the begin and end of a packed sequence's queries and keys, int32, for each warp
_STATISTICS = 8  # bytes of an lse and a delta


def _starts(length: int, config: Config) -> range:
    """The first of the rows that each block with rows owns."""
    return range(0, length, 16 * config.warps)


def _offsets(call: io.Problem, side: int, config: Config) -> int:
    """Bytes of offsets that the blocks of one head read, also those beyond the end of their sequence."""
    if not call.packed:
        return 0
    total = sum(lengths[side] for lengths in call.lengths)
    return len(call.lengths) * len(_starts(min(call.longest[side], total), config)) * config.warps * _OFFSETS


def _keys_of_blocks(call: io.Problem, config: Config) -> Iterator[int]:
    """Keys that each block of rows of one head reads: all that any of its rows sees, from the start of a tile."""
    for n, nk in call.lengths:
        for first in _starts(n, config):
            last = min(first + 16 * config.warps, n) - 1
            low = max(first + nk - n - call.window_left, 0) if call.window_left >= 0 else 0
            stop = nk if call.window_right < 0 else min(last + nk - n + call.window_right + 1, nk)
            yield max(stop - low // config.block * config.block, 0)


def _rows_of_blocks(call: io.Problem, config: Config) -> Iterator[int]:
    """Rows of one head that each block of keys reads: all that see any of its keys, from the start of a tile."""
    for n, nk in call.lengths:
        for first in _starts(nk, config):
            last = min(first + 16 * config.warps, nk) - 1
            low = max(first - call.window_right - (nk - n), 0) if call.window_right >= 0 else 0
            stop = n if call.window_left < 0 else min(last + call.window_left - (nk - n) + 1, n)
            yield max(stop - low // config.block * config.block, 0)


def forward(call: io.Problem, config: Config) -> Bytes:
    """q, out and lse once; k and v once for each block of rows that sees them."""
    keys = sum(_keys_of_blocks(call, config)) * call.pair
    q = call.rows * call.head_dim * call.itemsize
    written = call.rows * (call.value_dim * call.itemsize + _STATISTICS // 2)
    return Bytes(q + call.heads * (keys + _offsets(call, 0, config)), written)


def backward_q(call: io.Problem, config: Config) -> Bytes:
    """q, dO and dq once; k and v once for each block of rows that sees them. A warp reads the statistics of 16 rows:
    the last one's in place of those that do not exist."""
    blocks = sum(len(_starts(n, config)) for n, _ in call.lengths)
    statistics = blocks * 16 * config.warps * _STATISTICS
    keys = sum(_keys_of_blocks(call, config)) * call.pair
    read = call.rows * call.pair + call.heads * (keys + statistics + _offsets(call, 0, config))
    return Bytes(read, call.rows * call.head_dim * call.itemsize)


def backward_kv(call: io.Problem, config: Config) -> Bytes:
    """k, v, dk and dv once; q, dO, lse and delta once for each block of keys that they see. Heads too wide for both
    gradients take two launches, which read everything twice."""
    launches = 1 if max(call.head_dim, call.value_dim) <= HELD else 2
    rows = call.heads * sum(_rows_of_blocks(call, config)) * (call.pair + _STATISTICS)
    own = call.keys * call.pair
    return Bytes(launches * (own + rows + call.kv_heads * _offsets(call, 1, config)), own)


def accounts(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
    """The account of every kernel that one forward and backward pass launches."""
    call = problem(shape, dtype)
    # The least that each has to move does not depend on how it is tiled, nor on the language.
    least = io.accounts(call, dict.fromkeys(tuning.KERNELS, tuning.Config(16, 16, 4, 1)))
    found: dict[str, Account] = {}
    if call.rows:
        floor = least["flash_attention_fwd_kernel"].floor
        found["flash_attention_forward"] = Account("fwd", floor, forward(call, configs[FORWARD]))
    if call.rows and call.keys:
        found["flash_attention_delta"] = least["flash_attention_bwd_delta_kernel"]
        for name, twin, model in (
            ("flash_attention_backward_q", "flash_attention_bwd_dq_kernel", backward_q(call, configs[BACKWARD_Q])),
            ("flash_attention_backward_kv", "flash_attention_bwd_dkv_kernel", backward_kv(call, configs[BACKWARD_KV])),
        ):
            found[name] = Account("bwd", least[twin].floor, model)
    return found


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Config]:
    """The configuration that each kernel would be launched with."""
    from iokernels.ops.flash_attention.cuda.launch import Launch

    q, k, v, options = meta_call(shape, dtype)
    call = Launch(q, k, v, options)
    return {kernel: call.of_kernel(kernel, q, k, v)[0] for kernel in KERNELS}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch the kernels of a pass with meta tensors."""
    from iokernels.ops.flash_attention.cuda import launch as cuda

    q, k, v, options = meta_call(shape, dtype)
    out, lse = q.new_empty(*q.shape[:3], shape.dv), q.new_empty(q.shape[:3], dtype=torch.float32)
    if which != "bwd":
        out, lse = cuda.forward(q, k, v, options)
    if which != "fwd":
        cuda.backward(
            out, lse if shape.lse else None, q, k, v, out, lse, options, Needs(True, True, True, False, False)
        )


COMPILATION = Compilation(
    launch=launch,
    points=tuple(
        (VOCABULARY.parse(f"b=2,h=8,hkv=2,n=1k,bnhd=1,{text}"), dtype)
        for text, dtype in (
            ("d=64", torch.bfloat16),
            ("d=128,causal=1", torch.bfloat16),
            ("d=128,causal=1,packed=1,softcap=30", torch.float16),
            ("d=192,dv=128,causal=1", torch.bfloat16),
            ("d=256,causal=1", torch.bfloat16),
            ("d=20,dv=75,causal=1,left=256,softcap=30,lse=1", torch.float16),
        )
    ),
    # dq and dk of 256 columns as NVRTC compiles them for sm_80 and sm_90a: beside 128 accumulators and two tiles of
    # scores no register is left. nvcc spills nothing.
    spills=24,
)

_PLAIN = "b=1,h=4,hkv=2,n=40,nk=50,d=24,dv=40"

_SHAPES = (
    (f"{_PLAIN},lse=1", torch.float16),
    (f"{_PLAIN},causal=1,left=9", torch.float16),
    ("b=1,h=2,n=50,nk=40,d=24,dv=40,left=7,right=9", torch.float16),
    ("b=1,h=2,hkv=1,n=50,nk=30,d=24,dv=40,causal=1", torch.float16),
    ("b=4,h=4,hkv=2,n=40,nk=33,d=24,dv=40,causal=1,packed=1,empty=1", torch.float16),
    ("b=1,h=2,n=5,nk=0,d=24,dv=40", torch.float16),
    ("b=1,h=2,hkv=1,n=20,nk=20,d=136,dv=20,causal=1", torch.bfloat16),
)

ACCOUNTS = Accounts(
    model=accounts,
    configs=configs,
    naive_bytes=naive_bytes,
    naive=NAIVE,
    shapes=tuple((VOCABULARY.parse(text), dtype) for text, dtype in _SHAPES),
    test_configs=dict.fromkeys(KERNELS, Config(block=16, warps=1)) | {BACKWARD_Q: Config(block=16, warps=2)},
)
