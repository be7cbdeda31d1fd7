"""The case of flash_attention: costs against hand counts, options covered."""

import pytest
import torch

from iokernels.ops.flash_attention.case import CASE, pairs
from iokernels.ops.flash_attention.case.shapes import VOCABULARY, lengths
from iokernels.testing.case import PASSES, load
from iokernels.testing.case.shape import UsageError

CPU = torch.device("cpu")


def test_the_figures_of_a_well_known_shape() -> None:
    full = VOCABULARY.parse("b=4,h=16,n=4k,d=128")
    assert CASE.flops(full, "fwd") == 4 * 4 * 16 * 4096 * 4096 * 128
    assert CASE.flops(full, "bwd") == 2.5 * CASE.flops(full, "fwd")
    assert CASE.flops(full, "both") == 3.5 * CASE.flops(full, "fwd")
    causal = VOCABULARY.parse("b=4,h=16,n=4k,d=128,causal=1")
    assert CASE.flops(causal, "fwd") == 4 * 4 * 16 * (4096 * 4097 // 2) * 128
    tensor, lse = 4 * 16 * 4096 * 128 * 2, 4 * 16 * 4096 * 4
    assert CASE.floor_bytes(causal, torch.bfloat16, "fwd") == 4 * tensor + lse == 269_484_032
    # Read q, k, v, out, dout and lse; write dq, dk, dv.
    assert CASE.floor_bytes(causal, torch.bfloat16, "bwd") == 8 * tensor + lse
    assert CASE.floor_bytes(causal, torch.bfloat16, "both") == 12 * tensor + 2 * lse


def test_bytes_of_the_optional_tensors() -> None:
    plain = VOCABULARY.parse("b=2,h=4,n=8,nk=16,d=32,dv=64")
    base = {which: CASE.floor_bytes(plain, torch.float32, which) for which in PASSES}
    q, k, v, out, lse = 2 * 4 * 8 * 32 * 4, 2 * 4 * 16 * 32 * 4, 2 * 4 * 16 * 64 * 4, 2 * 4 * 8 * 64 * 4, 2 * 4 * 8 * 4
    assert base["fwd"] == q + k + v + out + lse
    assert base["bwd"] == 2 * (q + k + v) + 2 * out + lse
    scores = 2 * 4 * 8 * 16

    def added(**options: float) -> tuple[int, int]:
        shape = plain.replace(**options)
        return (
            CASE.floor_bytes(shape, torch.float32, "fwd") - base["fwd"],
            CASE.floor_bytes(shape, torch.float32, "bwd") - base["bwd"],
        )

    assert added(mask=1) == (scores, scores)
    assert added(bias=1) == (4 * scores, 8 * scores)
    assert added(bias=2) == (2 * scores, 4 * scores)
    assert added(sinks=1) == (16, 32)
    assert added(alibi=1) == (16, 16)
    assert added(lse=1) == (0, lse)
    assert added(hkv=1) == (-(k + v) * 3 // 4, -2 * (k + v) * 3 // 4)


@pytest.mark.parametrize(
    "text",
    [
        "n=7,nk=5", "n=7,nk=5,causal=1", "n=5,nk=7,causal=1", "n=6,left=2", "n=6,left=0,right=1", "n=6,nk=9,right=2",
        "n=9,nk=4,left=1,right=0", "b=4,n=9,nk=6,packed=1,causal=1", "b=4,n=9,packed=1,empty=1,left=3", "n=3,nk=0",
    ],
)  # fmt: skip
def test_visible_pairs_against_a_count(text: str) -> None:
    shape = VOCABULARY.parse(text)
    count = 0
    for n, nk in lengths(shape):
        for i in range(n):
            for j in range(nk):
                position = i + nk - n
                hidden = (shape.causal and j > position) or (0 <= shape.left < position - j)
                count += not (hidden or 0 <= shape.right < j - position)
    assert pairs(shape) == count


def test_packed_lengths() -> None:
    assert lengths(VOCABULARY.parse("b=4,n=8,nk=16,packed=1")) == [(8, 16), (6, 12), (4, 8), (2, 4)]
    assert lengths(VOCABULARY.parse("b=4,n=8,packed=1,empty=1")) == [(8, 8), (0, 6), (4, 0), (2, 2)]
    assert lengths(VOCABULARY.parse("b=2,n=8,nk=3")) == [(8, 3), (8, 3)]


def test_every_option_is_proved() -> None:
    """A dimension that no point moves from its default would be an option that `check` never sees."""
    points = CASE.check_points()
    assert len({point.name for point in points}) == len(points)
    for dimension in VOCABULARY.dimensions:
        values = {point.shape[dimension.name] for point in points}
        assert len(values) > 1, dimension.name
    assert any(point.quick and point.shape.packed for point in points)
    assert any(point.shape.hkv not in (1, point.shape.h) for point in points)
    assert any(point.shape.d != point.shape.dv for point in points)
    assert any(point.shape.n > point.shape.nk > 0 and point.shape.causal for point in points)


def test_inputs_repeat_and_follow_the_seed() -> None:
    shape = VOCABULARY.parse("b=2,h=4,hkv=2,n=5,nk=6,d=8,dv=16,mask=1,bias=2,sinks=1,alibi=1,lse=1,bnhd=1")
    one, same, other = (CASE.make_inputs(shape, torch.bfloat16, CPU, seed) for seed in (3, 3, 4))
    assert {name: tuple(x.shape) for name, x in one.tensors.items()} == {
        "q": (2, 4, 5, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 16), "bias": (1, 4, 5, 6), "sinks": (4,),
    }  # fmt: skip
    assert one.tensors["q"].transpose(1, 2).is_contiguous()
    for name, x in one.tensors.items():
        assert x.is_leaf
        assert x.requires_grad
        assert torch.equal(x, same.tensors[name])
        assert not torch.equal(x, other.tensors[name])
    assert one.output_gradients["lse"].dtype == torch.float32
    exact = one.to(torch.float64)
    assert torch.equal(exact.tensors["q"], one.tensors["q"].double())
    assert exact.tensors["q"].stride() == one.tensors["q"].stride()
    assert exact.output_gradients["lse"].dtype == torch.float64


def test_suites_and_operators_by_name() -> None:
    assert load("flash_attention") is CASE
    assert set(CASE.suites) >= {"quick", "train", "long", "llm", "decode"}
    with pytest.raises(UsageError, match="no suite 'none'; it has quick"):
        CASE.suite("none")
    with pytest.raises(UsageError, match="no operator 'none'"):
        load("none")
    with pytest.raises(UsageError, match="hkv=3 does not divide h=4"):
        CASE.make_inputs(VOCABULARY.parse("h=4,hkv=3,n=1"), torch.float32, CPU, 0)


@pytest.mark.parametrize("text", ["b=4,h=16,hkv=4,n=4k,d=128,causal=1", "b=8,h=4,n=8k,packed=1", "n=64k,b=1,h=1"])
def test_a_shape_too_large_for_the_reference_shrinks_and_keeps_its_options(text: str) -> None:
    shape = VOCABULARY.parse(text)
    small = CASE.within(shape, 2**28)
    assert CASE.reference_bytes(small) <= 2**28 < CASE.reference_bytes(shape)
    assert small.h // small.hkv == shape.h // shape.hkv
    assert (small.d, small.causal, small.packed) == (shape.d, shape.causal, shape.packed)
    assert CASE.within(small, 2**28) == small
