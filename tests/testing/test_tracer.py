"""The tracer counts each byte once an instruction, and lets no stray access pass."""

# Triton types a launch as a call of the kernel, where plain integers are not constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch

from iokernels.testing.inputs import poisoned_view
from iokernels.testing.tracer import OutOfBounds, Traffic, trace

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreted


@triton.jit
def copy_rows(x_ptr, y_ptr, stride_xm, stride_xn, stride_ym, stride_yn, rows, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    x = tl.load(x_ptr + row * stride_xm + offsets * stride_xn, mask=mask)
    tl.store(y_ptr + row * stride_ym + offsets * stride_yn, x, mask=mask)


@triton.jit
def read_tail(x_ptr, n, BLOCK: tl.constexpr):
    return tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))


@triton.jit
def copy_without_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    x = read_tail(x_ptr, n, BLOCK)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, x, mask=offsets < n)


@triton.jit
def store_ones(y_ptr, offset, BLOCK: tl.constexpr):
    tl.store(y_ptr + offset + tl.arange(0, BLOCK), tl.full([BLOCK], 1.0, tl.float32))


@triton.jit
def accumulate(x_ptr, sum_ptr, count_ptr, lock_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(sum_ptr, tl.sum(x))
    tl.atomic_add(count_ptr + tl.zeros([BLOCK], tl.int32), 1)
    tl.atomic_cas(lock_ptr, 0, 1)


@triton.jit
def copy_described(x_desc, y_ptr, rows, columns, M: tl.constexpr, N: tl.constexpr):
    y_desc = tl.make_tensor_descriptor(y_ptr, [rows, columns], [columns, 1], [M, N])
    row = tl.program_id(0) * M
    y_desc.store([row, 0], x_desc.load([row, 0]))


@triton.jit
def copy_words(x_ptr, y_ptr, BLOCK: tl.constexpr):
    words = x_ptr.to(tl.pointer_type(tl.int64))
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(words + tl.arange(0, BLOCK)))


