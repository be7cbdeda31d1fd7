"""What the emulator is for: each fault planted in a kernel is reported, with its place, in every order of warps."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from iokernels.runtime.cuda.emulator import warp_order, watch
from iokernels.runtime.cuda.kernel import CudaKernel, cuda_kernel
from iokernels.runtime.errors import KernelFault, KernelLaunchError

pytestmark = pytest.mark.gxx

SOURCE = Path(__file__).with_name("planted.cu")
LINES = SOURCE.read_text().splitlines()
NUMBERS = {name: int(number) for name, number in re.findall(r"([A-Z_]+) = (\d+)", SOURCE.read_text())}


def planted(fault: str) -> CudaKernel:
    return cuda_kernel(str(SOURCE), "reverse", FAULT=NUMBERS.get(fault, 0))


def reverse(fault: str, *, x: torch.Tensor | None = None, cooperative: bool = False, **changes: object) -> torch.Tensor:
    x = torch.arange(64.0) if x is None else x
    y, counter = torch.empty(64), torch.zeros(1, dtype=torch.int32)
    args = {"x_ptr": x, "y_ptr": y, "counter": counter, "n": 64, **changes}
    planted(fault).launch((1,), 64, 256, args, cooperative=cooperative)
    return y


def test_the_right_kernel_passes() -> None:
    for seed in range(20):
        with warp_order(seed):
            assert torch.equal(reverse("NONE"), torch.arange(64.0).flip(0))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("NO_BARRIER", ("race", "with no barrier between", "load_shared(tile + (n - 1 - t))")),
        ("NO_WARP_SYNC", ("race", "tile + (t ^ 1)")),
        ("OVERWRITE", ("race", "store_shared(tile + t, value)")),
        ("NO_WAIT", ("an asynchronous copy", "is under way", "load_shared(tile + (n - 1 - t))")),
        ("STRAY_WRITE", ("thread 63", "wrote 4 bytes, 4 of them after the end of y_ptr", "store_global(y_ptr")),
        ("STRAY_READ", ("thread 0", "read 4 bytes that begin 4 before x_ptr", "load_global(x_ptr")),
        ("STRAY_SHARED", ("thread 63", "offset 256 of an array of 256 bytes in shared memory", "store_shared(tile")),
        ("MISALIGNED", ("read 8 bytes of x_ptr at an address that is no multiple of 8", "load_global_vector")),
        ("HALF_BARRIER", ("deadlock", "warp 0 waits at barrier 0", "warp 1 has returned", "__syncthreads();")),
        ("MISMATCH", ("barrier mismatch", "__syncthreads();")),
        ("DEADLOCK", ("deadlock", "warp 0 waits at barrier 1", "warp 1 waits at barrier 2", "(t < WARP ? 1 : 2, 64)")),
        ("NAMED_TOO_FEW", ("deadlock", "barrier 1", "1 of 2 warps", "barrier_wait(1, 64)")),
        ("LONE_SHUFFLE", ("others of its warp are at",)),
        ("TOO_MUCH_SHARED", ("takes 512 bytes of shared memory, and the launch gives it 256", "arena.take")),
    ],
)
def test_fault_is_caught(fault: str, said: tuple[str, ...]) -> None:
    *words, code = said if len(said) > 1 else (*said, "")
    for seed in range(20):
        with warp_order(seed), pytest.raises(KernelFault) as caught:
            reverse(fault)
        report = str(caught.value)
        assert "reverse" in report
        assert all(word in report for word in words), report
        lines = [number for number, line in enumerate(LINES, start=1) if code in line]
        assert any(f"planted.cu:{number}" in report for number in lines), report


def test_blocks_that_wait_for_a_count_that_does_not_come() -> None:
    with pytest.raises(KernelFault, match="only in a cooperative launch"):
        reverse("COUNT_DEADLOCK")
    with pytest.raises(
        KernelFault, match=r"(?s)deadlock.*waits for a count of 1, cuda_kernels/planted.cu:\d+, and it is 0"
    ):
        reverse("COUNT_DEADLOCK", cooperative=True)


BLOCKS = SOURCE.with_name("planted_blocks.cu")


@pytest.mark.parametrize("fault", [0, 1, 2, 4])
def test_race_between_blocks_that_wait_for_one_another(fault: int) -> None:
    advice = {1: "no barrier between", 2: "no counter between", 4: "no counter between"}
    for seed in range(20):
        x, counter = torch.empty(2, 4, 64), torch.zeros(1, dtype=torch.int32)
        blocks = 1 if fault == 1 else 4
        args = {"x_ptr": x, "counter": counter, "blocks": blocks, "steps": 4}
        kernel = cuda_kernel(str(BLOCKS), "exchange", FAULT=fault)
        with warp_order(seed), pytest.raises(KernelFault) if fault else nullcontext() as caught:
            kernel.launch((blocks,), 64, 0, args, cooperative=True)
        if caught is not None:
            assert "race: this thread" in str(caught.value)
            assert "of x_ptr, which thread" in str(caught.value)
            assert str(caught.value).endswith(advice[fault])


@pytest.mark.parametrize("fault", [0, 3])
def test_race_with_the_block_that_comes_last(fault: int) -> None:
    for seed in range(20):
        partial, total, counter = torch.empty(5, 64), torch.empty(64), torch.zeros(1, dtype=torch.int32)
        args = {"partial_ptr": partial, "sum_ptr": total, "counter": counter, "blocks": 5}
        kernel = cuda_kernel(str(BLOCKS), "last", FAULT=fault)
        with warp_order(seed), pytest.raises(KernelFault, match="race") if fault else nullcontext():
            kernel.launch((5,), 64, 128, args)
        assert fault or torch.equal(total, torch.full((64,), 5.0))


def test_result_that_depends_on_the_order() -> None:
    """Each order finds the memory as it was, and has to leave it as the first did."""
    x, counter = torch.empty(5), torch.zeros(1, dtype=torch.int32)
    args = {"x_ptr": x, "counter": counter}
    with warp_order(0, orders=20), watch() as launches:
        cuda_kernel(str(BLOCKS), "tickets", FAULT=0).launch((5,), 32, 0, args)
    assert (counter.item(), x.tolist()) == (5, [1.0] * 5)
    assert launches[0].arguments["x_ptr"].written == 20
    with (
        warp_order(0, orders=20),
        pytest.raises(KernelFault, match=r"in x_ptr depends on the order of blocks.* between seeds 0 and \d"),
    ):
        cuda_kernel(str(BLOCKS), "tickets", FAULT=5).launch((5,), 32, 0, args)


def test_gap_of_a_view_is_out_of_bounds() -> None:
    with pytest.raises(KernelFault, match="read 4 bytes between the elements of x_ptr"):
        reverse("NONE", x=torch.arange(128.0)[::2])


def test_arguments_are_held_to_the_kernel() -> None:
    with pytest.raises(KernelLaunchError, match="x_ptr, y_ptr, counter, n"):
        planted("NONE").launch((1,), 64, 256, {"x_ptr": torch.empty(64), "n": 64})
    with pytest.raises(KernelFault, match="argument n is not what it takes, which is int"):
        reverse("NONE", n=64.0)
    with pytest.raises(KernelLaunchError, match="n is 2147483648"):
        reverse("NONE", n=2**31)


def test_bytes_are_counted() -> None:
    with watch() as launches:
        reverse("NONE")
    (launch,) = launches
    assert launch.name == "reverse"
    assert (launch.arguments["x_ptr"].read, launch.arguments["y_ptr"].written) == (256, 256)
    assert launch.arguments["y_ptr"].read == launch.arguments["x_ptr"].written == 0
