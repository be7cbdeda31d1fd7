"""Lists that outlive a step of decoding: a query resembles the one before it, and so do the keys that it wants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.index import BlockIndex
from iokernels.runtime.contracts.plain import whole

from .options import STAGES, HipStage, Region, Stage
from .select import PageBounds, hip_stage
from .select.call import (
    backend_of,
    hip_plan,
    index_of,
    nothing_in,
    nothing_of,
    region_of,
    select_hip_contract,
    stages_of,
)


class SelectionCache:
    """Runs each stage of :func:`select_hip` only every so many steps of decoding, for one layer.

    A step is one call of :meth:`select`, of one or a few new positions. Stage i runs when the number of steps since the
    start is a multiple of ``refresh[i]``, on the list that the stage before it made last; in between, the list of the
    last stage is used as it is. Keys that left the window since the first stage ran are not in its list: until it runs
    again the window is longer by as many, so no key falls between the two.

    ``refresh=(1, 1, 1)`` is :func:`select_hip` in every step.

    Args:
        refresh: steps between two runs of each stage, each a multiple of the next.
        stages: as in :func:`select_hip`.

    Raises:
        ValueError: not one positive number for each stage, or one that is no multiple of the next.

    Lists are replaced, not written to. For CUDA graphs, capture one graph for each step of a cycle of ``refresh[0]``.
    """

    def __init__(
        self, refresh: Sequence[int] = (16, 8, 4), stages: Sequence[HipStage | tuple[int, ...]] = STAGES
    ) -> None:
        if not isinstance(refresh, (tuple, list)):
            raise TypeError(f"SelectionCache: refresh is {type(refresh).__name__}; it must be a tuple of ints")
        self.refresh = tuple(whole("SelectionCache", "refresh", every, least=-(2**62)) for every in refresh)
        self.stages = stages_of("SelectionCache", stages)
        ok = len(self.refresh) == len(self.stages) and all(every >= 1 for every in self.refresh)
        if not ok or any(above % below for above, below in pairwise(self.refresh)):
            raise ValueError(
                f"SelectionCache: refresh is {self.refresh}; it must have {len(self.stages)} positive numbers, one for "
                "each stage, each a multiple of the next"
            )
        self.reset()

    def reset(self) -> None:
        """Forget all lists: the next step runs every stage. Call it when the keys become others."""
        self._step = 0
        self._lists: list[tuple[Tensor, Tensor]] = []
        self._made_for: Any = None
        self._first_len = self._last_len = 0

    def __repr__(self) -> str:
        return f"SelectionCache(refresh={self.refresh}, step={self._step})"

    def due(self) -> tuple[bool, ...]:
        """Which stages the next step will run."""
        return tuple(not self._lists or self._step % every == 0 for every in self.refresh)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        budget: int = 2048,
        sink: int = 256,
        window: int = 1024,
        heads: str = "kv",
        block_q: int = 64,
        backend: str | None = None,
    ) -> BlockIndex:
        """The list of this step. Causal; arguments as in :func:`select_hip`.

        Raises:
            ValueError: more rows than a block of queries has; or other arguments or shapes than in the steps before, or
                fewer keys, without a :meth:`reset`.
        """
        region = region_of(select_hip_contract, q, k, heads, block_q, sink, window, True)
        select_hip_contract.require(
            q.shape[2] <= region.block_q,
            f"q has {q.shape[2]} rows; a cache of lists serves decoding, of at most block_q, {region.block_q}",
        )
        plan = hip_plan(self.stages, budget, region)
        made_for = (plan, region, q.shape[0], q.shape[1], k.shape[1], q.shape[3], q.device)
        if self._lists:
            select_hip_contract.require(
                made_for == self._made_for and k.shape[2] >= self._last_len,
                "the lists were made for other arguments, shapes or longer keys; call reset() between sequences",
            )
        chosen = backend_of("select_hip", backend, q, k)
        if nothing_in(q, k):
            return nothing_of(q, k, region, plan[-1].chunk)
        self._run(q, k, plan, region, chosen)
        self._made_for, self._last_len = made_for, k.shape[2]
        aged = region._replace(window=region.window + k.shape[2] - self._first_len)
        return index_of(q, k, *self._lists[-1], aged, plan[-1].chunk)

    def _run(self, q: Tensor, k: Tensor, plan: tuple[Stage, ...], region: Any, backend: str) -> None:
        due = self.due()
        lists = list(self._lists)
        above: tuple[Tensor | None, Tensor | None] = (None, None)
        for position, (stage, runs) in enumerate(zip(plan, due, strict=True)):
            if runs:
                lists[position : position + 1] = [hip_stage(q, k, *above, stage, region, backend)]
            above = lists[position]
        if due[0]:
            self._first_len = k.shape[2]
        self._lists, self._step = lists, self._step + 1


# What this room returns and keeps can be saved, and loaded by a plain torch.load.
torch.serialization.add_safe_globals([BlockIndex, HipStage, PageBounds, Region, SelectionCache, Stage])
