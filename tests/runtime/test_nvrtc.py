"""CUDA kernels compiled without a GPU by NVRTC and nvcc; how they would be launched, with a driver that takes notes."""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iokernels.autotune import resources
from iokernels.runtime.cuda import ahead, artifacts, nvrtc
from iokernels.runtime.cuda.kernel import CudaKernel, Int64, cuda_kernel, recorded
from iokernels.runtime.device import OLDEST_SM, cuda_refusal
from iokernels.runtime.errors import KernelCompileError, KernelLaunchError, UnsupportedError

CSRC = Path(__file__).parents[1] / "cuda_kernels"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
MATMUL = cuda_kernel(str(CSRC / "matmul.cu"), "matmul", Element=torch.bfloat16, WARPS=4, BLOCK_N=64, BLOCK_K=32)
PRIMITIVES = [
    cuda_kernel(str(CSRC / "primitives.cu"), "in_step", Element=torch.float16),  # all kernels of a source compile
    cuda_kernel(str(CSRC / "conversions.cu"), "round_trip", Element=torch.float16),
    cuda_kernel(str(CSRC / "conversions.cu"), "round_trip", Element=torch.bfloat16),
    cuda_kernel(str(CSRC / "conversions.cu"), "round_trip", Element=torch.float8_e4m3fn),
]

needs_cupy = pytest.mark.skipif(
    find_spec("cupy") is None, reason="NVRTC is reached through CuPy, which is not installed"
)
needs_compiler = pytest.mark.skipif(ahead.refusal() is not None, reason=ahead.refusal() or "")


@pytest.fixture(autouse=True)
def _kept_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path)


@needs_cupy
@pytest.mark.parametrize("sm", CAPABILITIES)
def test_nvrtc_compiles_for_every_architecture(sm: int) -> None:
    path = nvrtc.cubin(MATMUL, sm)
    assert nvrtc.architecture(sm) in path.name
    (found,) = resources.of_cubin(path.read_bytes(), num_warps=4)
    assert found.kernel == "matmul"
    assert found.spill_bytes == 0
    written = path.stat().st_mtime_ns
    assert nvrtc.cubin(MATMUL, sm) == path
    assert path.stat().st_mtime_ns == written


@needs_cupy
def test_every_primitive_compiles_under_nvrtc() -> None:
    for kernel in PRIMITIVES:
        assert nvrtc.cubin(kernel, OLDEST_SM).stat().st_size


@needs_cupy
def test_nvrtc_says_what_is_wrong_and_keeps_nothing(tmp_path: Path) -> None:
    broken = CudaKernel(str(CSRC / "matmul.cu"), "matmul", (("Element", "fp16"), ("WARPS", 4)))
    with pytest.raises(KernelCompileError, match=r'(?s)matmul: NVRTC refused.*identifier "BLOCK_K" is undefined'):
        nvrtc.cubin(broken, 80)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@needs_compiler
@pytest.mark.parametrize("sm", CAPABILITIES[::5])
def test_machine_code_has_matrix_instructions_and_no_spills(sm: int) -> None:
    (found,) = resources.of_cubin(ahead.cubin(MATMUL, sm).read_bytes(), num_warps=4, dynamic_shared_bytes=39_936)
    assert found.spill_bytes == 0
    assert found.matrix_instructions() == {"HMMA": 16}


@needs_compiler
def test_every_primitive_compiles_ahead_of_time() -> None:
    for kernel in PRIMITIVES:
        assert ahead.cubin(kernel, OLDEST_SM).stat().st_size


class Driver:
    """Stands in for CuPy's driver bindings."""

    CUDADriverError = ZeroDivisionError
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.values: list[bytes] = []
        self.context = 1

    def ctxGetCurrent(self) -> int:
        return self.context

    def funcSetAttribute(self, *given: int) -> None:
        self.calls.append(("attribute", *given))

    def launchKernel(self, function: int, *given: int) -> None:
        *shape, stream, parameters, extra = given
        self.calls.append(("launch", function, *shape, stream, extra))
        pointers = (ctypes.c_void_p * len(SIZES)).from_address(parameters)
        self.values = [ctypes.string_at(pointers[i] or 0, size) for i, size in enumerate(SIZES)]

    def launchCooperativeKernel(self, function: int, *given: int) -> None:
        self.calls.append(("cooperative", function, *given[:7]))


class OnGpu(torch.Tensor):
    """A tensor that says it is on the first GPU."""

    def get_device(self) -> int:
        return 0


