"""The case of lean_attention: costs against hand counts, options covered, peers right."""

import pytest
import torch

from iokernels import UnsupportedError
from iokernels.ops.lean_attention.case import CASE, NOWHERE, pairs, visible_keys
from iokernels.ops.lean_attention.case.peers import peers
from iokernels.ops.lean_attention.case.shapes import VOCABULARY, lengths
from iokernels.testing.case import load
from iokernels.testing.case.proof import Proof
from iokernels.testing.case.shape import UsageError

CPU = torch.device("cpu")


def test_the_figures_of_a_well_known_shape() -> None:
    """Llama 3 70B: 64 heads of queries, 8 of keys, 128 wide; one user with 64k tokens."""
    shape = VOCABULARY.parse("b=1,h=64,hkv=8,nk=64k,d=128")
    assert CASE.flops(shape, "fwd") == 4 * 64 * 65536 * 128
    cache, rows = 2 * 8 * 65536 * 128 * 2, 64
    assert CASE.floor_bytes(shape, torch.bfloat16, "fwd") == cache + rows * 128 * 2 * 2 + rows * 4 + 4
    assert CASE.floor_bytes(shape.replace(cache=1), torch.bfloat16, "fwd") < 0.51 * cache


def test_bytes_of_the_options() -> None:
    plain = VOCABULARY.parse("b=2,h=4,hkv=2,nk=64,shortest=32,d=32,dv=16")
    base = CASE.floor_bytes(plain, torch.float16, "fwd")

    def added(**options: float) -> int:
        return CASE.floor_bytes(plain.replace(**options), torch.float16, "fwd") - base

    keys, pair = 2 * (64 + 32), 48 * 2
    assert added(sinks=1) == 8
    assert added(scales=1) == 2 * 2 * 4
    assert added(scales=2) == 2 * keys * 4
    assert added(cache=2) == -keys * pair // 2
    assert added(page=16) == (4 + 2) * 4
    assert added(prefix=100) == 2 * 100 * pair
    assert added(spare=1000) == 0
    assert added(left=7) == -(keys - 2 * 2 * 8) * pair
    assert added(left=7, prefix=100) == -(keys - 2 * 2 * 8) * pair
    assert added(left=39, page=16) == -2 * 24 * pair + (3 + 2) * 4
    assert added(left=39, prefix=100) == 2 * 8 * pair - 2 * 24 * pair


@pytest.mark.parametrize(
    "text",
    [
        "nk=7", "b=3,nk=7,shortest=0,n=3", "nk=9,n=4,left=2", "nk=9,n=4,causal=0", "nk=9,n=4,causal=0,right=1",
        "b=4,nk=9,shortest=1,n=2,prefix=5,left=6", "b=2,nk=3,n=5,left=0", "b=1,nk=0,prefix=4,n=2",
        "b=2,nk=0,n=3,prefix=2,left=1",
    ],
)  # fmt: skip
def test_visible_pairs_against_a_count(text: str) -> None:
    shape = VOCABULARY.parse(text)
    right = 0 if shape.causal else shape.right
    count, seen_prefix, seen_own = 0, set(), set()
    for sequence, length in enumerate(lengths(shape)):
        total = shape.prefix + length
        for row in range(shape.n):
            position = total - shape.n + row
            for key in range(total):
                hidden = (0 <= shape.left < position - key) or (right >= 0 and key > position + right)
                count += not hidden
                if not hidden:
                    (seen_prefix if key < shape.prefix else seen_own).add((0 if key < shape.prefix else sequence, key))
    assert pairs(shape) == count
    assert visible_keys(shape) == (len(seen_prefix), len(seen_own))


def test_lengths() -> None:
    assert lengths(VOCABULARY.parse("b=4,nk=16")) == [16] * 4
    assert lengths(VOCABULARY.parse("b=4,nk=16,shortest=1")) == [16, 11, 6, 1]
    assert lengths(VOCABULARY.parse("b=1,nk=16,shortest=1")) == [16]
    assert lengths(VOCABULARY.parse("b=0")) == []


def test_every_option_is_proved() -> None:
    """A dimension that no point moves from its default would be an option that `check` never sees."""
    points = CASE.check_points()
    assert len({point.name for point in points}) == len(points)
    for dimension in VOCABULARY.dimensions:
        values = {point.shape[dimension.name] for point in points}
        assert len(values) > 1, dimension.name
    for word, most in (("cache", 2), ("scales", 2), ("schedule", 3)):
        assert {point.shape[word] for point in points} == set(range(most + 1))
    assert any(point.shape.right > 0 for point in points)
    assert any(0 in lengths(point.shape) for point in points)


