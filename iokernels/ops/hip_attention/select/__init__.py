"""The public selectors: which blocks of keys a block of queries should attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.ops.block_sparse_attention.arguments import one_of, pair_of_tensors
from iokernels.ops.block_sparse_attention.index import KEY_BLOCKS, BlockIndex
from iokernels.ops.hip_attention import reference
from iokernels.ops.hip_attention.op import bounds_op, exact_op, global_op, pages_op, stage_op
from iokernels.ops.hip_attention.options import STAGES, HipStage, Region, Stage, candidates, most_chunks
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec
from iokernels.runtime.contracts.plain import whole

from .call import backend_of, budget_of, hip_plan, index_of, nothing_in, nothing_of, region_of, select_hip_contract

SEARCHES = ("stages", "global")


def _contract(operator: str, **more: Spec) -> Contract:
    return Contract(operator, q=Spec("B Hq Nq D", FLOATS), k=Spec("B Hkv Nk D", same_dtype_as="q"), **more)


_BOUNDS = Spec("B Hkv pages D", same_dtype_as="q", optional=True)
_EXACT = _contract("select_exact")
_QUEST = _contract("select_quest", kmin=_BOUNDS, kmax=_BOUNDS)
_PAGES = Contract("page_bounds", k=Spec("B Hkv Nk D", FLOATS))


def select_hip(
    q: Tensor,
    k: Tensor,
    *,
    budget: int = 2048,
    sink: int = 256,
    window: int = 1024,
    causal: bool = True,
    search: str = "stages",
    stages: Sequence[HipStage | tuple[int, ...]] = STAGES,
    block_k: int | None = None,
    branch: int = 2,
    heads: str = "kv",
    block_q: int = 64,
    backend: str | None = None,
) -> BlockIndex:
    """The blocks of keys that a hierarchical search finds. It guarantees nothing: a key that no key it looked at
    resembles is easily missed (:func:`select_quest` has a guarantee).

    ``search="stages"`` is InfiniteHiP's (Lee et al., 2025, arXiv:2502.08910): chunks of keys each look for their best
    key by halving, independently, and the best chunks are divided again. It looks at ``2 log2(c) / c`` of all keys for
    its first chunks of c, one in 16 by default, and so is quadratic in N with a small constant. ``search="global"`` is
    the first paper's (arXiv:2406.09827): ``budget / branch`` branches over all keys, halved together,
    ``O(budget log N)`` a block of queries, with a choice among all branches in every step; PyTorch only.

    Args:
        q: ``[B, Hq, Nq, D]``, float16, bfloat16, float32 or float64. Any strides.
        k: ``[B, Hkv, N, D]``, dtype and device of q. Hkv divides Hq. Row i stands at position ``i + N - Nq``.
        budget: keys that a list names, a multiple of its blocks. Sink and window come on top.
        sink: first keys that are attended to anyway, and not searched.
        window: latest keys of a row that are attended to anyway. A key is searched for the rows whose window it is
            not in.
        causal: rows see no later keys. Otherwise all keys after the sink are searched.
        search: ``"stages"`` or ``"global"``.
        stages: of ``"stages"``: (chunk, stride_q, keep) each, :class:`HipStage`. Chunks are powers of two, each a
            divisor of the one before, the last one the block of the list: 8 to 128. ``keep`` is raised to the budget.
        block_k: of ``"global"``: keys of a listed block, 8 to 128; 8 if None.
        branch: of ``"global"``: keys of the units that are searched, a divisor of block_k. What is found is rounded out
            to blocks, the best ``budget / block_k`` of them: the format has no smaller ones.
        heads: who shares a list. ``"kv"``: the query heads of a key head, searched together. ``"all"``: everyone; each
            key head searches by itself, and a chunk scores what its best head gives it (the published default).
            ``"query"``: nobody.
        block_q: query rows that share a list, 16, 32, 64 or 128. A call of fewer rows is one block.
        backend: ``"triton"``, ``"cuda"`` (float16 and bfloat16), ``"torch"``, ``"reference"``, or None for the rule of
            :mod:`iokernels.runtime.dispatch`, which never takes ``"cuda"``.

    Returns:
        A :class:`BlockIndex` of ``budget / block`` entries a list, or of all there are. Equal scores: the lower block
        comes first, on every backend. Queries enter as means of neighbouring rows, rounded to their dtype. A score that
        is not a number selects nothing, and takes nobody's place.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument.
        UnsupportedError: the named backend cannot run this call.

    No argument is modified, nothing waits for the device, and no gradient flows: lists are constants.
    """
    region = region_of(select_hip_contract, q, k, heads, block_q, sink, window, causal)
    if search not in SEARCHES:
        raise ValueError(f"select_hip: search is {search!r}; it must be one of {', '.join(SEARCHES)}")
    if search == "global":
        if dispatch.requested(backend) not in (None, "torch"):
            select_hip_contract.require(False, f"backend is {backend!r}; search='global' has 'torch' only")
        block_k = one_of("select_hip", "block_k", 8 if block_k is None else block_k, KEY_BLOCKS)
        branch = whole("select_hip", "branch", branch, least=0)
        select_hip_contract.require(
            branch >= 1 and block_k % branch == 0,
            f"branch is {branch}; it must divide block_k, {block_k}",
        )
        budget = budget_of("select_hip", budget, block_k)
        if nothing_in(q, k):
            return nothing_of(q, k, region, block_k)
        slots = min(budget // block_k, most_chunks(q.shape[2], k.shape[2], block_k, region))
        # More branches than units would each be empty, or one of these.
        branches = min(budget // branch, (k.shape[2] + branch - 1) // branch)
        ids, counts = global_op(q.detach(), k.detach(), branch, branches, block_k, slots, *region)
        return index_of(q, k, ids, counts, region, block_k)
    select_hip_contract.require(
        block_k is None, "block_k goes with search='global'; the last of stages says it otherwise"
    )
    whole("select_hip", "branch", branch, least=1)
    plan = hip_plan(stages, budget, region)
    chosen = backend_of("select_hip", backend, q, k)
    if nothing_in(q, k):
        return nothing_of(q, k, region, plan[-1].chunk)
    lists: tuple[Tensor | None, Tensor | None] = (None, None)
    for stage in plan:
        lists = hip_stage(q, k, *lists, stage, region, chosen)
    assert lists[0] is not None
    assert lists[1] is not None
    return index_of(q, k, *lists, region, plan[-1].chunk)


def hip_stage(
    q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, stage: Stage, region: Region, backend: str
) -> tuple[Tensor, Tensor]:
    """One stage, of as many slots as there can be candidates."""
    most = candidates(q.shape[2], k.shape[2], ids, stage, region)
    stage = stage._replace(slots=min(stage.slots, most))
    if backend == "reference":
        return reference.stage(q.detach(), k.detach(), ids, counts, region, stage)
    return stage_op(q.detach(), k.detach(), ids, counts, backend, *region, *stage)


class PageBounds(NamedTuple):
    """The least and the largest value of each column of a page of keys, both ``[B, Hkv, pages, D]``."""

    kmin: Tensor
    kmax: Tensor


def page_bounds(
    k: Tensor, *, page: int = 16, out: PageBounds | None = None, first: int = 0, backend: str | None = None
) -> PageBounds:
    """The bounds of every page of keys, for :func:`select_quest`. They can be kept beside a cache.

    Args:
        k: ``[B, Hkv, N, D]``, any strides. The last page may be partly filled.
        page: keys of a page: 8, 16, 32, 64 or 128.
        out: bounds of at least ``ceil(N / page)`` pages, in which only pages from that of key ``first`` on are
            written: after appending to a cache of n keys, pass ``first=n``. Made new if None.
        first: the first key that has changed.
        backend: ``"triton"``, ``"torch"`` or None.

    Returns:
        :class:`PageBounds`, ``out`` where it was given, in the dtype of k. A column of a page that holds a NaN has NaN
        for its bounds.

    Raises:
        TypeError, ValueError: an argument that does not fit, or an ``out`` of which elements share memory.
    """
    sizes = _PAGES.check(k=k)
    page = one_of("page_bounds", "page", page, KEY_BLOCKS)
    first = whole("page_bounds", "first", first, least=0)
    chosen = backend_of("page_bounds", backend, k, k)
    pages = (sizes["Nk"] + page - 1) // page
    if first != 0 and out is None:
        raise ValueError(f"page_bounds: first is {first} without out; bounds that do not exist cannot be kept")
    if first > sizes["Nk"]:
        raise ValueError(f"page_bounds: first is {first}; it must be 0 to the number of keys")
    if out is None:
        shape = (*k.shape[:2], pages, k.shape[3])
        out = PageBounds(k.new_empty(shape), k.new_empty(shape))
    else:
        _check_room(out, k)
    for name, x in zip(("kmin", "kmax"), out, strict=True):
        if x.dtype != k.dtype or x.device != k.device or (*x.shape[:2], x.shape[3]) != (*k.shape[:2], k.shape[3]):
            raise ValueError(
                f"page_bounds: out.{name} is {list(x.shape)} of {x.dtype} on {x.device}; it must be like k but for "
                "the pages in place of the keys"
            )
        if x.shape[2] < pages:
            raise ValueError(f"page_bounds: out.{name} has {x.shape[2]} pages; {sizes['Nk']} keys have {pages}")
    if k.shape[0] * k.shape[1] * k.shape[2] * k.shape[3] > 0:
        bounds_op(k.detach(), *out, chosen, page, first // page)
    return out


def _check_room(out: Any, k: Tensor) -> None:
    """Raise where bounds cannot be written without losing others."""
    kmin, kmax = pair_of_tensors("page_bounds", "out", out)
    for name, x in (("kmin", kmin), ("kmax", kmax)):
        if any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"page_bounds: out.{name} is expanded, of strides {x.stride()}; it is written, so every "
                             "element needs memory of its own")  # fmt: skip
        # A compiler cannot ask for the bit; the operator itself refuses when the compiled code runs.
        if not torch.compiler.is_compiling() and x.is_neg():
            raise ValueError(f"page_bounds: out.{name} is the negative of other memory; it is written, so give that")
    if kmin is kmax:
        raise ValueError("page_bounds: out.kmin is out.kmax; both are written, so each needs memory of its own")


def select_quest(
    q: Tensor,
    k: Tensor,
    *,
    bounds: PageBounds | None = None,
    budget: int = 2048,
    sink: int = 256,
    window: int = 1024,
    causal: bool = True,
    page: int = 16,
    heads: str = "kv",
    block_q: int = 64,
    backend: str | None = None,
) -> BlockIndex:
    """The pages whose keys could have the highest logits (Quest, Tang et al., 2024, arXiv:2406.10774).

    A page scores ``sum_d max(q_d kmin_d, q_d kmax_d)``, an upper bound of ``q . k`` for each of its keys. So it has a
    guarantee: a finite key whose logit, for any row of the block, exceeds the score of the last page that is listed is
    in the list. It reads ``2 / page`` of the keys.

    Args:
        q, k, sink, window, causal, heads, block_q: as in :func:`select_hip`. Rows enter one by one, without averaging,
            which would void the guarantee.
        bounds: :func:`page_bounds` of k, where they are kept; computed here if None. May have more pages than k.
        budget: keys that a list names, a multiple of page.
        page: keys of a page and of a listed block: 8, 16, 32, 64 or 128.
        backend: ``"triton"``, ``"torch"``, ``"reference"`` or None.

    Returns:
        A :class:`BlockIndex` of ``budget / page`` entries a list, or of all there are.

    Raises:
        As :func:`select_hip`.
    """
    region = region_of(_QUEST, q, k, heads, block_q, sink, window, causal)
    page = one_of("select_quest", "page", page, KEY_BLOCKS)
    budget = budget_of("select_quest", budget, page)
    chosen = backend_of("select_quest", backend, q, k)
    if bounds is not None:
        bounds = PageBounds(*pair_of_tensors("select_quest", "bounds", bounds))
        _QUEST.check(q=q, k=k, kmin=bounds.kmin, kmax=bounds.kmax)
    if nothing_in(q, k):
        return nothing_of(q, k, region, page)
    pages = most_chunks(q.shape[2], k.shape[2], page, region)
    slots = min(budget // page, pages)
    if chosen == "reference":
        return index_of(q, k, *reference.pages(q.detach(), k.detach(), region, page, slots), region, page)
    if bounds is None:
        bounds = page_bounds(k, page=page, backend=chosen)
    kmin, kmax = bounds
    if kmin.shape[2] < pages:
        raise ValueError(f"select_quest: bounds has {kmin.shape[2]} pages; the keys to select from have {pages}")
    ids, counts = pages_op(q.detach(), kmin, kmax, chosen, k.shape[2], page, slots, *region)
    return index_of(q, k, ids, counts, region, page)


def select_exact(
    q: Tensor,
    k: Tensor,
    *,
    budget: int = 2048,
    sink: int = 256,
    window: int = 1024,
    causal: bool = True,
    block_k: int = 8,
    heads: str = "kv",
    block_q: int = 64,
    backend: str | None = None,
) -> BlockIndex:
    """The blocks that hold the largest logits, all of which it computes: what other selectors are measured against.

    Its time is that of dense attention; its memory is not. It runs on ``torch`` (any device) and ``reference``.

    Args:
        q, k, sink, window, causal, heads, block_q: as in :func:`select_quest`.
        budget: keys that a list names, a multiple of block_k.
        block_k: keys of a listed block: 8, 16, 32, 64 or 128.
        backend: ``"torch"``, ``"reference"`` or None.
    """
    region = region_of(_EXACT, q, k, heads, block_q, sink, window, causal)
    block_k = one_of("select_exact", "block_k", block_k, KEY_BLOCKS)
    budget = budget_of("select_exact", budget, block_k)
    refusals = {"torch": lambda: None, "reference": lambda: None}
    requested = dispatch.requested(backend)
    chosen = dispatch.choose("select_exact", requested, "cpu", refusals)
    if nothing_in(q, k):
        return nothing_of(q, k, region, block_k)
    slots = min(budget // block_k, most_chunks(q.shape[2], k.shape[2], block_k, region))
    if chosen == "reference":
        return index_of(q, k, *reference.exact(q.detach(), k.detach(), region, block_k, slots), region, block_k)
    ids, counts = exact_op(q.detach(), k.detach(), block_k, slots, *region)
    return index_of(q, k, ids, counts, region, block_k)
