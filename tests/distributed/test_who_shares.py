"""What holds several ranks together is found by what they do, not by the class of the model."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ddp_steps import (
    EXACT,
    SGD,
    assert_equal_on_ranks,
    mean_loss,
    rows_of_rank,
    shard_losses,
    with_closure,
    with_contexts,
    with_loss_function,
    with_two_steps,
    wrap,
)
from oracle import sam_step_on_ranks
from problems import batches, largest_difference, losses_of, mlp
from sharding import mesh_of, shard, tensor_parallel
from torch.distributed._composable.replicate import replicate
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from fastsam import ESAM, MSAM, SAM

WAYS = [with_loss_function, with_closure, with_contexts, with_two_steps]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("way", "sync", "options"),
    [
        (with_loss_function, "global", {"static_graph": True}),
        (with_loss_function, "replica", {"gradient_as_bucket_view": True}),
        (with_closure, "global", {"gradient_as_bucket_view": True}),
        (with_closure, "replica", {}),
        (with_contexts, "global", {}),
        (with_contexts, "replica", {"static_graph": True}),
        (with_two_steps, "global", {"gradient_as_bucket_view": True}),
    ],
)
def test_replicate_is_ddp(way, sync, options):
    expected, model = mlp(), replicate(mlp(), **options)
    base = torch.optim.SGD(expected.parameters(), **SGD)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=model, perturb_sync=sync, **SGD)
    for x, y in batches(4):
        way(opt, model, *rows_of_rank((x, y)))
        sam_step_on_ranks(expected, shard_losses(expected, x, y), base, 0.1, 2 if sync == "global" else 1)
        assert_equal_on_ranks(model.parameters())
    assert largest_difference(model, expected) < EXACT


@pytest.mark.ranks(2)
def test_replicate_accumulates_and_refuses_as_ddp_does():
    model = replicate(mlp())
    opt = SAM(model.parameters(), torch.optim.SGD, model=model, **SGD)
    batch = rows_of_rank(batches(1)[0])
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match=r"inside no_sync\(\)"):
        opt.step(losses_of(model), *batch)
    for i in range(2):
        model.set_requires_gradient_sync(i == 1)
        with opt.ascent():
            mean_loss(model, *batch).backward()
        assert_equal_on_ranks(opt._run.ascent_grads, "gradients") if i else None
        with opt.descent():
            mean_loss(model, *batch).backward()
    opt.step()
    assert_equal_on_ranks(model.parameters())


@pytest.mark.ranks(2)
def test_msam_takes_replicas_under_ddp_and_the_whole_elsewhere():
    batch = rows_of_rank(batches(1)[0])
    for model, sync in ((wrap(mlp()), "replica"), (replicate(mlp()), "replica"), (shard(mlp()), "global")):
        for cls, options in ((MSAM, {"num_shards": 2}), (SAM, {}), (ESAM, {})):
            opt = cls(model.parameters(), torch.optim.SGD, model=model, lr=0.0, **options)
            opt.step(losses_of(model), *batch)
            assert opt._run.parallel_model.perturb_sync == (sync if cls is MSAM else "global")


def reduced_by_hand(opt, model, x, y):
    """As Horovod does it, and those who write their own data parallelism."""
    for context in (opt.ascent, opt.descent):
        with context():
            mean_loss(model, x, y).backward()
            for p in model.parameters():
                dist.all_reduce(p.grad, dist.ReduceOp.AVG if dist.get_backend() != "gloo" else dist.ReduceOp.SUM)
                p.grad /= dist.get_world_size()
    opt.step()
    opt.zero_grad()


def by_ddp_that_is_not_told(opt, model, x, y):
    ddp = model.__dict__.setdefault("wrapper", [DistributedDataParallel(model)])[0]
    with_contexts(opt, ddp, x, y)


def by_the_first_rank_alone(opt, model, x, y):
    """Where a learner trains, and the others act or serve data."""
    if dist.get_rank() == 0:
        with_contexts(opt, model, x, y)


def by_nobody(opt, model, x, y):
    with_contexts(opt, model, x, y)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("give_model", [False, True])
@pytest.mark.parametrize("way", [reduced_by_hand, by_ddp_that_is_not_told, by_the_first_rank_alone, by_nobody])
def test_only_gradients_that_differ_are_told_of(way, give_model):
    # optimizers are told apart by their shapes and their number, which is another where one rank alone has one
    model = mlp(batchnorm=way is by_the_first_rank_alone)
    opt = SAM(model.parameters(), torch.optim.SGD, model=model if give_model else None, **SGD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches(5):
            way(opt, model, *rows_of_rank(batch))
            dist.barrier()
    texts = [str(w.message) for w in caught]
    assert len(texts) == (way is by_nobody), texts
    assert all("differ between ranks: their norm is" in text for text in texts)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("wrapper", ["ddp", "replicate", "fully_shard", "unknown"])
@pytest.mark.parametrize(("cls", "dtype"), [(ESAM, torch.float64), (SAM, torch.bfloat16)])
def test_a_seed_of_each_rank_is_refused_by_methods_that_draw(wrapper, cls, dtype):
    model = mlp().to(dtype)
    wrapped = {"ddp": wrap, "replicate": replicate, "fully_shard": shard, "unknown": lambda model: model}[wrapper](
        model
    )
    before = [p.detach().clone() for p in model.parameters()]
    opt = cls(wrapped.parameters(), torch.optim.SGD, model=wrapped, seed=dist.get_rank(), lr=0.1)
    x, y = rows_of_rank(batches(1)[0])
    told = ""
    try:
        opt.step(losses_of(wrapped), x.to(dtype), y)
    except ValueError as error:
        told = str(error)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, told)
    # the store tells the later of the two alone
    assert all(found) if wrapper != "unknown" else any(found)
    for text in filter(None, found):
        assert "seed=" in text
        assert "Pass the same seed on all ranks, not the rank's own" in text
    if told:
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.ranks(2)
def test_a_seed_of_each_rank_is_nothing_to_a_method_that_does_not_draw():
    ddp = wrap(mlp())
    opt = SAM(ddp.parameters(), torch.optim.SGD, model=ddp, seed=dist.get_rank(), lr=0.1)
    opt.step(losses_of(ddp), *rows_of_rank(batches(1)[0]))
    assert_equal_on_ranks(ddp.parameters())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", WAYS)
def test_stages_of_a_pipeline_are_refused(way):
    """Wrapped for data parallelism or not; a pipeline whose stages are all here has its norm."""
    rank, world = dist.get_rank(), dist.get_world_size()
    part = mlp()
    stage = PipelineStage(part, rank, world, torch.device("cpu"))
    opt = SAM(part.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=f"pipeline stage {rank} of {world}.*FSDP2.* or DistributedDataParallel"):
        way(opt, stage.submod, *batches(1)[0])


@pytest.mark.ranks(2)
def test_modules_that_are_copied_among_other_ranks_are_refused():
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = torch.nn.ModuleList([wrap(mlp()), wrap(mlp(), process_group=alone)])
    opt = SAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)
    with pytest.raises(ValueError, match=r"over the ranks .* and \(0, 1\)|over the ranks \(0, 1\) and"):
        opt.step(losses_of(model[0]), *batches(1)[0])


@pytest.mark.ranks(4)
@pytest.mark.parametrize("how", ["ddp", "replicate"])
def test_tensor_parallel_weights_below_ddp_are_refused(how):
    mesh, model = mesh_of(2, 2, names=("data", "tensor")), mlp()
    tensor_parallel(model, mesh["tensor"])
    if how == "ddp":
        ddp = DistributedDataParallel(model, device_mesh=mesh["data"])
        with pytest.raises(ValueError, match=r"this rank's part of a tensor parallel weight.*FSDP2"):
            SAM(ddp.parameters(), torch.optim.SGD, model=ddp, lr=0.1)
        return
    replicate(model, device_mesh=mesh["data"])
    opt = SAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)
    with pytest.raises(ValueError, match=r"turns a tensor parallel weight.*FSDP2"):
        opt.step(losses_of(model), *batches(1)[0])
