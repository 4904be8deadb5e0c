"""One rank's side of test_distributed.py: `python distributed_worker.py RANK WORLD PORT FOLDER [STOP]`.

A case is a function that all ranks run together, with asserts; its outcome goes to FOLDER/<case>.<rank>.
"""

import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

CASES = {2: {}, 4: {}}
STOPS = {}
FOLDER = Path()


def case(*arguments, world=2):
    """Register a case, or one for each tuple of arguments."""

    def register(function):
        for args in arguments or [()]:
            name = " ".join([function.__name__, *(str(getattr(a, "__name__", a)) for a in args)])
            CASES[world][name] = lambda args=args: function(*args)
        return function

    return register


def stop(function):
    """Register a case that ends its launch, so it needs one of its own."""
    STOPS[function.__name__] = function
    return function


def rows_of_rank(tensors, shards=1):
    """This rank's equal part of each batch tensor."""
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def assert_equal_on_ranks(tensors, what="weights"):
    """Bit for bit."""
    own = torch.cat([t.detach().double().reshape(-1) for t in tensors])
    everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own)
    assert all(torch.equal(own, other) for other in everywhere), f"{what} differ between ranks"


def wrap(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers gives way to forward_sync_buffers
        return DistributedDataParallel(model, **options)


def count_buckets(ddp):
    """Numbers of elements that DDP reduces from now on, bucket by bucket."""
    seen = []

    def hook(_, bucket):
        seen.append(bucket.buffer().numel())
        mean = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    return seen


def run_cases(rank, world):
    import distributed_worker_ddp  # noqa: F401
    import distributed_worker_fsdp  # noqa: F401
    import distributed_worker_msam  # noqa: F401
    import distributed_worker_saf  # noqa: F401
    import interpreter

    interpreter.import_kernels("cpu")
    if sys.argv[5:]:
        STOPS[sys.argv[5]]()
    for name in CASES[world]:
        torch.manual_seed(0)
        try:
            CASES[world][name]()
            outcome = "passed"
        except BaseException:
            outcome = traceback.format_exc()
        (FOLDER / f"{name}.{rank}").write_text(outcome)
        if outcome != "passed":
            print(name, outcome, flush=True)
            return  # ranks may wait for each other in different places now


if __name__ == "__main__":
    sys.path += [str(folder) for folder in Path(__file__).parents[1].iterdir() if folder.is_dir()]
    rank, world, port, FOLDER = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    sys.modules["distributed_worker"] = sys.modules["__main__"]  # cases import this module by its name
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # tensor parallel layers do
    patience = timedelta(seconds=3 if sys.argv[5:] else 60)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=patience)
    run_cases(rank, world)
    dist.destroy_process_group()
