"""Cases with sharded weights: fully_shard (FSDP2), hybrid and tensor parallel meshes; see distributed_worker.py."""

import math
import warnings
from functools import partial
from math import prod

import distributed_worker
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_worker import assert_equal_on_ranks, case, rows_of_rank
from distributed_worker_ddp import (
    EXACT,
    SGD,
    mean_loss,
    pairs_of_all_ranks,
    with_accumulation_synced,
    with_closure,
    with_contexts,
    with_loss_function,
    with_synced_pairs,
    with_two_steps,
)
from oracle import sam_step, sam_step_on_ranks
from problems import batches, losses_of, mlp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import fastsam
from fastsam import ESAM, MSAM, SAM
from fastsam.distributed.dtensor import first_element

ADAMW = {"lr": 0.01, "weight_decay": 0.1}
BASES = {
    "sgd": (torch.optim.SGD, SGD),
    "adamw": (torch.optim.AdamW, ADAMW),
    "amsgrad foreach": (torch.optim.AdamW, {**ADAMW, "amsgrad": True, "foreach": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def mesh_of(*sizes, names=("shard",)):
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


def shard(model, mesh=None, **options):
    mesh = mesh or mesh_of()
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def gathered(model):
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def error_of(model, expected):
    return max((p - q).abs().max().item() for p, q in zip(gathered(model), expected.parameters(), strict=True))


def train_and_compare(way, base="sgd", adaptive=False, mesh=None, prepare=shard, steps=5, **options):
    cls, keywords = BASES[base]
    expected, model = mlp(), mlp()
    base_opt = cls(expected.parameters(), **keywords)
    prepare(model, mesh, **options)
    opt = SAM(model.parameters(), cls, 0.1, adaptive, model=model, **keywords)
    for x, y in batches(steps):
        mine = rows_of_rank((x, y)) if prepare is shard else (x, y)
        way(opt, model, *mine)
        sam_step(expected, partial(mean_loss, expected, x, y), base_opt, 0.1, adaptive)
        assert_equal_on_ranks(gathered(model))
    error = error_of(model, expected)
    assert error < EXACT, error
    assert error_of(model, mlp()) > 1e-2, "nothing was trained"
    return model


WAYS = [with_loss_function, with_closure, with_contexts, with_two_steps, with_accumulation_synced]


@case(*[(way, base) for way in WAYS for base in ("sgd", "adamw")])
def sharded(way, base):
    for reshard_after_forward in (True, False):
        train_and_compare(way, base, reshard_after_forward=reshard_after_forward)


@case()
def sharded_with_other_bases_and_asam():
    for base in BASES:
        train_and_compare(with_loss_function, base, adaptive=True, steps=3)


@case(("torch",), ("triton",))
def sharded_on_backend(name):
    fastsam.set_backend(name)
    try:
        train_and_compare(with_loss_function, "sgd", steps=2)
        train_and_compare(with_contexts, "adamw", adaptive=True, steps=2)
    finally:
        fastsam.set_backend(None)


@case()
def sharded_gradients_may_be_kept_and_zeroed():
    def with_zeroed_gradients(opt, model, x, y, set_to_none=True):
        mean_loss(model, x, y).backward()
        opt.first_step()
        opt.zero_grad(set_to_none=False)
        mean_loss(model, x, y).backward()
        opt.second_step()
        opt.zero_grad(set_to_none=False)

    train_and_compare(with_zeroed_gradients)
    train_and_compare(partial(with_contexts, set_to_none=False))


@case(("contexts",), ("msam",))
def sharded_pairs(way):
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


@case()
def gathered_copies_follow_the_weights():
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


@case(("masked",), ("full",))
def sharded_esam(norm):
    """The tensor mask is SAM's as on one process; with all rows selected so is the step."""
    expected, model = mlp(), mlp()
    keywords = {"beta": 0.4, "gamma": 1.0, "norm": norm, **SGD}
    empty = 0
    shard(model)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **keywords)
    alone = ESAM(expected.parameters(), torch.optim.SGD, 0.1, **keywords)
    for x, y in batches(12):
        empty += not any(opt._kept())
        opt.step(losses_of(model), *rows_of_rank((x, y)))
        alone.step(losses_of(expected), x, y)
    assert empty, "no step without a perturbation, which takes a way of its own"
    assert error_of(model, expected) < EXACT


def element_masked_step(opt, model, x, y):
    """Take a step; which entries its perturbation moved."""
    before = [p.clone() for p in gathered(model)]
    with opt.ascent():
        mean_loss(model, x, y).backward()
    with opt.descent():
        moved = torch.cat([(p != b).flatten() for p, b in zip(gathered(model), before, strict=True)])
        mean_loss(model, x, y).backward()
    opt.step()
    opt.zero_grad()
    return moved


def element_masks(norm, backend, mesh=None):
    """The element mask is that of one process, bit for bit, and so is the step but for the order of sums."""
    fastsam.set_backend(backend)
    expected, model = mlp(), mlp()
    keywords = {"beta": 0.4, "gamma": 1.0, "mask": "element", "norm": norm, **SGD}
    shard(model, mesh)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **keywords)
    alone = ESAM(expected.parameters(), torch.optim.SGD, 0.1, **keywords)
    try:
        for x, y in batches(4):
            moved = element_masked_step(opt, model, *rows_of_rank((x, y)))
            assert torch.equal(moved, element_masked_step(alone, expected, x, y))
            assert 0.2 < moved.double().mean() < 0.6
    finally:
        fastsam.set_backend(None)
    assert error_of(model, expected) < EXACT


MASKS = [("masked", "torch"), ("masked", "triton"), ("full", "torch"), ("estimated", "torch")]


@case(*MASKS)
@case(*MASKS, world=4)
def sharded_element_masks(norm, backend):
    element_masks(norm, backend)


@case(world=4)
def element_masks_with_hybrid_sharding():
    element_masks("masked", "torch", mesh_of(2, 2, names=("copy", "shard")))


@case()
def sharded_esam_selects_rows_of_each_rank():
    expected, model = mlp(), mlp()
    shard(model, reshard_after_forward=False)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, beta=1.0, gamma=0.5, model=model, **SGD)
    base = torch.optim.SGD(expected.parameters(), **SGD)
    losses = losses_of(expected)
    for x, y in batches(4):
        opt.step(losses_of(model), *rows_of_rank((x, y)))
        w = [p.detach().clone() for p in expected.parameters()]
        before = losses(x, y)
        g = torch.autograd.grad(before.mean(), list(expected.parameters()))
        norm = torch.sqrt(sum((gi**2).sum() for gi in g))
        with torch.no_grad():
            for p, gi in zip(expected.parameters(), g, strict=True):
                p.add_(0.1 * gi / norm)
            delta = losses(x, y) - before
        rows = torch.cat([d.topk(3).indices + 6 * r for r, d in enumerate(delta.chunk(2))])
        mean_loss(expected, x[rows], y[rows]).backward()
        with torch.no_grad():
            for p, wi in zip(expected.parameters(), w, strict=True):
                p.copy_(wi)
        base.step()
        base.zero_grad()
    assert error_of(model, expected) < EXACT


