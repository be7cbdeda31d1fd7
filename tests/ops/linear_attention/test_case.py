"""The cases of linear_attention: costs against hand counts, options covered."""

from __future__ import annotations

import pytest
import torch

from iokernels.ops.linear_attention.case import CASE, drawn_state
from iokernels.ops.linear_attention.case.shapes import VOCABULARY, lengths
from iokernels.testing.case import Case, load
from iokernels.testing.case.proof import Proof
from iokernels.testing.case.shape import UsageError

CPU = torch.device("cpu")
STEP = load("linear_attention_step")


def test_the_figures_of_the_shape_that_the_issue_names() -> None:
    shape = VOCABULARY.parse("b=4,h=32,n=16k,d=128,learn=0")
    heads = 4 * 32
    assert CASE.flops(shape, "fwd") == heads * 16384 * 4 * 128 * 128
    assert CASE.flops(shape, "both") == 3.5 * CASE.flops(shape, "fwd")
    tensor, state, slopes = heads * 16384 * 128 * 2, heads * 128 * 128 * 4, 32 * 4
    # q, k, v and out: 1,024 bytes a token and head.
    assert CASE.floor_bytes(shape, torch.bfloat16, "fwd") == 4 * tensor + state + slopes
    assert 4 * tensor == 1024 * heads * 16384
    # Read q, k, v and dout; write dq, dk, dv.
    assert CASE.floor_bytes(shape, torch.bfloat16, "bwd") == 7 * tensor + slopes


