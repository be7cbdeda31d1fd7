"""What a case says of its backends is what the dispatcher does: operators that have kernels in both languages."""

from __future__ import annotations

import pytest
import torch

from iokernels import UnsupportedError
from iokernels.runtime.dispatch import BACKENDS
from iokernels.testing.case import load

SMALL = {
    "flash_attention": ("b=1,h=1,n=2,d=8", "out"),
    "lean_attention": ("b=1,h=1,nk=2,d=8", "out"),
    "linear_attention": ("b=1,h=1,n=2,d=8", "out"),
    "linear_attention_step": ("b=1,h=1,n=2,d=8", "out"),
    "fft_conv": ("b=1,h=1,n=2", "y"),
    "flash_rnn": ("b=1,h=1,n=2,d=8", "h"),
}
"""A call by its operator, and one of its outputs."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operator", SMALL)
def test_what_is_said_of_a_backend_is_what_the_dispatcher_does(
    operator: str, backend: str, dtype: torch.dtype, device: str
) -> None:
    case, (text, name) = load(operator), SMALL[operator]
    inputs = case.make_inputs(case.vocabulary.parse(text), dtype, torch.device(device), 0)
    if backend in case.implementations and dtype in case.implementations[backend].dtypes:
        with torch.set_grad_enabled(case.differentiates(backend)):
            assert case.run(inputs, backend)[name].dtype == dtype
    else:
        with pytest.raises(UnsupportedError):
            case.run(inputs, backend)
