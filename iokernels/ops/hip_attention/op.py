"""The selectors as ``torch.library`` operators. They have no gradients: a list is a constant.

This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.runtime.registration import lazily, register
from iokernels.runtime.registration.schema import schema_of

from .options import Region, Stage, empty_lists

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")
_global = lazily(__package__, torch=".portable.everywhere")

Lists = tuple[Tensor, Tensor]
_LISTS = "(Tensor ids, Tensor counts)"


def _stage(
    q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, backend: str, heads: str, block_q: int, sink: int,
    window: int, causal: bool, stage: Stage,
) -> Lists:  # fmt: skip
    region = Region(heads, block_q, sink, window, causal)
    return _backend(backend).stage(q, k, ids, counts, region, stage)


def _stage_fake(
    q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, backend: str, heads: str, block_q: int, sink: int,
    window: int, causal: bool, stage: Stage,
) -> Lists:  # fmt: skip
    return empty_lists(q, k.shape[1], stage.slots, Region(heads, block_q, sink, window, causal))


def _pages(
    q: Tensor, kmin: Tensor, kmax: Tensor, backend: str, kv_len: int, page: int, slots: int, region: Region
) -> Lists:
    return _backend(backend).pages(q, kmin, kmax, kv_len, region, page, slots)


def _bounds(k: Tensor, kmin: Tensor, kmax: Tensor, backend: str, page: int, first_page: int) -> None:
    _backend(backend).page_bounds_(k, kmin, kmax, page, first_page)


def _exact(q: Tensor, k: Tensor, block_k: int, slots: int, region: Region) -> Lists:
    return _backend("torch").exact(q, k, region, block_k, slots)


def _global_search(q: Tensor, k: Tensor, branch: int, branches: int, block_k: int, slots: int, region: Region) -> Lists:
    return _global("torch").global_search(q, k, region, branch, branches, block_k, slots)


def _lists(q: Tensor, k: Tensor, *rest: Any) -> Lists:
    """The empty lists of an operator whose last arguments are their slots and the region."""
    *_, slots, region = rest
    return empty_lists(q, k.shape[1], slots, region)


stage_op = register(
    "hip_attention_stage",
    f"Tensor q, Tensor k, Tensor? ids, Tensor? counts, str backend, {schema_of(Region)}",
    _LISTS,
    impl=_stage,
    fake=_stage_fake,
    options=Stage,
)

pages_op = register(
    "hip_attention_pages",
    "Tensor q, Tensor kmin, Tensor kmax, str backend, SymInt kv_len, int page, SymInt slots",
    _LISTS,
    impl=_pages,
    fake=_lists,
    options=Region,
)

bounds_op = register(
    "hip_attention_page_bounds",
    "Tensor k, Tensor(a!) kmin, Tensor(b!) kmax, str backend, int page, SymInt first_page",
    "()",
    impl=_bounds,
    fake=lambda *arguments: None,
)

exact_op = register(
    "hip_attention_exact",
    "Tensor q, Tensor k, int block_k, SymInt slots",
    _LISTS,
    impl=_exact,
    fake=_lists,
    options=Region,
)

global_op = register(
    "hip_attention_global",
    "Tensor q, Tensor k, int branch, SymInt branches, int block_k, SymInt slots",
    _LISTS,
    impl=_global_search,
    fake=_lists,
    options=Region,
)