@case()
def sharded_models_that_cannot_have_it():
    model = mlp()
    shard(model)
    for given in (model, None):
        with pytest.raises(ValueError, match="these are sharded"):
            SAM(model.parameters(), torch.optim.SGD, model=given, perturb_sync="replica", lr=0.1)
    with pytest.raises(ValueError, match="Partial"):
        SAM([nn.Parameter(DTensor.from_local(torch.ones(3), mesh_of(), [Partial()]))], torch.optim.SGD, lr=0.1)
    in_columns = mlp()
    tensor_parallel(in_columns, mesh_of())
    with pytest.raises(ValueError, match=r"whole rows of their weight, but one of shape \(3, 8\) lies .*dim=1"):
        ESAM(in_columns.parameters(), torch.optim.SGD, mask="element", lr=0.1)
    opt = ESAM(in_columns[0].parameters(), torch.optim.SGD, mask="element", lr=0.1)
    with pytest.raises(ValueError, match="whole rows"):
        opt.add_param_group({"params": in_columns[2].weight})


@case()
def sharded_bad_gradient_skips_everywhere():
    model = mlp()
    shard(model)
    opt = SAM(model.parameters(), torch.optim.AdamW, 0.1, model=model, **ADAMW)
    for i, (x, y) in enumerate(batches(3)):
        before = [p.clone() for p in gathered(model)]
        mine = rows_of_rank((x, y))
        opt.step(losses_of(model), *mine)
        assert_equal_on_ranks([*gathered(model), opt.skipped_steps, opt.last_grad_norm])
        if i == 0:  # an infinite entry of one rank's shard alone
            with opt.ascent():
                mean_loss(model, *mine).backward()
            with opt.descent():
                mean_loss(model, *mine).backward()
            before = [p.clone() for p in gathered(model)]
            if dist.get_rank() == 1:
                model[0].weight.grad.to_local()[0, 0] = math.inf
            opt.step()
            opt.zero_grad()
            assert all(torch.equal(p, b) for p, b in zip(gathered(model), before, strict=True))
        else:
            assert not any(torch.equal(p, b) for p, b in zip(gathered(model), before, strict=True))
    assert int(opt.skipped_steps) == 1


