"""The header and the roofline."""

import pytest
import torch

from iokernels.bench.timing import machine
from iokernels.runtime.device import named


def test_floor_by_hand() -> None:
    h100 = named("h100-sxm")
    compute = machine.floor(h100, 274_877_906_944, 269_484_032, torch.bfloat16)
    assert compute is not None
    assert compute.bound == "compute"
    assert compute.seconds == pytest.approx(274_877_906_944 / 989.5e12)
    memory = machine.floor(h100, 10**6, 335 * 10**7, torch.bfloat16)
    assert memory is not None
    assert (memory.bound, memory.seconds) == ("memory", pytest.approx(1e-3))


def test_float32_has_the_peak_of_the_units_that_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = named("h100-sxm")
    seconds = {}
    for precision in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        found = machine.floor(h100, 10**12, 0, torch.float32)
        assert found is not None
        seconds[precision] = found.seconds
    assert seconds == {"highest": pytest.approx(1 / 66.9), "high": pytest.approx(1 / 494.7)}


def test_no_roofline_where_no_peak_is_known() -> None:
    assert machine.floor(None, 1, 1, torch.float32) is None
    assert machine.floor(named("a100-sxm"), 1, 1, torch.float64) is None


def test_the_cpu_is_described() -> None:
    here = machine.describe(torch.device("cpu"))
    assert here.spec is None
    header = here.header()
    assert "\n" not in header
    assert f"torch {torch.__version__}" in header
    assert here.name in header
    assert here.as_dict()["device"] == "cpu"


@pytest.mark.without_gpu
def test_a_device_that_is_not_here() -> None:
    assert machine.pick_device(None) == torch.device("cpu")
    with pytest.raises(machine.NoDeviceError, match="no CUDA GPU"):
        machine.pick_device("cuda")


def test_versions_of_what_is_not_installed() -> None:
    assert machine.version_of("no-such-package-anywhere", "torch") == torch.__version__
    assert machine.version_of("no-such-package-anywhere") == "-"
