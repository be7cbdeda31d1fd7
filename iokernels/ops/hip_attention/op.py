"""The selectors as ``torch.library`` operators. They have no gradients: a list is a constant.

This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.runtime.registration import lazily, register

from .options import REGION_SCHEMA, STAGE_SCHEMA, Region, Stage, empty_lists

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")
_global = lazily(__package__, torch=".portable.everywhere")

_REGION = len(Region._fields)
Lists = tuple[Tensor, Tensor]


def _stage(q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, backend: str, *numbers: Any) -> Lists:
    region, stage = Region(*numbers[:_REGION]), Stage(*numbers[_REGION:])
    return _backend(backend).stage(q, k, ids, counts, region, stage)


def _stage_fake(q: Tensor, k: Tensor, ids: Tensor | None, counts: Tensor | None, backend: str, *numbers: Any) -> Lists:
    return empty_lists(q, k.shape[1], Stage(*numbers[_REGION:]).slots, Region(*numbers[:_REGION]))


def _pages(
    q: Tensor, kmin: Tensor, kmax: Tensor, backend: str, kv_len: int, page: int, slots: int, *region: Any
) -> Lists:
    return _backend(backend).pages(q, kmin, kmax, kv_len, Region(*region), page, slots)


def _pages_fake(
    q: Tensor, kmin: Tensor, kmax: Tensor, backend: str, kv_len: int, page: int, slots: int, *region: Any
) -> Lists:
    return empty_lists(q, kmin.shape[1], slots, Region(*region))


def _bounds(k: Tensor, kmin: Tensor, kmax: Tensor, backend: str, page: int, first_page: int) -> None:
    _backend(backend).page_bounds_(k, kmin, kmax, page, first_page)


def _exact(q: Tensor, k: Tensor, block_k: int, slots: int, *region: Any) -> Lists:
    return _backend("torch").exact(q, k, Region(*region), block_k, slots)


def _exact_fake(q: Tensor, k: Tensor, block_k: int, slots: int, *region: Any) -> Lists:
    return empty_lists(q, k.shape[1], slots, Region(*region))


def _global_search(q: Tensor, k: Tensor, branch: int, branches: int, block_k: int, slots: int, *region: Any) -> Lists:
    return _global("torch").global_search(q, k, Region(*region), branch, branches, block_k, slots)


def _global_fake(q: Tensor, k: Tensor, branch: int, branches: int, block_k: int, slots: int, *region: Any) -> Lists:
    return empty_lists(q, k.shape[1], slots, Region(*region))


stage_op = register(
    f"hip_attention_stage(Tensor q, Tensor k, Tensor? ids, Tensor? counts, str backend, {REGION_SCHEMA}, "
    f"{STAGE_SCHEMA}) -> (Tensor ids, Tensor counts)",
    impl=_stage,
    fake=_stage_fake,
)

pages_op = register(
    "hip_attention_pages(Tensor q, Tensor kmin, Tensor kmax, str backend, SymInt kv_len, int page, SymInt slots, "
    f"{REGION_SCHEMA}) -> (Tensor ids, Tensor counts)",
    impl=_pages,
    fake=_pages_fake,
)

bounds_op = register(
    "hip_attention_page_bounds(Tensor k, Tensor(a!) kmin, Tensor(b!) kmax, str backend, int page, SymInt first_page) "
    "-> ()",
    impl=_bounds,
    fake=lambda *arguments: None,
)

exact_op = register(
    f"hip_attention_exact(Tensor q, Tensor k, int block_k, SymInt slots, {REGION_SCHEMA}) "
    "-> (Tensor ids, Tensor counts)",
    impl=_exact,
    fake=_exact_fake,
)

global_op = register(
    "hip_attention_global(Tensor q, Tensor k, int branch, SymInt branches, int block_k, SymInt slots, "
    f"{REGION_SCHEMA}) -> (Tensor ids, Tensor counts)",
    impl=_global_search,
    fake=_global_fake,
)