SIZES = (8, 8, 4, 8, 4, 16)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (None, driver))
    monkeypatch.setattr(nvrtc, "guard", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    return driver


def test_launch_hands_every_argument_over(driver: Driver) -> None:
    loaded = nvrtc.Loaded(MATMUL, torch.device("cuda", 0), 1, 2)
    x = OnGpu(torch.empty(4))
    args = {"x": x, "none": None, "n": -3, "total": Int64(2**40), "scale": 0.5, "strides": (7, 2**33)}
    for _ in range(2):  # the second launch uses the memory of the first
        loaded.launch((5, 2), 128, 1024, args, False)
    assert driver.calls == 2 * [("launch", 2, 5, 2, 1, 128, 1, 1, 1024, 77, 0)]
    as_int = [int.from_bytes(value, sys.byteorder, signed=True) for value in driver.values]
    assert as_int[:4] == [x.data_ptr(), 0, -3, 2**40]
    assert torch.frombuffer(bytearray(driver.values[4]), dtype=torch.float32).item() == 0.5
    assert torch.frombuffer(bytearray(driver.values[5]), dtype=torch.int64).tolist() == [7, 2**33]


def test_large_shared_memory_is_asked_for_once(driver: Driver) -> None:
    loaded = nvrtc.Loaded(MATMUL, torch.device("cuda", 0), 1, 2)
    for smem in (48 * 1024, 100_000, 90_000):
        loaded.launch((1,), 32, smem, {}, True)
    assert [call[:4] for call in driver.calls if call[0] == "attribute"] == [("attribute", 2, 8, 100_000)]
    assert [call[0] for call in driver.calls].count("cooperative") == 3


def test_thread_without_a_context_gets_one(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    monkeypatch.setattr(torch.cuda, "set_device", entered.append)
    loaded = nvrtc.Loaded(MATMUL, torch.device("cuda", 0), 1, 2)
    loaded.launch((1,), 32, 0, {}, True)
    driver.context = 0
    loaded.launch((1,), 32, 0, {}, True)
    assert entered == [torch.device("cuda", 0)]


def test_driver_error_is_named(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "launchKernel", lambda *given: 1 // 0)
    loaded = nvrtc.Loaded(MATMUL, torch.device("cuda", 0), 1, 2)
    with pytest.raises(KernelLaunchError, match=r"matmul: the driver refused a launch of \(1, 1, 1\) blocks of 32 thr"):
        loaded.launch((1,), 32, 0, {}, False)
    with pytest.raises(KernelLaunchError, match="n is 2147483648, beyond"):
        loaded.launch((1,), 32, 0, {"n": 2**31}, False)
    with pytest.raises(KernelLaunchError, match="x is on meta, not on the GPU 0"):
        loaded.launch((1,), 32, 0, {"x": torch.empty(1, device="meta")}, False)


def test_without_cupy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    nvrtc._bindings.cache_clear()
    with pytest.raises(UnsupportedError, match=r'pip install "iokernels\[cuda13\]"'):
        nvrtc.version()


def test_launches_can_be_noted_instead() -> None:
    args = {"a_ptr": torch.empty(1, device="meta")}
    with recorded() as launches:
        MATMUL.launch((3,), 128, 512, args, cooperative=True)
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.block, launch.smem, launch.cooperative) == (MATMUL, (3,), 128, 512, True)
    with pytest.raises(KernelLaunchError, match="not on meta"):
        MATMUL.launch((3,), 128, 512, args)
    with pytest.raises(KernelLaunchError, match="no argument is a tensor"):
        MATMUL.launch((3,), 128, 512, {"n": 1})


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    from iokernels.runtime import device as devices

    monkeypatch.setattr(devices, "EMULATE", False)
    assert "IOKERNELS_EMULATE=1" in str(cuda_refusal(torch.device("cpu")))
    monkeypatch.setattr(devices, "EMULATE", True)
    monkeypatch.setattr(devices, "cxx", lambda: None)
    assert "g++" in str(cuda_refusal(torch.device("cpu")))
    monkeypatch.setattr(devices, "cxx", lambda: "g++")
    assert cuda_refusal(torch.device("cpu")) is None
    monkeypatch.setattr(devices, "EMULATE", False)
    assert devices.emulate_cuda()
    assert cuda_refusal(torch.device("cpu")) is None
    assert "not on xpu" in str(cuda_refusal(torch.device("xpu")))
    monkeypatch.setattr(devices, "has_cupy", lambda: False)
    assert "CuPy" in str(cuda_refusal(torch.device("cuda")))
