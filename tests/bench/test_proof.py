"""The judge must condemn: zeros, small errors, NaN, wrong shapes, exceptions."""

from __future__ import annotations

import pytest
import torch

from iokernels import UnsupportedError
from iokernels.ops.flash_attention.case import CASE
from iokernels.runtime.registration.precision import eagerly
from iokernels.testing.case import Inputs, Outputs
from iokernels.testing.case.proof import Proof, prove_point, results

CPU = torch.device("cpu")
POINTS = [point for point in CASE.check_points() if point.quick]


def reference(inputs: Inputs) -> Outputs:
    return CASE.run(inputs, "reference")


@pytest.fixture(scope="module", params=[torch.float16, torch.float32, torch.float64], ids=str)
def proof(request: pytest.FixtureRequest) -> Proof:
    return Proof(CASE, CASE.vocabulary.parse("b=1,h=2,n=40,d=16,causal=1,lse=1"), request.param, CPU)


def test_the_reference_is_right(proof: Proof) -> None:
    verdict = proof.judge(reference)
    assert verdict.status == "ok"
    assert verdict.ratio is not None
    assert verdict.ratio <= 1.0


def test_the_budget_is_the_error_of_the_formula_run_eagerly(proof: Proof) -> None:
    """Not of the oracle, which loses less: kernels would be held to what none can reach."""
    inputs = proof.inputs if proof.inputs.dtype != torch.float64 else proof.inputs.to(torch.float32)
    with eagerly():
        low = results(inputs, reference)
    oracle = results(inputs, reference)
    for name in ("out", "dq", "dk", "dv"):
        assert proof.low[name].equal(low[name])
        assert not proof.low[name].equal(oracle[name])
    assert proof.low["out"].dtype == inputs.dtype


@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize("factor", [0.0, 1.02, float("nan")])
def test_a_wrong_output_is_wrong(proof: Proof, name: str, factor: float) -> None:
    def broken(inputs: Inputs) -> Outputs:
        outputs = reference(inputs)
        # The gradients stay right: only the value is changed.
        wrong = outputs[name].detach() * (factor - 1.0)
        return outputs | {name: outputs[name] + wrong}

    verdict = proof.judge(broken)
    assert verdict.bad
    assert (verdict.status, verdict.where) == ("wrong", name)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("factor", [0.0, 1.02, float("nan")])
def test_a_wrong_gradient_is_wrong(proof: Proof, name: str, factor: float) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * factor

    def broken(inputs: Inputs) -> Outputs:
        tensors = dict(inputs.tensors)
        tensors[name] = Scaled.apply(tensors[name])  # pyright: ignore[reportArgumentType]
        return reference(Inputs(inputs.shape, tensors, inputs.options, inputs.output_gradients))

    verdict = proof.judge(broken)
    assert (verdict.status, verdict.where) == ("wrong", f"d{name}")


def test_a_result_of_another_dtype_or_shape_is_wrong(proof: Proof) -> None:
    def wider(inputs: Inputs) -> Outputs:
        return {name: x.to(torch.complex128).real if x.dtype == torch.float64 else x.double()
                for name, x in reference(inputs).items()}  # fmt: skip

    if proof.inputs.dtype != torch.float64:
        assert "dtype" in proof.judge(wider).reason

    def longer(inputs: Inputs) -> Outputs:
        return {name: torch.cat([x, x[:, :, :1]], 2) for name, x in reference(inputs).items()}

    verdict = proof.judge(longer)
    assert verdict.bad


def test_what_raises_is_told_and_not_raised(proof: Proof) -> None:
    def refusing(inputs: Inputs) -> Outputs:
        raise UnsupportedError("toy: not today.")

    def breaking(inputs: Inputs) -> Outputs:
        raise RuntimeError("an illegal access\nwith a second line")

    refused, failed = proof.judge(refusing), proof.judge(breaking)
    assert (refused.status, refused.bad, refused.reason) == ("refused", False, "toy: not today.")
    assert (failed.status, failed.bad, failed.reason) == ("failed", True, "RuntimeError: an illegal access")


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backends_keep_the_budget(point: object, backend: str) -> None:
    shape = point.shape  # pyright: ignore[reportAttributeAccessIssue]
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    prove_point(CASE, backend, shape, torch.bfloat16, device)
