"""What holds of every module with a state: the whole at once and token by token are the same."""

from __future__ import annotations

from typing import Any

import torch


def check_generation_continues_training(net: Any, width: int = 12) -> None:
    """The whole at once, in parts by forward, and by steps of one and of several tokens."""
    x = torch.randn(2, 11, width, dtype=torch.float64)
    whole, after = net(x, return_state=True)
    first, state = net(x[:, :1], return_state=True)
    second, state = net(x[:, 1:6], state, return_state=True)
    kept = [y.clone() for y in state]
    with torch.no_grad():
        outs = [net.step(x[:, 6:7], state), net.step(x[:, 7:10], state), net.step(x[:, 10:], state)]
    torch.testing.assert_close(torch.cat([first, second, *outs], 1), whole)
    for one, other, before in zip(state, after, kept, strict=True):
        torch.testing.assert_close(one, other)
        assert one.numel() == 0 or not torch.equal(one, before), "a step updates the state in place"


def check_from_nothing_by_steps(net: Any, width: int = 12) -> None:
    """From an empty state, which steps update where it lies; forward does as without one, and leaves it empty."""
    x = torch.randn(3, 5, width, dtype=torch.float64)
    state = net.init_state(3)
    places = [y.data_ptr() for y in state]
    with torch.inference_mode():
        outs = [net.step(x[:, t : t + 1], state) for t in range(5)]
    assert [y.data_ptr() for y in state] == places
    torch.testing.assert_close(torch.cat(outs, 1), net(x))
    untouched = net.init_state(3)
    torch.testing.assert_close(net(x, untouched), net(x))
    assert all((y == 0).all() for y in untouched)
