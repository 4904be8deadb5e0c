"""Stochastic rounding of 16-bit shards draws the random numbers of the whole tensor."""

import warnings
from math import prod

import pytest
import torch
from sharding import gathered, mesh_of, shard
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fastsam
from fastsam import SAM
from fastsam.distributed.dtensor import first_element


@pytest.mark.ranks(2)
def test_sharded_rounding_is_stochastic_and_comes_back():
    """bfloat16 weights move by the perturbation on average, where rounding to nearest would leave most of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False), nn.Linear(64, 64, bias=False)).bfloat16()
    shard(model)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.05, model=model, lr=0.1)
    x = torch.randn(8, 256).bfloat16()
    before = [p.detach().double() for p in gathered(model)]
    with opt.ascent():
        model(x).float().square().mean().backward()
    grads = [g.full_tensor().double() for g in opt._run.ascent_grads]
    with opt.descent():
        moved = [p.detach().double() for p in gathered(model)]
        model(x).float().square().mean().backward()
    norm = torch.sqrt(sum((g**2).sum() for g in grads))
    along = sum(((m - b) * g).sum() for m, b, g in zip(moved, before, grads, strict=True)) / norm
    assert abs(along.item() / 0.05 - 1) < 0.1
    assert all(torch.equal(p.detach().double(), b) for p, b in zip(gathered(model), before, strict=True))


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_shards_round_as_the_whole_does(backend):
    """Squares of whole numbers add up alike in any order, so that norms are equal bit for bit too."""
    fastsam.set_backend(backend)

    def perturbed(prepare=None, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 10), nn.Linear(8, 64), nn.Linear(8, 3)).bfloat16()
        grads = [torch.randint(-8, 9, p.shape).bfloat16() for p in model.parameters()]
        if prepare is not None:
            prepare(model)
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        opt = SAM(model.parameters(), torch.optim.SGD, 0.01, model=model, lr=0.1, **options)
        opt.first_step()
        # copies, since an optimizer that is dropped now brings its weights back
        return [p.clone() for p in gathered(model)]

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* processes run, but model is a plain")
            whole, nearest = perturbed(), perturbed(stochastic_rounding=False)
        assert all(map(torch.equal, perturbed(shard), whole))
        assert not torch.equal(whole[0], nearest[0])
    finally:
        fastsam.set_backend(None)


@pytest.mark.ranks(2)
def test_shards_of_columns_round_by_numbers_of_their_own():
    """All entries and gradients are alike, so that the roundings tell the numbers."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16()
    nn.init.ones_(model[0].weight)
    shard(model, shard_placement_fn=lambda p: Shard(1))
    opt = SAM(model.parameters(), torch.optim.SGD, 0.05, model=model, lr=0.1)
    model(torch.ones(4, 64).bfloat16()).float().sum().backward()
    opt.first_step()
    left, right = (model[0].weight.full_tensor() != 1).chunk(2, dim=1)
    assert left.any()
    assert right.any()
    assert not torch.equal(left, right)
    opt.restore()


@pytest.mark.ranks(4)
def test_first_elements_of_shards():
    """Every element holds its own number; 10 rows do not go evenly into 4 or 2 x 2 shards, 3 leave a rank without."""
    mesh, copy, rows, columns = mesh_of(2, 2, names=("outer", "inner")), Replicate(), Shard(0), Shard(1)
    for shape in ((10, 3), (3, 4), (5,), (6, 2, 2)):
        whole = torch.arange(prod(shape)).view(shape)
        for placements in ([rows, rows], [copy, rows], [rows, copy], [copy, copy]):
            part = distribute_tensor(whole, mesh, placements)
            own = part.to_local().flatten()
            assert own.tolist() == [first_element(part) + i for i in range(len(own))]
            whole_size = {"shape": part.shape, "stride": part.stride()}
            pairs = DTensor.from_local(part.to_local().to(torch.complex64), mesh, placements, **whole_size)
            assert first_element(pairs) == 2 * first_element(part)
    for placements in ([copy, columns], [rows, columns], [copy, _StridedShard(0, split_factor=2)]):
        assert first_element(DTensor.from_local(torch.zeros(4, 4), mesh, placements)) is None
    assert first_element(DTensor.from_local(torch.zeros(4, 4).t()[:3], mesh, [copy, rows])) is None
