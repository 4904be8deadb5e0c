"""Measures of a DistributedDataParallel model over sharded loaders are those of one process with all the data."""

import pytest
import torch
import torch.distributed as dist
from ddp_steps import assert_equal_on_ranks, wrap
from problems import batches, losses_of, mlp
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastsam.sharpness import hessian_eigenvalues, landscape, m_sharpness, sam_sharpness, spectrum


def sharded_and_whole():
    """A loader of every second sample for each rank, and the same batches on one process."""
    data = TensorDataset(*batches(1, rows=24)[0])
    sampler = DistributedSampler(data, shuffle=False)
    whole = [data[rank :: dist.get_world_size()] for rank in range(dist.get_world_size())]
    return DataLoader(data, batch_size=24 // dist.get_world_size(), sampler=sampler), whole


@pytest.mark.ranks(2)
def test_sums_go_over_ranks():
    model, plain = mlp(batchnorm=True), mlp(batchnorm=True)
    ddp = wrap(model)
    sharded, whole = sharded_and_whole()
    measures = [
        lambda *given: sam_sharpness(*given, 0.3, mode="train"),
        lambda *given: sam_sharpness(*given, 0.3, whole_loader=True),
        lambda *given: m_sharpness(*given, 0.3, shard_size=4),
        lambda *given: landscape(*given, points=3),
        lambda *given: hessian_eigenvalues(*given, 3, tol=1e-10),
        lambda *given: spectrum(*given, steps=4, probes=1),
    ]
    for measure in measures:
        found, expected = vars(measure(ddp, losses_of(ddp), sharded)), vars(measure(plain, losses_of(plain), whole))
        # the last bits of what has converged, and how soon, differ
        for loose in ("residual", "products", "gradients"):
            expected.pop(loose, None), found.pop(loose, None)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert_equal_on_ranks([torch.as_tensor(v) for v in found.values()])


@pytest.mark.ranks(2)
def test_each_rank_alone_where_the_loader_is_not_sharded():
    """Ranks may measure data of their own, as many batches as they like, without waiting for each other."""
    model = mlp(batchnorm=True)
    ddp = wrap(model)
    parts = batches(dist.get_rank() + 1, seed=dist.get_rank())
    # in training mode DDP's forward would wait for the other ranks' buffers
    found = sam_sharpness(ddp, losses_of(ddp), parts, mode="train")
    assert found.samples == 12 * (dist.get_rank() + 1)
    together = sam_sharpness(ddp, losses_of(ddp), parts, sharded=True)
    assert together.samples == 36
    # training goes on as if nothing had been
    loss = losses_of(ddp)(*parts[0]).mean()
    loss.backward()
    assert_equal_on_ranks([p.grad for p in model.parameters()])
