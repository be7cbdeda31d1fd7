"""The configurations that tuning may try for the flash_rnn kernels."""

from __future__ import annotations

from iokernels.autotune.space import Space, literals, powers_of_two
from iokernels.autotune.tunable import Tunable

from .tuning import KERNELS, Config, default

TUNABLES: dict[str, Tunable[Config]] = {
    kernel: Tunable(
        kernel,
        "triton",
        Space(
            kernel,
            1,
            (powers_of_two("block", 16, 64), literals("num_warps", 4, 8), literals("num_stages", 1, 2)),
            (),
            make=Config,
        ),
        default,
        lambda p: {},
        (),
    )
    for kernel in KERNELS
}
