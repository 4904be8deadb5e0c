"""Lists of tensors to try kernels on, and their comparison bit by bit."""

import torch

from fastsam.kernels import ops


class Implementation:
    """The stages of `ops` on one backend, whatever is chosen elsewhere."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, stage):
        def run(*args, **kwargs):
            before, ops._chosen = ops._chosen, self.backend
            try:
                return getattr(ops, stage)(*args, **kwargs)
            finally:
                ops._chosen = before

        return run


reference = Implementation("torch")
kernels = None if ops._triton_backend() is None else Implementation("triton")
if kernels is not None:
    kernels.INTERPRETED = ops._triton_backend().INTERPRETED
DEVICE = "cpu" if kernels is None or kernels.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LISTS = [[dtype] for dtype in DTYPES] + [DTYPES]
"""Dtypes of a list: each alone, and all mixed."""
SIZES = (0, 1, 63, 4096, 65537)


def tensors(dtypes, seed=0, scale=1.0, sizes=SIZES):
    """Contiguous tensors of all sizes, 0-dim, channels_last, unaligned, transposed and gappy ones, in each dtype."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    made = []
    for dtype in dtypes:
        made += [randn(n).to(DEVICE, dtype) for n in sizes]
        made += [randn(()).to(DEVICE, dtype), randn(6, 4, 3, 3).to(DEVICE, dtype, memory_format=torch.channels_last)]
        made += [randn(101).to(DEVICE, dtype)[1:], randn(7, 9).to(DEVICE, dtype).t()]
        made += [randn(8, 6).to(DEVICE, dtype)[:, ::2]]
    return made


def copies(originals):
    """Copies with the same strides, gaps and alignment."""
    made = []
    for t in originals:
        size = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
        first = t.data_ptr() % 16 // t.element_size() if t.numel() else 0
        room = torch.full((first + size,), float("nan"), dtype=t.dtype, device=t.device)
        made.append(torch.as_strided(room, t.shape, t.stride(), first).copy_(t))
    return made


def bits(t):
    """The tensor's bits as integers, to tell -0 from 0 and compare NaNs."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(integers)


def assert_same_bits(some, others):
    for i, (a, b) in enumerate(zip(some, others, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"tensor {i} of shape {tuple(a.shape)} and dtype {a.dtype}"