def launch_copy(x, y):
    copy_rows[(x.shape[0],)](x, y, *x.stride(), *y.stride(), *x.shape, BLOCK=triton.next_power_of_2(x.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_counts_a_copy(dtype):
    x = torch.arange(21).view(3, 7).to(dtype)
    y = torch.zeros_like(x)
    with trace() as t:
        launch_copy(x, y)
    assert torch.equal(x, y)
    (kernel,) = t.kernels
    assert (kernel.name, kernel.grid, kernel.programs) == ("copy_rows", (3, 1, 1), 3)
    size = 21 * x.element_size()
    assert kernel.arguments == {"x_ptr": Traffic(read=size), "y_ptr": Traffic(written=size)}
    assert t.bytes("copy_rows") == t.bytes() == Traffic(read=size, written=size)
    assert t.bytes().total == 2 * size


def test_counts_a_transposed_strided_copy_and_sees_no_gap():
    x = poisoned_view(torch.randn(3, 7), "strided")
    y = poisoned_view(torch.zeros(7, 3), "padded")
    with trace() as t:
        launch_copy(x.T, y)
        launch_copy(x.T, y)
    assert torch.equal(x.T, y)
    assert [kernel.traffic for kernel in t.kernels] == [Traffic(84, 84)] * 2
    assert t.bytes("copy_rows") == Traffic(168, 168)


def test_expanded_input_counts_each_request():
    x = torch.randn(1, 8).expand(4, 8)
    y = torch.zeros(4, 8)
    with trace() as t:
        launch_copy(x, y)
    assert t.bytes() == Traffic(read=4 * 32, written=4 * 32)
    one = torch.randn(1, 1).expand(4, 8)
    with trace() as t:
        launch_copy(one, y)
    assert t.bytes() == Traffic(read=4 * 4, written=4 * 32), "a program asks for one address once an instruction"


def test_views_of_one_storage_are_told_apart():
    joint = torch.randn(4, 3, 8)
    with trace() as t:
        launch_copy(joint[:, 0], joint[:, 2])
    assert t.kernels[0].arguments == {"x_ptr": Traffic(read=128), "y_ptr": Traffic(written=128)}
    with trace() as t:
        launch_copy(joint[:, 0], joint[:, 0])
    assert t.kernels[0].arguments == {"x_ptr": Traffic(read=128, written=128), "y_ptr": Traffic()}


def test_missing_mask_is_caught_inside_a_helper():
    x = torch.zeros(16)[:10]
    y = torch.full((10,), 5.0)
    message = r"kernel copy_without_mask, program \(1, 0, 0\): read 4 bytes that begin 1 byte after an element of x_ptr"
    with trace(), pytest.raises(OutOfBounds, match=message):
        copy_without_mask[(2,)](x, y, 10, BLOCK=8)
    assert y[8:].eq(5.0).all(), "the program must stop at the stray access"
    with trace():
        copy_without_mask[(2,)](torch.zeros(16), y, 10, BLOCK=8)


def test_store_into_the_gap_of_a_strided_view_is_caught():
    y = torch.zeros(8)[::2]
    with trace(), pytest.raises(OutOfBounds, match="wrote 4 bytes that begin 1 byte after an element of y_ptr"):
        store_ones[(1,)](y, 0, BLOCK=4)
    assert y._base is not None
    assert y._base.eq(0.0).all(), "the access must not reach memory"


@pytest.mark.parametrize(("offset", "place"), [(-1, "4 bytes before"), (4, "1 byte after"), (2**30, "bytes after")])
def test_store_beyond_the_tensor_is_caught(offset, place):
    y = torch.zeros(16)[6:10]
    with trace(), pytest.raises(OutOfBounds, match=place):
        store_ones[(1,)](y, offset, BLOCK=1)


def test_element_that_straddles_the_end_is_caught():
    x, y = torch.zeros(15, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with trace(), pytest.raises(OutOfBounds, match="end beyond its elements"):
        copy_words[(1,)](x, y, BLOCK=2)


def test_empty_tensors_allow_nothing():
    with trace(), pytest.raises(OutOfBounds, match="given no memory"):
        store_ones[(1,)](torch.zeros(0), 0, BLOCK=1)


def test_counts_atomics():
    x, total = torch.ones(32), torch.zeros(1)
    count, lock = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with trace() as t:
        accumulate[(2,)](x, total, count, lock, BLOCK=16)
    assert (total.item(), count.item(), lock.item()) == (32.0, 32, 1)
    assert t.kernels[0].arguments == {
        "x_ptr": Traffic(read=128),
        "sum_ptr": Traffic(atomic=8),
        "count_ptr": Traffic(atomic=8),
        "lock_ptr": Traffic(atomic=8),
    }
    with trace(), pytest.raises(OutOfBounds, match="updated 4 bytes"):
        accumulate[(2,)](x, total[1:], count, lock, BLOCK=16)


def test_counts_through_tensor_descriptors():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.randn(10, 8), torch.zeros(10, 8)
    with trace() as t:
        copy_described[(2,)](TensorDescriptor(x, [10, 8], [8, 1], [8, 8]), y, 10, 8, M=8, N=8)
    assert torch.equal(x, y)
    assert t.kernels[0].arguments == {"x_desc": Traffic(read=320), "y_ptr": Traffic(written=320)}
    with trace(), pytest.raises(OutOfBounds, match="x_desc"):
        copy_described[(2,)](TensorDescriptor(x[:9], [10, 8], [8, 1], [8, 8]), y, 10, 8, M=8, N=8)


def test_nothing_stays_patched():
    from triton.runtime import interpreter as triton_interpreter

    before = triton_interpreter._interpreter, vars(triton_interpreter.GridExecutor).copy()
    with pytest.raises(OutOfBounds), trace():
        store_ones[(1,)](torch.zeros(1), 1, BLOCK=1)
    with pytest.raises(ZeroDivisionError), trace():
        raise ZeroDivisionError
    assert (triton_interpreter._interpreter, vars(triton_interpreter.GridExecutor).copy()) == before


def test_unknown_kernel_name():
    with trace() as t:
        store_ones[(1,)](torch.zeros(4), 0, BLOCK=4)
    with pytest.raises(KeyError, match="launched: store_ones"):
        t.bytes("store_twos")