def test_bytes_of_the_optional_tensors() -> None:
    plain = VOCABULARY.parse("b=2,h=4,n=8,d=16,dv=32,decay=0")

    def added(**options: int) -> tuple[int, int]:
        forward, backward = (
            CASE.floor_bytes(plain.replace(**options), torch.float32, which)
            - CASE.floor_bytes(plain, torch.float32, which)
            for which in ("fwd", "bwd")
        )
        return forward, backward

    tokens, state, keys = 2 * 4 * 8 * 4, 2 * 4 * 16 * 32 * 4, 2 * 4 * 8 * 16 * 4
    assert added(decay=1) == (tokens, 2 * tokens)
    assert added(decay=1, learn=0) == (tokens, tokens)
    assert added(decay=2) == (16, 32)
    assert added(state=1) == (state, 3 * state)
    assert added(hk=1) == (-2 * keys * 3 // 4, -4 * keys * 3 // 4)
    assert added(normalize=1) == (state // 32, 2 * 4 * 8 * 32 * 4)
    assert added(taylor=1) == (state * (1 + 16 * 16) // 16, 0)


def test_the_naive_form_is_the_cheaper_one() -> None:
    accounts = CASE.accounts
    assert accounts is not None
    short, long = (VOCABULARY.parse(f"b=1,h=1,n={n},d=16,decay=0") for n in (8, 4096))
    extra = [
        accounts.naive_bytes(shape, torch.float32, "fwd") - CASE.floor_bytes(shape, torch.float32, "fwd")
        for shape in (short, long)
    ]
    assert extra == [4 * 8 * 8 * 4, 2 * 4096 * 16 * 16 * 4]


def test_packed_lengths() -> None:
    assert lengths(VOCABULARY.parse("b=4,n=8,packed=1")) == [8, 6, 4, 2]
    assert lengths(VOCABULARY.parse("b=4,n=8,packed=1,empty=1")) == [8, 0, 1, 2]
    assert lengths(VOCABULARY.parse("b=2,n=8")) == [8, 8]


@pytest.mark.parametrize("case", [CASE, STEP], ids=lambda case: case.operator)
def test_every_option_is_proved(case: Case) -> None:
    points = case.check_points()
    assert len({point.name for point in points}) == len(points)
    for dimension in case.vocabulary.dimensions:
        assert len({point.shape[dimension.name] for point in points}) > 1, dimension.name
    assert any(point.shape.hk not in (1, point.shape.h) for point in points)
    assert any(point.shape.d != point.shape.dv for point in points)


def test_inputs_repeat_and_follow_the_seed() -> None:
    shape = VOCABULARY.parse("b=2,h=4,hk=2,n=5,d=8,dv=16,decay=1,state=1,normalize=1,bnhd=1")
    one, same, other = (CASE.make_inputs(shape, torch.bfloat16, CPU, seed) for seed in (3, 3, 4))
    assert {name: tuple(x.shape) for name, x in one.tensors.items()} == {
        "q": (2, 2, 5, 8), "k": (2, 2, 5, 8), "v": (2, 4, 5, 16), "log_decay": (2, 4, 5),
        "initial_state": (2, 4, 8, 17),
    }  # fmt: skip
    assert one.tensors["v"].transpose(1, 2).is_contiguous()
    for name, x in one.tensors.items():
        assert x.is_leaf
        assert x.requires_grad
        assert torch.equal(x, same.tensors[name])
        assert not torch.equal(x, other.tensors[name])
    fixed = CASE.make_inputs(shape.replace(learn=0), torch.bfloat16, CPU, 3)
    assert "log_decay" not in fixed.tensors
    assert torch.equal(fixed.options["log_decay"], one.tensors["log_decay"])


@pytest.mark.parametrize("taylor", [0, 1])
def test_a_drawn_normaliser_is_one_that_tokens_left(taylor: int) -> None:
    shape = VOCABULARY.shape(b=1, h=2, n=1, d=8, normalize=1, taylor=taylor)
    state = drawn_state(shape, lambda *size: torch.randn(size), torch.float32)
    normaliser = state[..., -1]
    assert (normaliser > 0).all() if not taylor else torch.equal(normaliser[..., 0], torch.full((1, 2), 8.0))


def test_limits_are_those_of_the_issue_and_find_faults() -> None:
    assert CASE.limit is not None
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 8e-3)):
        for name in ("out", "final_state", "dq", "dk", "dv", "dinitial_state"):
            assert CASE.limit(name, dtype).relative_rms <= most
        assert CASE.limit("dlog_decay", dtype).relative_rms <= 2e-2
    proof = Proof(CASE, VOCABULARY.parse("b=1,h=2,n=20,d=16"), torch.bfloat16, CPU)

    def forgetful(inputs):
        inputs.tensors["log_decay"].data.mul_(1.5)
        return CASE.run(inputs, "torch")

    assert proof.judge(lambda inputs: CASE.run(inputs, "torch")).status == "ok"
    assert proof.judge(forgetful).status == "wrong"
    assert proof.judge(lambda inputs: {name: 0 * x for name, x in CASE.run(inputs, "torch").items()}).status == "wrong"


def test_suites_and_operators_by_name() -> None:
    assert load("linear_attention") is CASE
    assert set(CASE.suites) >= {"quick", "train", "long", "llm"}
    assert set(STEP.suites) >= {"quick", "decode"}
    assert STEP.page == "linear_attention"
    assert load("gated_delta_rule_step").page == load("gated_delta_rule").page == "gated_delta_rule"
    with pytest.raises(UsageError, match="hk=3 does not divide h=4"):
        CASE.make_inputs(VOCABULARY.parse("h=4,hk=3,n=1"), torch.float32, CPU, 0)


def test_absent_peers_say_why() -> None:
    assert {name: isinstance(peer, str) for name, peer in CASE.peers(CPU).items()} == {"sdpa-flash": True, "fla": True}


@pytest.mark.parametrize("text", ["b=4,h=16,hk=4,n=16k,d=128", "b=8,h=4,n=16k,packed=1", "n=64k,b=1,h=1"])
def test_a_shape_too_large_for_the_reference_shrinks_and_keeps_its_options(text: str) -> None:
    shape = VOCABULARY.parse(text)
    small = CASE.within(shape, 2**28)
    assert CASE.reference_bytes(small) <= 2**28 < CASE.reference_bytes(shape)
    assert small.h // small.hk == shape.h // shape.hk
    assert (small.d, small.decay, small.packed) == (shape.d, shape.decay, shape.packed)
