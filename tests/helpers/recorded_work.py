"""A stand-in for a CUDA graph that records and replays the CPU's work, kernels in Triton's interpreter included.

It keeps to what makes graphs hard. A replay runs no Python: every operation and launch is repeated on the very tensors
that it had, with the numbers it had. Recording runs nothing in the end: whatever it did to any tensor is undone. What
was allocated while recording is overwritten with NaN before each replay, as a graph's memory holds anything by then.
Reading a tensor's value on the host is an error.
"""

import gc
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastsam.kernels import launch
from fastsam.two_pass import capture

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


class Operation:
    def __init__(self, func, args, kwargs, out):
        keep = lambda leaf: leaf  # noqa: E731 - copies the lists, which their owner may change
        self.func, self.args, self.kwargs, self.out = func, tree_map(keep, args), tree_map(keep, kwargs), out

    def __call__(self):
        fresh = tree_leaves(self.func(*self.args, **self.kwargs))
        for old, new in zip(tree_leaves(self.out), fresh, strict=True):
            if isinstance(old, torch.Tensor) and old is not new and old.numel():
                old.detach().copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, work):
        super().__init__()
        self.work, self.made = work, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in READS:
            raise RuntimeError(f"{name} reads the device on the host")
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        known = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.made += [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and storage_of(t) not in known]
        if name.startswith(("empty", "new_empty")):
            out.zero_()  # kernels, which do not run now, would fill it; indices of 0 are good enough to record with
        else:
            self.work.append(Operation(func, args, kwargs, out))
        return out


class RecordedWork:
    """A `capture.Recorder` on the CPU."""

    def __init__(self):
        self.work, self.memory, self.recordings, self.is_recording = [], [], 0, False

    @contextmanager
    def warm_up(self):
        yield

    @contextmanager
    def recording(self):
        self.work, recorded, self.recordings = [], None, self.recordings + 1
        with everything_undone(), launch.observed_by(self.launch):
            self.is_recording = True
            try:
                with Recording(self.work) as recorded:
                    yield
            finally:
                self.is_recording = False
        tables = {storage_of(table) for table, _ in capture.current().tables._empty}
        self.memory = [t.detach() for t in recorded.made if storage_of(t) not in tables]

    def launch(self, kernel, n_programs, *args, **constants):
        # not run: its tables are empty until the recording is over
        self.work.append(lambda: launch.run(kernel, n_programs, *args, **constants))

    @torch.no_grad()
    def replay(self):
        for tensor in self.memory:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            whole.fill_(torch.nan if whole.is_floating_point() else 1 if whole.dtype == torch.bool else 99)
        for run in self.work:
            run()

    def release(self):
        self.work, self.memory = [], []

    def mark(self):
        slot = [torch.get_rng_state()]
        if self.is_recording:
            self.work.append(lambda: slot.__setitem__(0, torch.get_rng_state()))
        return slot

    def rewind(self, slot):
        if self.is_recording:
            torch.set_rng_state(slot[0])
            self.work.append(lambda: torch.set_rng_state(slot[0]))


@contextmanager
def everything_undone():
    """Context after which every tensor that exists now holds what it holds now."""
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    real = [t for t in alive if t.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(t)]
    storages = {storage_of(t): t.untyped_storage() for t in real}
    memory = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]
    before, draws = [bytes_.clone() for bytes_ in memory], torch.get_rng_state()
    try:
        yield
    finally:
        for bytes_, values in zip(memory, before, strict=True):
            bytes_.copy_(values)
        torch.set_rng_state(draws)
