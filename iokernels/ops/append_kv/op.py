"""``append_kv`` as a ``torch.library`` operator that writes into the caches. It has no gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iokernels.runtime.registration import lazily, register

from .options import APPEND_SCHEMA, Append

_backend = lazily(__package__, torch=".portable", triton=".triton")


def _append(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, backend: str, *options: Any) -> None:
    _backend(backend).append(k_new, v_new, k_cache, v_cache, Append(*options))


def _append_fake(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, backend: str, *options: Any) -> None:
    return None


append = register(
    "lean_attention_append(Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, str backend, "
    f"{APPEND_SCHEMA}) -> ()",
    impl=_append,
    fake=_append_fake,
)
