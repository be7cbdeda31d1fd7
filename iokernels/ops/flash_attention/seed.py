"""The seed of dropout, and what keeps ``torch.compile`` from drawing it twice.

A backward pass makes the dropped weights again from the seed of the forward pass. The compiler's partitioner may
instead run a draw again in the backward graph (``torch._functorch.config.activation_memory_budget`` below 1 allows it
to recompute whatever is cheap), and a second draw is another mask. So a traced draw passes through an operator whose
node is marked as one whose result must be saved, the mark that selective checkpointing leaves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from iokernels.runtime.errors import UnsupportedError
from iokernels.runtime.registration import register


def draw(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device: int64 ``[1]``."""
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=device)
    return _saved(seed, torch.is_grad_enabled()) if torch.compiler.is_compiling() else seed


_saved = register(
    "flash_attention_seed(Tensor seed, bool differentiated) -> Tensor",
    impl=lambda seed, differentiated: seed.clone(),
    fake=lambda seed, differentiated: torch.empty_like(seed),
)


@_saved.py_impl(ProxyTorchDispatchMode)
def _mark(mode: Any, seed: Any, differentiated: bool) -> Any:
    """Trace the operator as any other, then mark its node."""
    if differentiated and functorch_config.activation_memory_budget == 0:
        raise UnsupportedError(
            "flash_attention: dropout_p is above 0 and activation_memory_budget is 0, with which torch.compile saves "
            "nothing but inputs and would draw other weights to drop in the backward pass; any budget above 0 is right"
        )
    saved = mode.__torch_dispatch__(_saved, (), (seed, differentiated), {})
    node = next(node for node in reversed(mode.tracer.graph.nodes) if node.target is _saved)
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return saved
