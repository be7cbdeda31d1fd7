"""GPU models, and the reasons why Triton cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iokernels.runtime import device


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    caches = (device.current, device.has_triton)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, sm: int, sms: int, **more: Any) -> None:
    """Let torch report one CUDA device with these properties."""
    properties = SimpleNamespace(name=name, major=sm // 10, minor=sm % 10, multi_processor_count=sms, **more)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: divmod(sm, 10))


@pytest.mark.parametrize("slug", device.KNOWN)
def test_known_models_are_sane(slug: str) -> None:
    spec = device.named(slug)
    assert spec.slug == slug
    assert spec.sm >= device.OLDEST_SM
    assert 99 * 1024 <= spec.smem_block < spec.smem_sm <= 256 * 1024
    assert spec.matmul_peak[torch.bfloat16] == spec.matmul_peak[torch.float16] > spec.matmul_peak[torch.float32]
    assert spec.matmul_peak[torch.float32] >= spec.vector_peak * 0.9
    assert 0.5e12 < spec.dram_bandwidth < 10e12
    assert len({other.name for other in device.KNOWN.values()}) == len(device.KNOWN)


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"device: 'gtx-480' is not known; known are a100-sxm"):
        device.named("gtx-480")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.current() is None


def test_known_gpu_takes_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA H100 PCIe", 90, 114, shared_memory_per_block_optin=232448)
    spec = device.current()
    assert spec is not None
    assert (spec.slug, spec.smem_block) == ("h100-pcie", 232448)
    assert spec.dram_bandwidth == device.named("h100-pcie").dram_bandwidth
    assert spec.matmul_peak == device.named("h100-pcie").matmul_peak


def test_unknown_gpu_takes_the_peaks_of_its_architecture_by_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA GeForce RTX 4080", 89, 64)
    spec = device.current()
    assert spec is not None
    assert (spec.slug, spec.name, spec.sm, spec.sms) == ("sm89-64sm", "NVIDIA GeForce RTX 4080", 89, 64)
    base = device.named("rtx-4090")
    assert spec.matmul_peak[torch.float16] == pytest.approx(base.matmul_peak[torch.float16] * 64 / 128)
    assert spec.smem_block == base.smem_block


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("where", "installed", "interpret", "sm", "reason"),
    [
        (CUDA, True, False, 80, None),
        (CUDA, True, False, 120, None),
        (CUDA, True, False, 75, "compute capability 7.5, and the kernels need 8.0"),
        (CUDA, False, False, 90, "Triton is not installed"),
        (CPU, False, True, 90, "Triton is not installed"),
        (CPU, True, True, 90, None),
        (CPU, True, False, 90, "only under TRITON_INTERPRET=1"),
        (torch.device("mps"), True, False, 90, "on CUDA devices, not on mps"),
    ],
)
def test_triton_refusal(
    monkeypatch: pytest.MonkeyPatch, where: torch.device, installed: bool, interpret: bool, sm: int, reason: str | None
) -> None:
    pretend(monkeypatch, "a GPU", sm, 100)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device, "has_triton", lambda: installed)
    monkeypatch.setattr(device, "INTERPRET", interpret)
    got = device.triton_refusal(where)
    assert got is None if reason is None else got is not None and reason in got


@pytest.mark.parametrize("slug", ["t4", "v100"])
def test_a_model_that_is_too_old_is_refused_by_its_capability(slug: str) -> None:
    with pytest.raises(ValueError, match=r"compute capability 7\.\d, and the kernels need 8\.0"):
        device.named(slug)