def test_inputs_repeat_and_hide_poison() -> None:
    shape = VOCABULARY.parse("b=3,h=4,hkv=2,nk=20,shortest=0,spare=9,page=8,d=8,dv=16,prefix=5,sinks=1,bnhd=1")
    one, same, other = (CASE.make_inputs(shape, torch.bfloat16, CPU, seed) for seed in (3, 3, 4))
    assert {name: tuple(x.shape) for name, x in one.tensors.items()} == {
        "q": (3, 4, 1, 8), "k_cache": (6, 2, 8, 8), "v_cache": (6, 2, 8, 16), "sinks": (4,),
        "k_prefix": (2, 5, 8), "v_prefix": (2, 5, 16),
    }  # fmt: skip
    for name, x in one.tensors.items():
        assert torch.equal(x.nan_to_num(), same.tensors[name].nan_to_num())
        assert not torch.equal(x.nan_to_num(), other.tensors[name].nan_to_num())
        assert not x.requires_grad
    table = one.options["block_table"]
    assert (table == NOWHERE).sum().item() == 12 - (3 + 2)
    used = table[table != NOWHERE].tolist()
    assert len(set(used)) == 5
    assert one.tensors["k_cache"].isnan().any(-1).sum() == 2 * ((24 - 20) + (16 - 10))
    exact = one.to(torch.float64)
    assert exact.tensors["k_cache"].dtype == torch.float64
    assert CASE.make_inputs(shape.replace(cache=1), torch.bfloat16, CPU, 3).to(torch.float64).options[
        "k_cache"].dtype == torch.float8_e4m3fn  # fmt: skip


def test_suites_and_errors_by_name() -> None:
    assert load("lean_attention") is CASE
    assert set(CASE.suites) >= {"quick", "decode", "ragged", "shared-prefix"}
    assert {shape.b for shape in CASE.suite("decode")} >= {1, 4, 8, 16, 32}
    with pytest.raises(UsageError, match="hkv=3 does not divide h=4"):
        CASE.make_inputs(VOCABULARY.parse("h=4,hkv=3,nk=1"), torch.float32, CPU, 0)
    with pytest.raises(UsageError, match="shortest=9 is more than nk=4"):
        CASE.make_inputs(VOCABULARY.parse("h=4,nk=4,shortest=9"), torch.float32, CPU, 0)
    with pytest.raises(UsageError, match="takes no gradients: it has fwd only"):
        CASE.passes_of(("bwd",))


@pytest.mark.parametrize("name", ["decode", "ragged", "shared-prefix"])
def test_a_shape_too_large_for_the_reference_shrinks_and_keeps_its_options(name: str) -> None:
    for shape in CASE.suite(name):
        small = CASE.within(shape, 2**28)
        assert CASE.reference_bytes(small) <= 2**28
        assert small.h // small.hkv == shape.h // shape.hkv
        assert [small[word] for word in ("n", "d", "page", "cache", "schedule")] == [
            shape[word] for word in ("n", "d", "page", "cache", "schedule")
        ]  # fmt: skip
        assert bool(small.prefix) == bool(shape.prefix)
        assert (small.shortest == small.nk) == (shape.shortest == shape.nk)


@pytest.mark.parametrize("text", ["b=1,nk=40", "b=3,nk=40,shortest=7,n=3", "b=2,nk=40,spare=9,left=8,n=2"])
def test_sdpa_computes_the_same(text: str) -> None:
    shape = VOCABULARY.parse(f"h=4,hkv=2,d=16,{text}")
    prepare = peers(CPU)["sdpa"]
    assert not isinstance(prepare, str)
    Proof(CASE, shape, torch.float32, CPU).judge(lambda inputs: prepare(inputs)()).require_ok(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("page=4", "page=4"), ("cache=1", "cache=1"), ("prefix=3", "prefix=3"), ("sinks=1", "sinks=1"),
        ("schedule=3", "independent of the batch"), ("n=9,nk=4", "row without keys"), ("nk=0", "without keys"),
    ],
)  # fmt: skip
def test_sdpa_refuses_what_it_cannot_do(text: str, reason: str) -> None:
    prepare = peers(CPU)["sdpa"]
    assert not isinstance(prepare, str)
    inputs = CASE.make_inputs(VOCABULARY.parse(f"h=4,nk=20,d=16,{text}" if "nk" not in text else f"h=4,d=16,{text}"),
                              torch.float32, CPU, 0)  # fmt: skip
    with pytest.raises(UnsupportedError, match=reason):
        prepare(inputs)


def test_absent_peers_say_why() -> None:
    for name, peer in peers(CPU).items():
        if name != "sdpa":
            assert isinstance(peer, str)
