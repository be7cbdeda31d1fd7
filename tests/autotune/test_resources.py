"""Reading cubins that Triton did not make: here the assembler in Triton's wheel makes one from a few lines of PTX."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from iokernels.autotune.resources import of_cubin
from iokernels.runtime.device import named

PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry through_shared(.param .u64 p)
{
    .reg .b64 %rd<3>;
    .reg .f32 %f<4>;
    .shared .align 4 .b8 tile[3072];
    ld.param.u64 %rd1, [p];
    cvta.to.global.u64 %rd2, %rd1;
    ld.global.f32 %f1, [%rd2];
    st.shared.f32 [tile], %f1;
    bar.sync 0;
    ld.shared.f32 %f2, [tile];
    add.f32 %f3, %f2, %f1;
    st.global.f32 [%rd2], %f3;
    ret;
}
"""


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    triton = pytest.importorskip("triton")
    folder: Path = tmp_path_factory.mktemp("ptx")
    (folder / "kernel.ptx").write_text(PTX)
    assembler = triton.knobs.nvidia.ptxas.path
    subprocess.run([assembler, "-arch=sm_90", "-o", "kernel.cubin", "kernel.ptx"], cwd=folder, check=True)
    return (folder / "kernel.cubin").read_bytes()


def test_a_cubin_of_any_compiler_is_read(cubin: bytes) -> None:
    (kernel,) = of_cubin(cubin, num_warps=4)
    assert kernel.kernel == "through_shared"
    assert 2 <= kernel.registers <= 32
    assert kernel.spill_bytes == 0
    assert 3072 <= kernel.shared_bytes <= 3072 + 1024  # Hopper's toolchain reserves 1 KiB of each block
    assert kernel.matrix_instructions() == {}
    assert kernel.blocks_per_sm(named("h100-sxm"))[0] > 0


def test_dynamic_shared_memory_is_added(cubin: bytes) -> None:
    (static,), (both,) = of_cubin(cubin, num_warps=4), of_cubin(cubin, num_warps=4, dynamic_shared_bytes=65536)
    assert both.shared_bytes == static.shared_bytes + 65536
    assert both.blocks_per_sm(named("h100-sxm")) == (3, "shared memory")
