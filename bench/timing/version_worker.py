"""A program that times one version of the library on request: ``bench --against git:REV`` runs one for each version.

It is always the file of the version that compares, also where it drives another one, so that both are timed by the
same code. Of the version under test it uses the operator's ``Case`` alone: ``vocabulary``, ``make_inputs`` and ``run``.
Requests and answers are lines of JSON on standard input and output; the first argument is the folder that
``iokernels`` must come from.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

_REFUSALS = ("UnsupportedError", "UsageError", "NotImplementedError")


def _sibling(name: str) -> Any:
    """A module of this file's folder, whichever version of the package can be imported."""
    spec = importlib.util.spec_from_file_location(f"comparing_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Version:
    """The version of the library that this process holds."""

    def __init__(self, root: str) -> None:
        import iokernels

        origin = Path(iokernels.__file__).resolve()
        if Path(root).resolve() not in origin.parents:
            raise ImportError(f"iokernels comes from {origin}, not from {root}")
        self._measure, self._passes = _sibling("measure"), _sibling("passes")
        self._sample: Callable[[], float] | None = None

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draw the inputs and run the call until it is warm; the wall time of a sample and a digest of the inputs."""
        try:
            load = importlib.import_module("iokernels.testing.case").load
        except ModuleNotFoundError:  # 0.1 before cases moved into their rooms
            load = importlib.import_module("iokernels.bench.case").load
        self._sample = None  # what the last request held is free before this one allocates
        torch.set_num_threads(request["threads"])
        device = torch.device(request["device"])
        case = load(request["operator"])
        inputs = case.make_inputs(
            case.vocabulary.parse(request["shape"]), getattr(torch, request["dtype"]), device, request["seed"]
        )
        torch.manual_seed(request["seed"])
        call = self._passes.pass_call(inputs, lambda: case.run(inputs, request["backend"]), request["pass"])
        clock = self._measure.clock_for(device)
        sample, _ = clock.sampler(call, capturable=request["pass"] != "bwd")
        self._measure.warm(sample, request["warm"])
        start = time.perf_counter()
        sample()
        self._sample = sample
        return {"wall": time.perf_counter() - start, "digest": digest(inputs)}

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """The median of some calls, after one that finds the caches again."""
        assert self._sample is not None
        self._sample()
        return {"seconds": float(np.median([self._sample() for _ in range(request["calls"])]))}


def digest(inputs: Any) -> dict[str, str]:
    """What each tensor is, strides and values, in a few characters."""
    named = {**inputs.tensors, **inputs.options, **{f"d{name}": x for name, x in inputs.output_gradients.items()}}
    found = {}
    for name, x in named.items():
        if isinstance(x, torch.Tensor):
            values = x.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data
            found[name] = f"{x.dtype} {tuple(x.shape)} {x.stride()} {zlib.crc32(values):08x}"
        else:
            found[name] = repr(x)
    return found


def answer(version: Version, request: dict[str, Any]) -> dict[str, Any]:
    """What a request yields; a failure is an answer too."""
    try:
        return {"prepare": version.prepare, "sample": version.sample}[request["do"]](request)
    except Exception as error:  # another version may break in any way, and the caller tells it
        kind = type(error).__name__
        text = str(error).strip().partition("\n")[0]
        return {"problem": text if kind in _REFUSALS else f"{kind}: {text}"}


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then closes standard input
    # Whatever the library prints goes to standard error: the answers stand alone.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        try:
            version = Version(sys.argv[1])
        except Exception as error:
            print(json.dumps({"problem": f"{type(error).__name__}: {error}"}), file=answers)
            return
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            print(json.dumps(answer(version, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
