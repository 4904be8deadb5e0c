"""The words of philox.py inside a kernel."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


def signed(word: int) -> int:
    """Return the low 32 bits as a signed number, so that a kernel's argument is always an int32."""
    return (word + 0x80000000 & 0xFFFFFFFF) - 0x80000000


@triton.jit
def join_seed(low, high):
    """Put a seed together from two arguments made by `signed`."""
    return (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True)


@triton.jit
def random_words(seed, index, step, start, ALIGNED: tl.constexpr, LANES: tl.constexpr):
    """Words of elements start to start + LANES of a tensor, `start` being a multiple of 4 where lanes are aligned.

    Aligned lanes hold four elements or more a thread, which use all four words of a counter. Others hold one, and drop
    three words rather than fetch theirs from another thread.
    """
    if ALIGNED:
        quads = start // 4
        low = quads.to(tl.uint32) + tl.arange(0, LANES // 4).to(tl.uint32)
        # A part of a tensor may start anywhere, so that a stretch may cross a multiple of 2^32 quads.
        high = (quads >> 32).to(tl.uint32) + (low < quads.to(tl.uint32)).to(tl.uint32)
        first, second, third, fourth = tl.philox(seed, low, index, step, high)
        words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (LANES,))
    else:
        elements = start + tl.arange(0, LANES)
        quads = elements // 4
        first, second, third, fourth = tl.philox(seed, quads.to(tl.uint32), index, step, (quads >> 32).to(tl.uint32))
        which = elements % 4
        words = tl.where(which < 2, tl.where(which == 0, first, second), tl.where(which == 2, third, fourth))
    return words


@triton.jit
def first_word(seed, index, step):
    """The word of a tensor's first element, which decides on the whole tensor where it is masked as one."""
    zero = (index * 0).to(tl.uint32)
    first, _, _, _ = tl.philox(seed, zero, index, step, zero)
    return first


@triton.jit
def is_kept(words, threshold):
    """Whether each word lies below the threshold, which is a float64 because it may be 2^32."""
    return words.to(tl.int64) < threshold.to(tl.int64)
