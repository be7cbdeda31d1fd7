"""``append_kv`` as a ``torch.library`` operator that writes into the caches. It has no gradients."""

from __future__ import annotations

from torch import Tensor

from iokernels.runtime.registration import lazily, register

from .options import Append

_backend = lazily(__package__, torch=".portable", triton=".triton")


def _append(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, backend: str, options: Append) -> None:
    _backend(backend).append(k_new, v_new, k_cache, v_cache, options)


append = register(
    "lean_attention_append",
    "Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, str backend",
    "()",
    impl=_append,
    fake=lambda *arguments: None,
    options=Append,
)
