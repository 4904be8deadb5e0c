"""SAM and mSAM of sharded weights (FSDP2), hybrid and tensor parallel meshes take the step of one process."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_steps import (
    EXACT,
    SGD,
    assert_equal_on_ranks,
    mean_loss,
    pairs_of_all_ranks,
    rows_of_rank,
    with_accumulation_synced,
    with_closure,
    with_contexts,
    with_loss_function,
    with_synced_pairs,
    with_two_steps,
)
from oracle import sam_step, sam_step_on_ranks
from problems import batches, mlp
from sharding import BASES, error_of, gathered, mesh_of, shard, tensor_parallel, train_and_compare
from torch import nn
from torch.distributed.tensor import DTensor, Partial

import fastsam
from fastsam import ESAM, MSAM, SAM

WAYS = [with_loss_function, with_closure, with_contexts, with_two_steps, with_accumulation_synced]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_sharded(way, base):
    for reshard_after_forward in (True, False):
        train_and_compare(way, base, reshard_after_forward=reshard_after_forward)


@pytest.mark.ranks(2)
def test_sharded_with_other_bases_and_asam():
    for base in BASES:
        train_and_compare(with_loss_function, base, adaptive=True, steps=3)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_sharded_on_backend(name):
    fastsam.set_backend(name)
    try:
        train_and_compare(with_loss_function, "sgd", steps=2)
        train_and_compare(with_contexts, "adamw", adaptive=True, steps=2)
    finally:
        fastsam.set_backend(None)


@pytest.mark.ranks(2)
def test_sharded_gradients_may_be_kept_and_zeroed():
    def with_zeroed_gradients(opt, model, x, y, set_to_none=True):
        mean_loss(model, x, y).backward()
        opt.first_step()
        opt.zero_grad(set_to_none=False)
        mean_loss(model, x, y).backward()
        opt.second_step()
        opt.zero_grad(set_to_none=False)

    train_and_compare(with_zeroed_gradients)
    train_and_compare(partial(with_contexts, set_to_none=False))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["contexts", "msam"])
def test_sharded_pairs(way):
    expected, model = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    shard(model)
    method = partial(MSAM, num_shards=3) if way == "msam" else SAM
    opt = method(model.parameters(), torch.optim.SGD, 0.1, model=model, **SGD)
    for x, y in batches(4):
        step = with_loss_function if way == "msam" else with_synced_pairs
        step(opt, model, *rows_of_rank((x, y)))
        losses = [[partial(mean_loss, expected, *pair)] for pair in pairs_of_all_ranks(x, y)]
        sam_step_on_ranks(expected, losses, base, 0.1)
    assert error_of(model, expected) < EXACT


@pytest.mark.ranks(2)
def test_gathered_copies_follow_the_weights():
    """A forward without a backward leaves FSDP2's gathered weights in memory, where edits of the shards do not show."""
    expected, model = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    shard(model, reshard_after_forward=False)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **SGD)

    def look(at):
        with torch.no_grad():
            return at(batches(1)[0][0])

    for x, y in batches(3):
        mine = rows_of_rank((x, y))
        look(model)
        with opt.ascent():
            mean_loss(model, *mine).backward()
            look(model)
        with opt.descent():
            perturbed = look(model)
            mean_loss(model, *mine).backward()
            look(model)
        assert torch.allclose(look(model), look(expected), rtol=0, atol=EXACT)
        assert not torch.allclose(perturbed, look(model), rtol=0, atol=1e-4)
        opt.step()
        opt.zero_grad()
        sam_step(expected, partial(mean_loss, expected, x, y), base, 0.1)
        assert torch.allclose(look(model), look(expected), rtol=0, atol=EXACT)


