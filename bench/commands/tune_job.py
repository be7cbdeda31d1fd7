"""One compilation in a process of its own."""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from iokernels import autotune
from iokernels.runtime.device import DeviceSpec
from iokernels.testing.case import DTYPES, load

if TYPE_CHECKING:
    from iokernels.autotune.resources import Resources


class Job(NamedTuple):
    """A kernel at a shape with a configuration, for a GPU; everything in it can be pickled."""

    operator: str
    shape: str
    dtype: str
    kernel: str
    config: Any
    gpu: dict[str, Any]


def pack(spec: DeviceSpec) -> dict[str, Any]:
    """The fields of a GPU model: its read-only tables cannot be pickled."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return {name: dict(value) if isinstance(value, MappingProxyType) else value for name, value in values.items()}


def unpack(gpu: dict[str, Any]) -> DeviceSpec:
    """The reverse of :func:`pack`."""
    values: Any = {
        name: MappingProxyType(value) if isinstance(value, dict) else value for name, value in gpu.items()
    }  # fmt: skip
    return DeviceSpec(**values)


def compile_job(job: Job) -> Resources:
    """Compile one kernel, and none of it is run."""
    from iokernels.autotune.resources import compiling_cuda_for, compiling_for

    case = load(job.operator)
    assert case.tuning is not None
    compiling = compiling_cuda_for if case.tuning.tunables[job.kernel].backend == "cuda" else compiling_for
    with compiling(unpack(job.gpu)) as compiled, autotune.override(**{job.kernel: job.config}):
        case.tuning.launch(case.vocabulary.parse(job.shape), DTYPES[job.dtype], job.kernel)
    # The kernel of that very name, before those whose names go on (x_kernel, not x_state_kernel).
    name = case.tuning.functions.get(job.kernel, job.kernel)
    named = [one for one in compiled if one.kernel.startswith(name)]
    return min(named, key=lambda one: len(one.kernel))
