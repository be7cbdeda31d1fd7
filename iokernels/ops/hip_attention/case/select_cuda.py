"""The CUDA kernel of select_hip: its configurations, its IO account, and compiling it without a GPU.

Counted as threads request bytes: an address that is the same for a warp once for the warp. The model is exact where
that of the Triton kernels is (:mod:`.traffic`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from iokernels.ops.hip_attention.cuda.tuning import HELD, KERNEL, Config
from iokernels.ops.hip_attention.options import Stage, block_end, most_chunks
from iokernels.testing.case import Compilation, Pass
from iokernels.testing.case.accounts import Account, Accounts, Bytes, Configs
from iokernels.testing.case.shape import Shape

from .compile import launch_stages, plan, region_of, tensors
from .shapes import SELECT
from .traffic import Call, Visit, searched_floor, visits

_WORD = 4  # bytes of a score, of an entry of a list, of a count
_LATER_PASSES = 5  # over the scores of a list: three digits, what is kept, where it goes


def launcher(shape: Shape, dtype: torch.dtype) -> Any:
    """What the launcher knows of the first stage of a call."""
    from iokernels.ops.hip_attention.cuda.launch import Launch

    region, first = region_of(shape), plan(shape)[0]
    return Launch(*tensors(shape, dtype), most_chunks(shape.n, shape.nk, first.chunk, region), region, first)


def configs(shape: Shape, dtype: torch.dtype) -> dict[str, Config]:
    """The configuration that the first stage would be launched with."""
    return {KERNEL: launcher(shape, dtype).config}


def launch(shape: Shape, dtype: torch.dtype, which: Pass) -> None:
    """Launch all stages with meta tensors."""
    from iokernels.ops.hip_attention.cuda import launch as cuda

    launch_stages(shape, dtype, cuda.stage)


def select_account(call: Call, stages: Sequence[Stage], config: Config) -> Account:
    """The account of the kernel, over all stages."""
    row = call.width * call.itemsize
    floor, read, written, furthest, listed = 0, 0, 0, 0, 0
    for visit in visits(call, stages):
        furthest = 0 if visit.block == 0 else furthest
        keys = 2 * (visit.stage.chunk.bit_length() - 1) * sum(visit.alive)
        floor += searched_floor(call, visit) + call.batch * call.kv_heads * max(keys - furthest, 0) * row
        furthest = max(furthest, keys)
        searched, chosen = _search(call, config, visit), _choice(call, visit)
        read += call.batch * (call.searched * searched.read + call.lists * chosen.read)
        written += call.batch * (call.searched * searched.written + call.lists * chosen.written)
        listed += call.batch * call.lists * _WORD * (_found(visit) + 1)
    return Account("fwd", Bytes(min(floor, read), listed), Bytes(read, written))


def _reach(call: Call, visit: Visit) -> int:
    """Candidates up to the last that may be selected from."""
    if visit.before:
        return len(visit.alive)
    end = block_end(visit.block, call.q_len, call.kv_len, call.region)
    return min(-(-end // visit.stage.chunk), visit.slots)


def _found(visit: Visit) -> int:
    return min(visit.kept, sum(visit.alive))


def _search(call: Call, config: Config, visit: Visit) -> Bytes:
    """What the thread blocks of one searched head move for one block of queries, their counter included."""
    row, steps, reach = call.width * call.itemsize, visit.stage.chunk.bit_length() - 1, _reach(call, visit)
    loads = 1 if call.means(visit.stage) <= config.block_r else steps
    read = 0
    if visit.before:
        # Blocks past the end of the list read its length too.
        read += _WORD * (-(-visit.slots // config.block_c) * config.num_warps + reach)
    for first in range(0, reach, config.block_c):
        alive = sum(visit.alive[first : min(first + config.block_c, reach)])
        read += (loads * call.rows(visit.block) + 2 * steps * alive) * row if alive else 0
    arrivals = _WORD * max(-(-reach // config.block_c), 1)
    return Bytes(read + arrivals, _WORD * reach + arrivals)


def _choice(call: Call, visit: Visit) -> Bytes:
    """What the last thread block of a list moves to choose."""
    reach, found = _reach(call, visit), _found(visit)
    read = _WORD * (reach * (call.searched // call.lists) + (found if visit.before else 0))
    written = _WORD * (found + 1)
    if reach > HELD:
        read, written = read + _LATER_PASSES * _WORD * reach, written + _WORD * reach
    return Bytes(read, written)


COMPILATION = Compilation(
    launch=launch,
    # Both dtypes, aligned and not, widths, and rows that take several tiles where there is little shared memory.
    points=tuple(
        (SELECT.parse(f"b=1,{text}"), dtype)
        for text, dtype in (
            ("h=32,hkv=8,n=16k,d=128", torch.bfloat16),
            ("h=32,hkv=8,n=1,nk=128k,d=128", torch.bfloat16),
            ("h=32,hkv=8,n=16k,d=256", torch.float16),
            ("h=8,hkv=2,n=16k,d=64", torch.float16),
            ("h=8,hkv=2,n=16k,d=20", torch.bfloat16),
        )
    ),
)

_SHAPES = (
    ("b=2,h=4,hkv=2,n=40,nk=301,d=24,budget=48,sink=5,window=24,bq=16", torch.float16),
    ("b=1,h=4,hkv=2,n=1,nk=900,d=16,budget=48,sink=5,window=24,heads=1", torch.bfloat16),
    ("b=1,h=4,hkv=2,n=40,nk=301,d=20,budget=48,sink=5,window=24,heads=2,bq=32", torch.float16),
    ("b=1,h=8,hkv=1,n=32,nk=700,d=40,budget=48,sink=5,window=24,bq=32", torch.bfloat16),
)


def accounts_of(call_of: Any, naive_bytes: Any, naive: str) -> Accounts:
    """The accounts of the case, which knows its calls and what they are compared with."""

    def model(shape: Shape, dtype: torch.dtype, configs: Configs) -> dict[str, Account]:
        if shape.quest:
            return {}
        return {"hip_attention_select_cuda_kernel": select_account(call_of(shape, dtype), plan(shape), configs[KERNEL])}

    return Accounts(
        model=model,
        configs=configs,
        naive_bytes=naive_bytes,
        naive=naive,
        shapes=tuple((SELECT.parse(text), dtype) for text, dtype in _SHAPES),
        test_configs={KERNEL: Config(block_r=16, num_warps=1)},
    )
