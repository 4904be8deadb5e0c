"""How a kernel finds its work: the other side of the tables in launch_tables.py."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

COLUMNS = tl.constexpr(2)
"""Columns of a row before its addresses: number of elements, index of the hyperparameters."""


@triton.jit
def find_chunk(rows_ptr, chunks_ptr, N_COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Look up this program's row, where in it the chunk starts, and how long the chunk is."""
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * BLOCK_SIZE
    row_ptr = rows_ptr + tl.load(chunks_ptr + 2 * program).to(tl.int64) * N_COLUMNS
    length = tl.minimum(tl.load(row_ptr) - start, BLOCK_SIZE).to(tl.int32)
    return row_ptr, start, length


@triton.jit
def aligned_length(length, addresses):
    """How many elements can be taken in 128-bit accesses: none if the bits of any address, or-ed together, forbid."""
    return length // 16 * 16 * ((addresses & 15) == 0).to(tl.int32)


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """Return x in the dtype of arithmetic. Triton's interpreter knows no way from bfloat16 but float32."""
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Return x in the dtype of a tensor; the other way round."""
    if DTYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def element_ptr(base, start, DTYPE: tl.constexpr, WIDEST: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor at the address `base`.

    The hint has to follow the cast. Where one thread's elements fill 128 bits of the widest tensor they fill fewer of
    a narrower one; claiming more would make the two disagree on who holds what, and meet in shared memory.
    """
    ptr = base.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16 * DTYPE.primitive_bitwidth // WIDEST)
    return ptr + start