@case(("step",), ("contexts",))
def sharded_loss_scaling(way):
    expected, model = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    shard(model)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, (x, y) in enumerate(batches(5)):
        mx, my = rows_of_rank((x, y))
        if i == 2 and dist.get_rank() == 1:
            mx = mx * math.inf
        if way == "step":
            opt.step(losses_of(model), mx, my, scaler=scaler, clip_grad_norm=1e6)
        else:
            for context in (opt.ascent, opt.descent):
                with context():
                    scaler.scale(mean_loss(model, mx, my)).backward()
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
        if i != 2:
            sam_step(expected, partial(mean_loss, expected, x, y), base, 0.1)
        assert_equal_on_ranks(gathered(model))
    assert scaler.get_scale() == 2.0**9
    assert int(opt.skipped_steps) == 1
    assert error_of(model, expected) < EXACT


@case()
def sharded_rounding_is_stochastic_and_comes_back():
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


@case(("torch",), ("triton",))
@case(("torch",), ("triton",), world=4)
def shards_round_as_the_whole_does(backend):
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
        SAM(model.parameters(), torch.optim.SGD, 0.01, model=model, lr=0.1, **options).first_step()
        return gathered(model)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* processes run, but model is a plain")
            whole, nearest = perturbed(), perturbed(stochastic_rounding=False)
        assert all(map(torch.equal, perturbed(shard), whole))
        assert not torch.equal(whole[0], nearest[0])
    finally:
        fastsam.set_backend(None)


@case()
def shards_of_columns_round_by_numbers_of_their_own():
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


@case(world=4)
def first_elements_of_shards():
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


# checkpoints across numbers of processes


def ignoring_one_process(function):
    def quietly(*args, **options):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            return function(*args, **options)

    return quietly


def train(model, opt, data, pick=lambda batch: batch):
    for batch in data:
        opt.step(losses_of(model), *pick(batch))


def optimizer_of(model):
    return ESAM(model.parameters(), torch.optim.AdamW, 0.1, beta=0.5, gamma=1.0, **ADAMW)


@ignoring_one_process
def save(model, opt, folder, **options):
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, **options)


@ignoring_one_process
def load(model, opt, folder, **options):
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, **options)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)


def whole_run():
    """Six steps on one process, without a checkpoint."""
    model = mlp()
    train(model, optimizer_of(model), batches(6))
    return model


def save_from_one_process(folder):
    model = mlp()
    opt = optimizer_of(model)
    train(model, opt, batches(6)[:3])
    save(model, opt, folder / "from one", no_dist=True)


def load_into_one_process(folder):
    model = mlp()
    opt = optimizer_of(model)
    load(model, opt, folder / "from two", no_dist=True)
    train(model, opt, batches(6)[3:])
    return model


@case()
def checkpoint_from_two_processes():
    model = mlp()
    shard(model)
    opt = optimizer_of(model)
    train(model, opt, batches(6)[:3], rows_of_rank)
    save(model, opt, distributed_worker.FOLDER / "from two")
    train(model, opt, batches(6)[3:], rows_of_rank)
    assert error_of(model, whole_run()) < EXACT


@case()
def checkpoint_from_one_process_continues_on_two():
    model = mlp(seed=5)
    shard(model)
    opt = optimizer_of(model)
    load(model, opt, distributed_worker.FOLDER / "from one")
    train(model, opt, batches(6)[3:], rows_of_rank)
    assert error_of(model, whole_run()) < EXACT


# meshes of two dimensions


@case(*[(way,) for way in WAYS[:4]], world=4)
def hybrid_sharding(way):
    train_and_compare(way, mesh=mesh_of(2, 2, names=("copy", "shard")))


def tensor_parallel(model, mesh):
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@case(world=2)
def tensor_parallel_weights():
    """Split and copied tensors in one norm: the last layer's bias lies whole on both ranks."""
    model = train_and_compare(with_contexts, mesh=mesh_of(), prepare=tensor_parallel)
    train_and_compare(with_loss_function, "adamw", mesh=mesh_of(), prepare=tensor_parallel)
    placements = {p.placements[0].is_shard() for p in model.parameters()}
    assert placements == {True, False}


@case()
def gradients_that_are_sums_over_ranks():
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


@case(world=4)
def sharded_tensor_parallel_weights():
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
