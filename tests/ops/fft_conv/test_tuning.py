"""The spaces of fft_conv: the default is inside, whatever is asked; blocks cover the sequence."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from iokernels.autotune.search import ranked
from iokernels.ops.fft_conv.options import CAUSAL, CIRCULAR, TWO_SIDED
from iokernels.ops.fft_conv.triton import tuning
from iokernels.ops.fft_conv.triton.tuning import TUNABLES
from iokernels.runtime.device import KNOWN, DeviceSpec, named


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuning.Problem, DeviceSpec]:
    device = draw(st.sampled_from(list(KNOWN.values())))
    precision = draw(st.sampled_from(["half", "tf32", "tf32x3"]))
    itemsize = 2 if precision == "half" else 4
    half = draw(st.sampled_from([tuning.LONGEST[itemsize], tuning.LONGEST_THROUGH])) // 2
    mode = draw(st.sampled_from([CAUSAL, CIRCULAR, TWO_SIDED]))
    if mode == TWO_SIDED:
        seqlen = draw(st.integers(1, half))
        taps = 2 * seqlen - 1
    else:
        seqlen = draw(st.one_of(st.integers(1, half), st.sampled_from([2**16, 10**6])))
        taps = draw(st.integers(1, min(seqlen, half)))
    problem = tuning.Problem(
        kernel=draw(st.sampled_from(tuning.KERNELS)),
        itemsize=itemsize,
        precision=precision,
        seqlen=seqlen,
        taps=taps,
        mode=mode,
        state=mode == CAUSAL and draw(st.booleans()),
        gated=draw(st.booleans()),
        sm=device.sm,
        smem_block=device.smem_block,
        sms=device.sms,
        heads=draw(st.sampled_from([1, 768])),
        pairs=draw(st.sampled_from([1, 32])),
    )
    return problem, device


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_default_is_inside_the_space(drawn: tuple[tuning.Problem, DeviceSpec]) -> None:
    problem, device = drawn
    space = TUNABLES[problem.kernel].space
    assert space.refusal(problem, device, tuning.default(problem)) is None


@settings(max_examples=10, deadline=None)
@given(problems())
def test_what_is_ranked_is_the_space_from_the_default_on(drawn: tuple[tuning.Problem, DeviceSpec]) -> None:
    problem, device = drawn
    tunable = TUNABLES[problem.kernel]
    found = ranked(tunable, problem, device)
    assert found[0] == tuning.default(problem)
    assert len(set(found)) == len(found) == tunable.space.explain(problem, device).left


@settings(max_examples=200, deadline=None)
@given(problems())
def test_blocks_cover_the_sequence(drawn: tuple[tuning.Problem, DeviceSpec]) -> None:
    problem, _ = drawn
    for length in tuning.lengths(problem.itemsize):
        cover = tuning.blocks_of(problem, length)
        if cover is not None:
            assert cover.n1 * cover.n2 == length == cover.overlap + cover.step
            assert cover.chunks * cover.step >= problem.seqlen > (cover.chunks - 1) * cover.step
            assert not cover.half or cover.chunks == 1


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from(tuning.OUTERS), st.sampled_from(tuning.row_lengths()))
def test_blocks_through_memory_cover_the_sequence(
    drawn: tuple[tuning.Problem, DeviceSpec], outer: int, length: int
) -> None:
    problem, _ = drawn
    cover = tuning.through(outer, length, problem.seqlen, problem.taps, problem.mode, problem.state)
    if cover is None:
        return
    points = cover.outer * cover.n1 * cover.n2
    assert points == outer * length <= tuning.LONGEST_THROUGH
    assert cover.chunks * cover.step >= problem.seqlen
    assert cover.back_chunks * cover.step >= problem.seqlen + cover.past
    if cover.chunks > 1:
        # What a block makes meets all of its taps inside the block.
        assert cover.step + cover.overlap == points
        assert cover.overlap == problem.taps - 1
    elif problem.mode == CIRCULAR and problem.seqlen == points:
        assert cover.overlap == 0
    else:
        assert points >= problem.seqlen + (problem.taps - 1 if problem.mode != TWO_SIDED else problem.seqlen - 1)


@settings(max_examples=20, deadline=None)
@given(problems())
def test_every_tile_of_the_outer_steps_fits_every_transform(drawn: tuple[tuning.Problem, DeviceSpec]) -> None:
    problem, device = drawn
    space = TUNABLES[tuning.OUTER_KERNEL].space
    problem = problem._replace(kernel=tuning.OUTER_KERNEL)
    assert space.refusal(problem, device, tuning.default_outer(problem)) is None
    for config in space.candidates(problem, device):
        for outer in tuning.OUTERS:
            for length in tuning.row_lengths():
                tile = tuning.fitted(config, outer, length)
                assert outer % tile.rows == outer % tile.depth == length % tile.columns == 0
                assert tile.columns % tuning.factors(length)[1] == 0


def test_keys_lead_back_to_their_problem() -> None:
    device = named("h100-sxm")
    problem = tuning.Problem(
        "fft_conv_fwd", 2, "half", 4096, 1024, CAUSAL, False, True, device.sm, device.smem_block, device.sms, 1024, 32
    )
    tunable = TUNABLES["fft_conv_fwd"]
    assert tunable.problem_of(tunable.key(problem), device) == problem


def test_what_changes_results_is_pinned() -> None:
    assert all(TUNABLES[name].pinned == ("length", "units", "outer") for name in tuning.KERNELS)
    assert TUNABLES[tuning.OUTER_KERNEL].pinned == ("rows", "columns", "depth")