@pytest.mark.ranks(2)
def test_sharded_models_that_cannot_have_it():
    model = mlp()
    shard(model)
    for given in (model, None):
        opt = SAM(model.parameters(), torch.optim.SGD, model=given, perturb_sync="replica", lr=0.1)
        with pytest.raises(ValueError, match="these are sharded"):
            with_loss_function(opt, model, *batches(1)[0])
    with pytest.raises(ValueError, match="Partial"):
        SAM([nn.Parameter(DTensor.from_local(torch.ones(3), mesh_of(), [Partial()]))], torch.optim.SGD, lr=0.1)
    in_columns = mlp()
    tensor_parallel(in_columns, mesh_of())
    with pytest.raises(ValueError, match=r"whole rows of their weight, but one of shape \(3, 8\) lies .*dim=1"):
        ESAM(in_columns.parameters(), torch.optim.SGD, mask="element", lr=0.1)
    opt = ESAM(in_columns[0].parameters(), torch.optim.SGD, mask="element", lr=0.1)
    with pytest.raises(ValueError, match="whole rows"):
        opt.add_param_group({"params": in_columns[2].weight})


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", WAYS[:4])
def test_gradients_that_fsdp_keeps_to_itself_are_refused(way):
    """It would add the ascent's to the descent's, and nothing would be perturbed."""
    model, batch = mlp(), rows_of_rank(batches(1)[0])
    shard(model)
    opt = SAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match=r"set_requires_gradient_sync\(False\).*to accumulate, run a pair"):
        way(opt, model, *batch)
    fresh = mlp()
    shard(fresh)
    opt = SAM(fresh.parameters(), torch.optim.SGD, model=fresh, lr=0.1)
    way(opt, fresh, *batch)
    assert_equal_on_ranks(gathered(fresh))


@pytest.mark.ranks(4)
@pytest.mark.parametrize("way", WAYS[:4])
def test_hybrid_sharding(way):
    train_and_compare(way, mesh=mesh_of(2, 2, names=("copy", "shard")))


@pytest.mark.ranks(2)
def test_tensor_parallel_weights():
    """Split and copied tensors in one norm: the last layer's bias lies whole on both ranks."""
    model = train_and_compare(with_contexts, mesh=mesh_of(), prepare=tensor_parallel)
    train_and_compare(with_loss_function, "adamw", mesh=mesh_of(), prepare=tensor_parallel)
    placements = {p.placements[0].is_shard() for p in model.parameters()}
    assert placements == {True, False}


@pytest.mark.ranks(2)
def test_gradients_that_are_sums_over_ranks():
    """Tensor parallel layers may leave the gradient of a copied weight in parts on the ranks."""

    def in_parts(grad):
        return DTensor.from_local(grad.to_local() * (dist.get_rank() + 1) / 3, grad.device_mesh, [Partial()])

    expected, model = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    tensor_parallel(model, mesh_of())
    bias = model[2].bias
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **SGD)
    for x, y in batches(3):
        for context in (opt.ascent, opt.descent):
            with context():
                mean_loss(model, x, y).backward()
                bias.grad = in_parts(bias.grad)
        opt.step()
        opt.zero_grad()
        sam_step(expected, partial(mean_loss, expected, x, y), base, 0.1)
    assert error_of(model, expected) < EXACT


def tensor_and_data_parallel(model, mesh):
    tensor_parallel(model, mesh["tensor"])
    shard(model, mesh["shard"])


@pytest.mark.ranks(4)
def test_sharded_tensor_parallel_weights():
    mesh = mesh_of(2, 2, names=("shard", "tensor"))
    for way in (with_contexts, with_loss_function):
        expected, model = mlp(), mlp()
        base = torch.optim.SGD(expected.parameters(), **SGD)
        tensor_and_data_parallel(model, mesh)
        opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **SGD)
        for x, y in batches(4):
            half = mesh["shard"].get_local_rank()
            way(opt, model, x.chunk(2)[half], y.chunk(2)[half])
            sam_step(expected, partial(mean_loss, expected, x, y), base, 0.1)
        assert error_of(model, expected) < EXACT
        assert_equal_on_ranks([opt.last_grad_norm, *gathered(model)])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("p", [1.001, 3, float("inf")])
def test_other_norms_than_2_are_of_whole_weights(p):
    """Powers are summed over ranks, of entries over the largest on any of them."""
    model, other = mlp(), mlp()
    shard(model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, p=p, model=model, **SGD)
    one = SAM(other.parameters(), torch.optim.SGD, rho=0.1, p=p, model=other, **SGD)
    for x, y in batches(3):
        opt.step(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), *rows_of_rank((x, y)))
        one.step(lambda x, y: F.cross_entropy(other(x), y, reduction="none"), x, y)
        torch.testing.assert_close(opt.last_grad_norm, one.last_grad_norm)
        assert error_of(model, other) < EXACT


@pytest.mark.ranks(2)
def test_one_entry_of_sharded_weights_is_refused():
    model = mlp()
    shard(model)
    before = [p.clone() for p in gathered(model)]
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, p=1, model=model, **SGD)
    with pytest.raises(ValueError, match="p=1 perturbs one entry of all weights, but these are sharded"):
        opt.step(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), *rows_of_rank(batches(1)[0]))
    assert all(map(torch.equal, gathered(model), before))
