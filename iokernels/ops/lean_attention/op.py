"""``lean_attention`` as a ``torch.library`` operator. It computes no gradients: decoding has none.

This file imports torch alone; the backend's module is imported when it first runs.
"""

from __future__ import annotations

from torch import Tensor

from iokernels.runtime.registration import lazily, register

from .options import Options, empty_lse, empty_out

_backend = lazily(__package__, torch=".portable", triton=".triton.launch", cuda=".cuda.launch")


def _forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, backend: str, options: Options) -> tuple[Tensor, Tensor]:
    return _backend(backend).forward(q, k_cache, v_cache, options)


attend = register(
    "lean_attention",
    "Tensor q, Tensor k_cache, Tensor v_cache, str backend",
    "(Tensor out, Tensor lse)",
    impl=_forward,
    fake=lambda q, k_cache, v_cache, backend, options: (empty_out(q, v_cache), empty_lse(q)),
    options=Options,
)
