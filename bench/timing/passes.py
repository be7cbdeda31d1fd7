"""One pass of an operator as a call without arguments: the thing that is timed.

Imports nothing of the library when it runs, so that it can drive another version of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from iokernels.testing.case import Inputs, Outputs, Pass


def pass_call(inputs: Inputs, forward: Callable[[], Outputs], which: Pass) -> Callable[[], Any]:
    """Forward, backward or both. A backward pass keeps its forward pass's graph and repeats on it."""
    leaves = [x for x in inputs.tensors.values() if x.requires_grad]

    def backward(outputs: Outputs, *, keep: bool) -> tuple[torch.Tensor, ...]:
        used = [name for name in inputs.output_gradients if name in outputs]
        return torch.autograd.grad(
            [outputs[name] for name in used],
            leaves,
            [inputs.output_gradients[name] for name in used],
            allow_unused=True,
            retain_graph=keep,
        )

    if which == "fwd":
        return torch.no_grad()(forward)
    if which == "both":
        return lambda: backward(forward(), keep=False)
    outputs = forward()
    return lambda: backward(outputs, keep=True)
