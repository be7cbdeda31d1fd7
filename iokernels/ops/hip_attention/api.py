"""The public selectors: which blocks of keys a block of queries should attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iokernels.runtime import device as devices
from iokernels.runtime import dispatch
from iokernels.runtime.contracts import FLOATS, Contract, Spec, untraced_value

from . import reference
from .block_index import KEY_BLOCKS, BlockIndex
from .op import bounds_op, exact_op, global_op, pages_op, stage_op
from .select_options import (
    HEADS,
    STAGES,
    HipStage,
    Region,
    Stage,
    candidates,
    most_chunks,
)

MAX_HEAD_DIM = 256
"""Widest head that the kernels hold on chip, in Triton and in CUDA C++."""

SEARCHES = ("stages", "global")


def _contract(operator: str, **more: Spec) -> Contract:
    return Contract(operator, q=Spec("B Hq Nq D", FLOATS), k=Spec("B Hkv Nk D", same_dtype_as="q"), **more)


_BOUNDS = Spec("B Hkv pages D", same_dtype_as="q", optional=True)
select_hip_contract, _EXACT = _contract("select_hip"), _contract("select_exact")
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
        comes first, on every backend. Queries enter as means of neighbouring rows, rounded to their dtype.

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
        block_k = 8 if block_k is None else block_k
        _block("select_hip", "block_k", block_k)
        select_hip_contract.require(
            branch >= 1 and block_k % branch == 0,
            f"branch is {branch}; it must divide block_k, {block_k}",
        )
        slots = _slots(select_hip_contract, budget, block_k, most_chunks(q.shape[2], k.shape[2], block_k, region))
        ids, counts = global_op(q.detach(), k.detach(), branch, max(budget // branch, 1), block_k, slots, *region)
        return index_of(q, k, ids, counts, region, block_k)
    select_hip_contract.require(
        block_k is None, "block_k goes with search='global'; the last of stages says it otherwise"
    )
    plan = hip_plan(stages, budget, region)
    chosen = backend_of("select_hip", backend, q)
    lists: tuple[Tensor | None, Tensor | None] = (None, None)
    for stage in plan:
        lists = hip_stage(q, k, *lists, stage, region, chosen)
    assert lists[0] is not None
    assert lists[1] is not None
    return index_of(q, k, *lists, region, plan[-1].chunk)


def hip_plan(stages: Sequence[HipStage | tuple[int, ...]], budget: int, region: Region) -> tuple[Stage, ...]:
    """The stages of a search; ``slots`` is what each would keep of a long enough sequence."""
    given = [HipStage(*stage) for stage in stages]
    select_hip_contract.require(len(given) > 0, "stages is empty; there must be at least one")
    for above, stage in zip([None, *given], given):  # noqa: B905, the last has none below
        ok = stage.chunk >= 2 and stage.chunk & (stage.chunk - 1) == 0
        select_hip_contract.require(ok, f"stages has chunks of {stage.chunk}; they must be powers of two, at least 2")
        select_hip_contract.require(
            above is None or above.chunk > stage.chunk,
            f"stages has chunks of {stage.chunk} after {above.chunk if above else 0}; they must become smaller",
        )
        select_hip_contract.require(
            stage.stride_q in (1, 2, 4, 8, 16),
            f"stages has stride_q {stage.stride_q}; it must be 1, 2, 4, 8 or 16, so that blocks of queries are whole",
        )
    last = given[-1].chunk
    _block("select_hip", "the last chunk of stages", last)
    _slots(select_hip_contract, budget, last, budget)
    plan, parent = [], 0
    for position, stage in enumerate(given):
        # A stage whose chunks hold all of a short sequence must not lose any: the first and last may be in part.
        keep = budget if position == len(given) - 1 else max(stage.keep, budget) + 2 * stage.chunk
        plan.append(Stage(stage.chunk, stage.stride_q, keep // stage.chunk, parent))
        parent = stage.chunk
    return tuple(plan)


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
        :class:`PageBounds`, ``out`` where it was given, in the dtype of k.
    """
    sizes = _PAGES.check(k=k)
    _block("page_bounds", "page", page)
    pages = (sizes["Nk"] + page - 1) // page
    if first != 0 and out is None:
        raise ValueError(f"page_bounds: first is {first} without out; bounds that do not exist cannot be kept")
    if not 0 <= first <= sizes["Nk"]:
        raise ValueError(f"page_bounds: first is {first}; it must be 0 to the number of keys")
    if out is None:
        shape = (*k.shape[:2], pages, k.shape[3])
        out = PageBounds(k.new_empty(shape), k.new_empty(shape))
    for name, x in zip(("kmin", "kmax"), out, strict=True):
        if x.dtype != k.dtype or x.device != k.device or (*x.shape[:2], x.shape[3]) != (*k.shape[:2], k.shape[3]):
            raise ValueError(
                f"page_bounds: out.{name} is {list(x.shape)} of {x.dtype} on {x.device}; it must be like k but for "
                "the pages in place of the keys"
            )
        if x.shape[2] < pages:
            raise ValueError(f"page_bounds: out.{name} has {x.shape[2]} pages; {sizes['Nk']} keys have {pages}")
    bounds_op(k.detach(), out.kmin, out.kmax, backend_of("page_bounds", backend, k), page, first // page)
    return out


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
    guarantee: a key whose logit, for any row of the block, exceeds the score of the last page that is listed is in the
    list. It reads ``2 / page`` of the keys.

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
    _block("select_quest", "page", page)
    pages = most_chunks(q.shape[2], k.shape[2], page, region)
    slots = _slots(_QUEST, budget, page, pages)
    chosen = backend_of("select_quest", backend, q)
    if chosen == "reference":
        return index_of(q, k, *reference.pages(q.detach(), k.detach(), region, page, slots), region, page)
    if bounds is None:
        bounds = page_bounds(k, page=page, backend=chosen)
    kmin, kmax = bounds
    _QUEST.check(q=q, k=k, kmin=kmin, kmax=kmax)
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
    _block("select_exact", "block_k", block_k)
    slots = _slots(_EXACT, budget, block_k, most_chunks(q.shape[2], k.shape[2], block_k, region))
    refusals = {"torch": lambda: None, "reference": lambda: None}
    requested = dispatch.requested(backend)
    chosen = dispatch.choose("select_exact", requested, "cpu", refusals)
    if chosen == "reference":
        return index_of(q, k, *reference.exact(q.detach(), k.detach(), region, block_k, slots), region, block_k)
    ids, counts = exact_op(q.detach(), k.detach(), block_k, slots, *region)
    return index_of(q, k, ids, counts, region, block_k)


def region_of(
    contract: Contract, q: Tensor, k: Tensor, heads: Any, block_q: Any, sink: Any, window: Any, causal: Any
) -> Region:
    """Check the arguments that all selectors have."""
    sizes = contract.check(q=q, k=k)
    contract.require(
        sizes["Hkv"] > 0 and sizes["Hq"] % sizes["Hkv"] == 0,
        f"q has {sizes['Hq']} heads and k has {sizes['Hkv']}; the heads of k must divide those of q",
    )
    contract.require(sizes["D"] > 0, "the heads are 0 wide; they must be at least 1")
    contract.require(sizes["Nk"] > 0, "k has no keys; there must be at least 1")
    if heads not in HEADS:
        raise ValueError(f"{contract.operator}: heads is {heads!r}; it must be one of {', '.join(HEADS)}")
    if not isinstance(causal, bool):
        raise TypeError(f"{contract.operator}: causal is {type(causal).__name__}; it must be a bool")
    for name, value in (("sink", sink), ("window", window)):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{contract.operator}: {name} is {type(value).__name__}; it must be an int")
        if value < 0:
            raise ValueError(f"{contract.operator}: {name} is {value}; it must be at least 0")
    if block_q not in (16, 32, 64, 128):
        raise ValueError(f"{contract.operator}: block_q is {block_q!r}; it must be 16, 32, 64 or 128")
    return Region(heads, block_q, sink, window, causal)


def _block(operator: str, name: str, value: Any) -> None:
    if value not in KEY_BLOCKS:
        raise ValueError(f"{operator}: {name} is {value!r}; it must be one of {', '.join(map(str, KEY_BLOCKS))}")


def _slots(contract: Contract, budget: Any, block: int, most: Any) -> Any:
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise TypeError(f"{contract.operator}: budget is {type(budget).__name__}; it must be an int")
    contract.require(budget >= block, f"budget is {budget}; it must be at least a block, {block}")
    return min(budget // block, most)


def backend_of(operator: str, backend: str | None, q: Tensor) -> str:
    """The backend that a selector runs on."""
    requested = dispatch.requested(backend)
    refusals = {
        "triton": lambda: devices.kernel_refusal(q, {"D": q.shape[3]}, MAX_HEAD_DIM),
        "cuda": lambda: cuda_refusal(q),
        "torch": lambda: None,
        "reference": lambda: None,
    }
    if operator != "select_hip":
        del refusals["cuda"]
    if operator == "page_bounds":
        del refusals["reference"]
    return dispatch.choose(operator, requested, q.device.type, refusals)


def cuda_refusal(q: Tensor) -> str | None:
    """Why the CUDA kernel of the hierarchical search cannot take ``q``, as the end of a sentence."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernel takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"D is {q.shape[3]}, and its kernel holds heads up to {MAX_HEAD_DIM} wide"
    return devices.cuda_refusal(q.device)


def index_of(q: Tensor, k: Tensor, ids: Tensor, counts: Tensor, region: Region, block_k: int) -> BlockIndex:
    """The lists as an index, with the always-on keys that they were made for."""
    return BlockIndex(
        ids, counts, region.block_q, block_k, region.sink, region.window, *map(untraced_value, (q.shape[2], k.shape[2]))
    )  # fmt: skip
