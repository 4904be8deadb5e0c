"""SAF: every sample is compared with its own logits of exactly `lag` epochs ago, and nothing else changes."""

import copy
import gc
import json
import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from host_reads import NoHostReads
from methods import divergence
from pairwise import pairwise
from problems import assert_same, batches, mlp, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam.trajectory.storage
from fastsam import ESAM, SAF, SAM, IndexedDataset
from fastsam.kernels import reference_common
from fastsam.trajectory import history as history_module
from fastsam.trajectory.history import History

SGD = torch.optim.SGD
N, C = 24, 3
X, Y = batches(1, rows=N)[0]
HISTORY_DTYPES = "torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8"


def saf(**keywords):
    return SAF(N, C, **{"lag": 2, "start_epoch": 2, "history_dtype": torch.float64, **keywords})


def order(epoch, rows=8, n=N):
    return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).split(rows)


def train(model, loss_of, epochs, opt=None, rows=8, before=lambda e: None):
    """Plain training; the loss of every step."""
    opt = opt or SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for epoch in epochs:
        before(epoch)
        for ids in order(epoch, rows):
            opt.zero_grad()
            loss = loss_of(model(X[ids]), Y[ids], ids)
            loss.backward()
            opt.step()
            losses.append(loss.detach().clone())
    return losses


class Remembers:
    """SAF by a dictionary, in plain torch."""

    def __init__(self, lam, lag, start_epoch, smoothing=0.0):
        self.lam, self.lag, self.start_epoch, self.smoothing = lam, lag, start_epoch, smoothing
        self.seen, self.epoch = {}, 1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __call__(self, z, y, ids):
        loss = F.cross_entropy(z, y, label_smoothing=self.smoothing)
        past = [self.seen.get((self.epoch - self.lag, i)) for i in ids.tolist()]
        if self.epoch > self.start_epoch and self.lam:
            found = [k for k, t in enumerate(past) if t is not None]
            if found:
                kl = divergence(torch.stack([past[k] for k in found]), z[found])
                loss = loss + self.lam * kl.sum() / len(ids)
        self.seen.update({(self.epoch, i): row for i, row in zip(ids.tolist(), z.detach(), strict=True)})
        return loss


STORAGES = ["device", "files", "copied"]


@pytest.fixture(params=STORAGES)
def storage(request, tmp_path, monkeypatch):
    """Where the records lie; "copied" copies them as between two devices."""
    if request.param == "copied":
        monkeypatch.setattr(History, "direct", property(lambda self: False))
    return tmp_path / "history" if request.param == "files" else "device"


# the loss


AXES = ["torch", "triton"], STORAGES, [1, 2, 3], [0.0, 0.1]


@pytest.mark.parametrize(("backend", "storage", "lag", "smoothing"), pairwise(*AXES), indirect=["backend", "storage"])
def test_training_equals_the_papers_equations(backend, storage, lag, smoothing):
    model, other = mlp(), mlp()
    ours = saf(lam=0.3, lag=lag, start_epoch=1, label_smoothing=smoothing, storage=storage)
    truth = Remembers(0.3, lag, 1, smoothing)
    got = train(model, ours, range(1, 7), before=ours.set_epoch)
    wanted = train(other, truth, range(1, 7), before=truth.set_epoch)
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=1e-12, atol=1e-12)
    assert max((p - q).abs().max() for p, q in zip(model.parameters(), other.parameters(), strict=True)) < 1e-11
    plain = train(mlp(), lambda z, y, ids: F.cross_entropy(z, y, label_smoothing=smoothing), range(1, 7))
    assert not torch.allclose(torch.stack(got), torch.stack(plain))  # the divergence does something


@pytest.mark.parametrize("keywords", [{"lam": 0.0}, {"start_epoch": 9}, {"start_epoch": 4}])
def test_an_inactive_loss_is_cross_entropy_bit_for_bit(backend, keywords):
    """docs/algorithms.md#invariant-12; start_epoch=4 is inactive in the fourth epoch still."""
    model, other = mlp(torch.float32, batchnorm=True), mlp(torch.float32, batchnorm=True)
    ours = saf(lag=1, **keywords)
    global_x = X.float()
    for epoch in range(1, 5):
        ours.set_epoch(epoch)
        for ids in order(epoch):
            for net, loss_of in (
                (model, lambda z, y, i: ours(z, y, i)),
                (other, lambda z, y, i: F.cross_entropy(z, y)),
            ):
                opt = SGD(net.parameters(), lr=0.1)
                opt.zero_grad()
                loss_of(net(global_x[ids]), Y[ids], ids).backward()
                opt.step()
    assert_same(model, snapshot(other))


def test_the_divergence_begins_after_start_epoch_and_with_a_record_of_exactly_lag_epochs_ago(backend):
    """docs/algorithms.md#r-24, docs/algorithms.md#invariant-23."""
    z, ids = torch.randn(4, C, dtype=torch.float64), torch.arange(4)
    ours, y = saf(lag=2, start_epoch=2, lam=0.3), Y[:4]
    values = []
    for epoch in (1, 2, 3, 4, 6, 7, 8):
        ours.set_epoch(epoch)
        values.append(float(ours(z * epoch, y, ids)) - float(F.cross_entropy(z * epoch, y)))
    kl = [float(0.3 * divergence(z * (e - 2), z * e).mean()) for e in (3, 4, 6, 7, 8)]
    # epoch 5 was passed over, so epoch 7 has no past, though its slot holds epoch 3
    assert values == pytest.approx([0, 0, kl[0], kl[1], kl[2], 0, kl[4]], abs=1e-12)
    assert min(kl) > 1e-3


def test_without_learning_or_batch_norm_nothing_diverges(backend):
    """docs/algorithms.md#invariant-24."""
    model, ours = mlp(), saf(lag=1, start_epoch=0, lam=1.0)
    for epoch in range(1, 4):
        ours.set_epoch(epoch)
        for ids in order(epoch):
            z = model(X[ids]).detach()
            assert float(ours(z, Y[ids], ids) - F.cross_entropy(z, Y[ids])) == pytest.approx(0, abs=1e-14)


def test_a_shuffled_loader_does_not_change_what_a_sample_meets(backend):
    model, results = mlp(), []
    for seeds in ((1, 2, 3), (4, 5, 6)):
        ours = saf(lag=1, start_epoch=0, lam=1.0, reduction="none")
        for epoch, seed in enumerate(seeds, 1):
            ours.set_epoch(epoch)
            rows = torch.zeros(N, dtype=torch.float64)
            for ids in order(seed):
                rows[ids] = ours(model(X[ids]) * epoch, Y[ids], ids).detach()
        results.append(rows)
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gradient_for_any_grad_output(backend, reduction, dtype):
    ours = saf(lag=1, start_epoch=0, lam=0.7, reduction=reduction, label_smoothing=0.1)
    ids, y = torch.arange(6), torch.tensor([0, 1, 2, -100, 1, 0])
    t, z = (torch.randn(6, C, dtype=torch.float64).to(dtype) for _ in range(2))
    ours(t, y, ids)
    ours.set_epoch(2)
    got, wanted = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = ours(got, y, ids)
    counts = y != -100
    rows = F.cross_entropy(wanted, y, reduction="none", label_smoothing=0.1) + 0.7 * divergence(t, wanted) * counts
    truth = {"mean": rows.sum() / 5, "sum": rows.sum(), "none": rows}[reduction]
    factor = torch.linspace(1, 2, 6, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0).double()
    loss.backward(factor.to(loss.dtype))
    truth.backward(factor)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert got.grad.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5 if dtype != torch.float64 else 1e-13, atol=1e-5)
    torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=tolerance, atol=tolerance)
    assert not got.grad[3].any()


def test_a_loss_scale_beyond_half_precision_survives(backend):
    ours = saf(lag=1, start_epoch=0, reduction="sum")
    z = torch.randn(4, C).half().requires_grad_()
    ours(z, Y[:4], torch.arange(4))
    ours.set_epoch(2)
    (ours(z, Y[:4], torch.arange(4)) * 2.0**-17).backward(torch.tensor(2.0**18))
    assert torch.isfinite(z.grad).all()


def test_class_probabilities_are_mixups_targets(backend):
    ours = saf(lag=1, start_epoch=0, lam=0.5)
    ids, z, t = torch.arange(5), torch.randn(5, C, dtype=torch.float64), torch.randn(5, C, dtype=torch.float64)
    y = torch.rand(5, C, dtype=torch.float64)
    ours(t, y, ids)
    ours.set_epoch(2)
    torch.testing.assert_close(ours(z, y, ids), F.cross_entropy(z, y) + 0.5 * divergence(t, z).mean())


def test_tau_squared_may_be_left_out(backend):
    ids, z, t = torch.arange(5), torch.randn(5, C, dtype=torch.float64), torch.randn(5, C, dtype=torch.float64)
    ours = saf(lag=1, start_epoch=0, lam=0.5, tau=2.0, tau_squared=False)
    ours(t, Y[:5], ids)
    ours.set_epoch(2)
    wanted = F.cross_entropy(z, Y[:5]) + 0.5 / 4 * divergence(t, z, 2.0).mean()
    torch.testing.assert_close(ours(z, Y[:5], ids), wanted)


# records


def test_ignored_rows_are_not_recorded_and_late_samples_join(backend, storage):
    ours = saf(lag=1, start_epoch=0, lam=1.0, storage=storage, reduction="none")
    z = torch.randn(4, C, dtype=torch.float64)
    ids, y = torch.arange(4), torch.tensor([0, -100, 1, 2])
    ours(z, y, ids)
    ours.set_epoch(2)
    rows = ours(2 * z, torch.tensor([0, 1, 1, 2]), ids)
    kl = divergence(z, 2 * z)
    kl[1] = 0  # ignored an epoch ago
    torch.testing.assert_close(rows, F.cross_entropy(2 * z, torch.tensor([0, 1, 1, 2]), reduction="none") + kl)


def test_of_two_rows_of_one_sample_the_first_is_recorded_and_both_have_a_past(backend, storage):
    """Also where the epoch meets the sample again in a later batch, whose record is then the epoch's."""
    ours = saf(lag=1, start_epoch=0, lam=1.0, storage=storage, reduction="none")
    z = torch.randn(3, C, dtype=torch.float64)
    ours(z, Y[:3], torch.tensor([5, 5, 6]))
    ours.set_epoch(2)
    rows = ours(2 * z, Y[:3], torch.tensor([6, 5, 5]))
    cross = F.cross_entropy(2 * z, Y[:3], reduction="none")
    past = z[[2, 0, 0]]
    torch.testing.assert_close(rows, cross + divergence(past, 2 * z))
    again = ours(3 * z, Y[:3], torch.tensor([6, 5, 5]))
    torch.testing.assert_close(again, F.cross_entropy(3 * z, Y[:3], reduction="none") + divergence(past, 3 * z))
    ours.set_epoch(3)
    last = ours(z[:2], Y[:2], torch.tensor([5, 6]))
    kl = divergence(3 * z[[1, 0]], z[:2])
    torch.testing.assert_close(last, F.cross_entropy(z[:2], Y[:2], reduction="none") + kl)


def test_the_last_partial_batch_and_dropped_samples(backend, storage):
    """drop_last leaves samples out: they have no past `lag` epochs later, the others do."""
    model, other = mlp(), mlp()
    ours, truth = saf(lam=1.0, lag=1, start_epoch=0, storage=storage), Remembers(1.0, 1, 0)
    for net, loss in ((model, ours), (other, truth)):
        opt = SGD(net.parameters(), lr=0.5)
        for epoch in range(1, 5):
            loss.set_epoch(epoch)
            parts = order(epoch, 7)  # 7, 7, 7, 3
            for ids in parts[:-1] if epoch % 2 else parts:
                opt.zero_grad()
                loss(net(X[ids]), Y[ids], ids).backward()
                opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_a_compact_record_is_a_rounded_one(backend, storage, dtype):
    ours = saf(lag=1, start_epoch=0, lam=1.0, storage=storage, history_dtype=dtype)
    z, t, ids = 3 * torch.randn(6, C, dtype=torch.float64), 3 * torch.randn(6, C, dtype=torch.float64), torch.arange(6)
    ours(t, Y[:6], ids)
    ours.set_epoch(2)
    scale = t.abs().amax(1, keepdim=True).float() / 127
    kept = (t.float() / scale).round() * scale if dtype == torch.int8 else t.to(dtype)
    wanted = F.cross_entropy(z, Y[:6]) + divergence(kept.double(), z).mean()
    torch.testing.assert_close(ours(z, Y[:6], ids), wanted, rtol=1e-6, atol=1e-7)


def test_records_fetched_ahead_are_those_fetched_late(backend, monkeypatch):
    monkeypatch.setattr(History, "direct", property(lambda self: False))
    results = []
    for ahead in (False, True):
        ours, model = saf(lag=1, start_epoch=0, lam=1.0), mlp()
        losses = []
        for epoch in range(1, 4):
            ours.set_epoch(epoch)
            parts = order(epoch)
            for i, ids in enumerate(parts):
                losses.append(ours(model(X[ids]) * epoch, Y[ids], ids).detach())
                if ahead and i + 1 < len(parts):
                    ours.prefetch(parts[i + 1])
                    assert ours._history._prefetched is not None or not ours.active
        results.append(torch.stack(losses))
    assert torch.equal(*results)


def test_a_row_recorded_after_it_was_fetched_has_no_past(backend, monkeypatch):
    monkeypatch.setattr(History, "direct", property(lambda self: False))
    results, z = [], torch.randn(4, C, dtype=torch.float64)
    for ahead in (False, True):
        ours = saf(lag=1, start_epoch=0, lam=1.0)
        ids = torch.arange(4)
        ours(z, Y[:4], ids)
        ours.set_epoch(2)
        if ahead:
            ours.prefetch(ids)
        ours(2 * z, Y[:4], torch.tensor([3, 9, 10, 11]))  # sample 3 has been met in this epoch now
        results.append(ours(3 * z, Y[:4], ids))
    assert torch.equal(*results)


class InterruptAt(TorchDispatchMode):
    """Raises KeyboardInterrupt before the given operation that writes into a tensor by index."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::index_copy_", "aten::index_fill_"):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
@pytest.mark.parametrize("target", [1, -100])
def test_an_interrupted_write_leaves_no_past(choose, storage, dtype, target):
    choose("torch")
    old, new, ids = torch.randn(4, C, dtype=torch.float64), torch.randn(4, C, dtype=torch.float64), torch.arange(4)
    y = torch.tensor([0, target, 2, 0])
    ours = saf(lag=1, start_epoch=0, lam=1.0, storage=storage, history_dtype=dtype, device="cpu")
    ours(old, Y[:4], ids)
    whole = {k: v.clone() for k, v in ours.state_dict()["_extra_state"]["history"].items()}
    interrupted = 0
    for number in range(20):
        ours.set_epoch(1)
        ours._history.load_state_dict(whole)
        ours.set_epoch(3)  # whose records take the place of epoch 1's
        try:
            with InterruptAt(number):
                ours(new, y, ids)
                ours._history.flush()
        except KeyboardInterrupt:
            interrupted += 1
        tags = ours._history._fields["tags"][1, :4]
        for row in range(4):
            for name in ("records", "scales"):
                field = ours._history._fields.get(name)
                if field is not None and tags[row] == 1:  # still those of epoch 1
                    assert torch.equal(field[1, row], whole[name][1, row])
    assert interrupted >= 3


# memory


def test_memory_is_announced_before_it_is_taken(caplog):
    with caplog.at_level(logging.INFO, logger="fastsam"):
        ours = saf(device="cpu", history_dtype=torch.float16)
    assert "3 x 24 x 3 logits in float16" in caplog.text
    taken = sum(field.untyped_storage().nbytes() for field in ours._history._fields.values())
    assert taken == ours.memory_bytes


def test_memory_scales_as_it_says():
    """ImageNet at lag 3 in float16 takes 10.3 GB; a thousandth of its samples is really allocated."""
    small = SAF(1281, 1000, device="cpu")
    taken = sum(field.untyped_storage().nbytes() for field in small._history._fields.values())
    assert taken == small.memory_bytes
    whole = SAF(1281167, 1000).memory_bytes
    assert whole == pytest.approx(taken * 1281168 / 1282, rel=1e-9)
    assert whole < 10.28e9
    assert SAF(1281167, 1000, history_dtype=torch.int8).memory_bytes < 5.2e9


def test_a_history_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch, tmp_path):
    monkeypatch.setattr(fastsam.trajectory.storage, "_free_memory", lambda device: 10**9)
    with pytest.raises(MemoryError, match=r"10.\d+ GB\) does not fit on cpu, which has 1 GB free.*int8 takes 5.\d+ GB"):
        SAF(1281167, 1000, device="cpu")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(MemoryError, match="has 1 kB free"):
        SAF(1000, 1000, device="cpu", storage=tmp_path / "history")


def test_files_survive_the_process(backend, tmp_path):
    model, directory = mlp(), tmp_path / "history"
    ours = saf(lag=1, start_epoch=0, lam=1.0, storage=directory)
    train(model, ours, range(1, 3), before=ours.set_epoch)
    ids, z = torch.arange(8), torch.randn(8, C, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="in use by another history"):
        saf(lag=1, storage=directory, device="cpu")
    del ours
    gc.collect()
    with pytest.raises(FileExistsError, match="resume=True"):
        saf(lag=1, storage=directory, device="cpu")
    with pytest.raises(ValueError, match="cannot be resumed"):
        saf(lag=2, storage=directory, device="cpu", resume=True)
    with pytest.raises(ValueError, match="cannot be resumed"):
        saf(lag=1, storage=tmp_path / "none", device="cpu", resume=True)
    # as written while there were histories of the largest logits alone
    about = directory / "history.json"
    old = {k: v for k, v in json.loads(about.read_text()).items() if k not in ("run", "checksums", "checksum")}
    about.write_text(json.dumps(old | {"top_k": None}))
    again = saf(lag=1, start_epoch=0, lam=1.0, storage=directory, resume=True)
    again.set_epoch(3)
    wanted = again(z, Y[:8], ids)
    assert wanted > F.cross_entropy(z, Y[:8])
    del again
    gc.collect()
    later = saf(lag=1, start_epoch=0, lam=1.0, storage=directory, resume=True)
    later.set_epoch(4)
    assert float(later(z, Y[:8], ids)) == pytest.approx(float(F.cross_entropy(z, Y[:8])), abs=1e-14)


# checkpoints


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_resume_in_the_middle_of_an_epoch_goes_on_bit_for_bit(backend, storage, dtype, tmp_path):
    """docs/algorithms.md#invariant-29."""
    keywords = {"lag": 2, "start_epoch": 1, "lam": 1.0, "history_dtype": dtype}
    through, model = saf(storage=storage, **keywords), mlp()
    opt = SGD(model.parameters(), lr=0.5, momentum=0.9)
    plan = [(epoch, ids) for epoch in range(1, 6) for ids in order(epoch)]

    def go(loss, net, optimizer, part):
        for epoch, ids in part:
            if loss.epoch != epoch:
                loss.set_epoch(epoch)
            optimizer.zero_grad()
            loss(net(X[ids]), Y[ids], ids).backward()
            optimizer.step()

    go(through, model, opt, plan[:10])
    saved = {"loss": through.state_dict(), "model": model.state_dict(), "opt": opt.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    go(through, model, opt, plan[10:])
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    loss, other = saf(**keywords), mlp(seed=9)
    other.load_state_dict(saved["model"])
    optimizer = SGD(other.parameters(), lr=0.5, momentum=0.9)
    optimizer.load_state_dict(saved["opt"])
    loss.load_state_dict(saved["loss"])
    assert loss.epoch == plan[9][0]
    go(loss, other, optimizer, plan[10:])
    assert_same(other, snapshot(model))


def test_a_state_without_records_has_no_past_until_lag_epochs_later(backend):
    ours, z, ids = saf(lag=1, start_epoch=0, save_history=False), torch.randn(4, C), torch.arange(4)
    ours(z, Y[:4], ids)
    state = ours.state_dict()
    assert state["_extra_state"] == {"epoch": 1, "lag": 1, "history": None}
    other = saf(lag=1, start_epoch=0)
    other.load_state_dict(state)
    other.set_epoch(2)
    assert float(other(z, Y[:4], ids)) == pytest.approx(float(F.cross_entropy(z, Y[:4])))
    other.set_epoch(3)
    assert float(other(2 * z, Y[:4], ids)) > float(F.cross_entropy(2 * z, Y[:4])) + 1e-3


def test_a_checkpoint_of_another_size_is_refused_and_changes_nothing(backend):
    """A dataset that has grown, another number of classes, another lag or format."""
    ours, z, ids = saf(), torch.randn(4, C), torch.arange(4)
    ours.set_epoch(4)
    ours(z, Y[:4], ids)
    for other in (
        SAF(N + 5, C, lag=2),
        SAF(N, C + 30, lag=2),
        SAF(N, C, lag=3),
        SAF(N, C, lag=2, history_dtype=torch.int8),
    ):
        with pytest.raises(ValueError, match="save_history=False"):
            other.load_state_dict(ours.state_dict())
        assert other.epoch == 1
        without = copy.copy(other)
        without.save_history = False
        without.load_state_dict(ours.state_dict())
        assert without.epoch == 4


# inside a fastsam optimizer


def second_losses(opt, model, loss_of, ids):
    """Per-sample losses of every forward in a step, in order."""
    seen = []

    def losses(x, y, i):
        seen.append(loss_of(model(x), y, i))
        return seen[-1]

    opt.step(losses, X[ids], Y[ids], ids)
    return [rows.detach().clone() for rows in seen]


def past_of(history_owner, epoch):
    return {k: v.clone() for k, v in history_owner._history._slot(epoch).items()}


@pytest.mark.parametrize("way", ["loss function", "contexts"])
def test_both_passes_of_sam_see_one_past_and_the_first_is_recorded(backend, storage, way):
    model = mlp()
    ours = saf(lag=1, start_epoch=0, lam=1.0, storage=storage, reduction="none")
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    ids = torch.arange(8)
    past = {}
    for epoch in range(1, 4):
        ours.set_epoch(epoch)
        first = model(X[ids]).detach()
        seen = []

        def losses(x, y, i, seen=seen):
            z = model(x)
            seen.append((z.detach(), ours(z, y, i)))
            return seen[-1][1]

        if way == "contexts":
            with opt.ascent():
                losses(X[ids], Y[ids], ids).mean().backward()
            with opt.descent():
                losses(X[ids], Y[ids], ids).mean().backward()
            opt.step()
            opt.zero_grad()
        else:
            opt.step(losses, X[ids], Y[ids], ids)
        for z, rows in seen:
            wanted = F.cross_entropy(z, Y[ids], reduction="none")
            wanted = wanted + divergence(past[epoch - 1], z) if epoch > 1 else wanted
            torch.testing.assert_close(rows.detach(), wanted, rtol=1e-12, atol=1e-12)
        assert not torch.equal(seen[0][0], seen[1][0])
        past[epoch] = first
    # so the record of epoch 3 is the first pass's, too
    ours.set_epoch(4)
    z = model(X[ids])
    wanted = F.cross_entropy(z, Y[ids], reduction="none") + divergence(past[3], z)
    torch.testing.assert_close(ours(z, Y[ids], ids), wanted, rtol=1e-12, atol=1e-12)


def test_esams_selected_rows_keep_their_past(backend, storage):
    model = mlp()
    ours = saf(lag=1, start_epoch=0, lam=1.0, storage=storage, reduction="none")
    opt = ESAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model, beta=1.0, gamma=0.5)
    ids, past = torch.arange(8), None
    for epoch in range(1, 4):
        ours.set_epoch(epoch)
        first, seen = model(X[ids]).detach(), []

        def losses(x, y, i, seen=seen):
            z = model(x)
            seen.append((z.detach(), i, ours(z, y, i).detach()))
            return ours(z, y, i)

        opt.step(losses, X[ids], Y[ids], ids)
        assert [len(i) for _, i, _ in seen] == [8, 8, 4]
        for z, i, rows in seen:
            wanted = F.cross_entropy(z, Y[i], reduction="none")
            wanted = wanted + divergence(past[i], z) if past is not None else wanted
            torch.testing.assert_close(rows, wanted, rtol=1e-12, atol=1e-12)
        past = first


def test_accumulated_pairs_record_every_micro_batch_once(backend):
    model, ours = mlp(), saf(lag=1, start_epoch=0, lam=1.0)
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    for ids in order(1, 6):
        with opt.ascent():
            ours(model(X[ids]), Y[ids], ids).backward()
        with opt.descent():
            ours(model(X[ids]), Y[ids], ids).backward()
    first = model(X).detach()
    assert not ours._history._fields["tags"].any()  # committed by the step, not before
    opt.step()
    assert ours._history._fields["tags"][1, :N].tolist() == [1] * N
    torch.testing.assert_close(ours._history._fields["records"][1, :N, :C], first)


def test_a_failed_step_records_nothing(backend):
    model, ours = mlp(), saf(lag=1, start_epoch=0, reduction="none")
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    calls = []

    def losses(x, y, i):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ours(model(x), y, i)

    with pytest.raises(KeyboardInterrupt):
        opt.step(losses, X, Y, torch.arange(N))
    assert not ours._history._fields["tags"].any()
    opt.step(losses, X, Y, torch.arange(N))
    assert ours._history._fields["tags"][1, :N].all()


def test_a_skipped_step_records_as_a_plain_run_does(backend):
    """docs/algorithms.md#one-step, docs/algorithms.md#invariant-31."""
    model, ours = mlp(), saf(lag=1, start_epoch=0, reduction="none")
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    calls, before = [], snapshot(model)

    def losses(x, y, i):
        calls.append(1)
        return ours(model(x), y, i) * (torch.nan if len(calls) == 2 else 1)

    opt.step(losses, X, Y, torch.arange(N))
    assert int(opt.skipped_steps) == 1
    assert_same(model, before)
    assert ours._history._fields["tags"][1, :N].all()


def test_two_step_loops_are_refused(backend):
    model, ours = mlp(), saf()
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    ids = torch.arange(N)
    ours(model(X), Y, ids).backward()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"first_step\(\) and second_step\(\).*opt.step\(losses"):
        ours(model(X), Y, ids)
    opt.restore()


# bad input


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau must be finite and > 0, got 0"),
        ({"tau": float("nan")}, ValueError, "tau"),
        ({"lam": -0.1}, ValueError, "lam must be finite and >= 0, got -0.1"),
        ({"lam": "a"}, TypeError, "lam must be a number, got 'a'"),
        ({"lag": 0}, ValueError, "lag must be at least 1, got 0"),
        ({"lag": 1.5}, TypeError, "lag must be an integer, got 1.5"),
        ({"start_epoch": -1}, ValueError, "start_epoch must be at least 0"),
        ({"history_dtype": torch.int32}, ValueError, f"history_dtype must be one of {HISTORY_DTYPES}, got torch.int32"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    ],
)
def test_bad_settings_are_named(keywords, error, message):
    with pytest.raises(error, match=message):
        saf(**keywords)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, TypeError, "sample_ids must be a tensor.*IndexedDataset"),
        ([0, 1, 2, 3], TypeError, "sample_ids must be a tensor"),
        (torch.arange(4.0), TypeError, "sample_ids must be integers, got torch.float32"),
        (torch.tensor([True] * 4), TypeError, "got torch.bool"),
        (torch.arange(3), ValueError, r"shape \[4\], one for each row, got \[3\]"),
        (torch.tensor([0, 1, 2, -1]), ValueError, "sample id -1 is out of range; num_samples is 24"),
        (torch.tensor([0, 1, 2, 24]), ValueError, "sample id 24 is out of range"),
    ],
)
@pytest.mark.parametrize("epoch", [1, 3])
def test_bad_ids_are_refused_and_nothing_is_recorded(backend, ids, error, message, epoch):
    ours = saf(device="cpu")
    ours.set_epoch(epoch)
    with pytest.raises(error, match=message):
        ours(torch.randn(4, C), Y[:4], ids)
    assert not ours._history._fields["tags"].any()


def test_small_integer_ids_will_do(backend):
    ours = saf(lag=1, start_epoch=0)
    ours(torch.randn(4, C), Y[:4], torch.arange(4, dtype=torch.int32))
    assert ours._history._fields["tags"][1, :4].all()


def test_ids_that_the_device_found_out_of_range_are_reported_at_the_next_epoch(backend, monkeypatch):
    """On a GPU nothing may wait for it; here the check on the host is skipped to see what the kernel says."""
    ours = saf(lag=1, start_epoch=0)
    z = torch.randn(4, C, dtype=torch.float64)
    ours(z, Y[:4], torch.arange(4))
    ours.set_epoch(2)
    monkeypatch.setattr(SAF, "_check_ids", lambda *_: None)
    before = past_of(ours, 2)
    loss = ours(2 * z, Y[:4], torch.tensor([0, 99, -7, 3]))
    kl = divergence(z, 2 * z)[[0, 3]].sum() / 4
    torch.testing.assert_close(loss, F.cross_entropy(2 * z, Y[:4]) + 0.3 * kl)
    after = past_of(ours, 2)
    assert torch.equal(before["records"][[1, 2]], after["records"][[1, 2]])
    with pytest.raises(IndexError, match=r"2 sample ids were out of range, one of them row (99|-7)"):
        ours.set_epoch(3)
    ours.set_epoch(3)  # told once


def test_a_step_is_one_launch_and_reads_nothing_on_the_host(backend, monkeypatch, launches):
    """With the record; the ids' check on the host, which a GPU's ids do not have, is left out."""
    monkeypatch.setattr(reference_common, "READ_SCALARS", False)
    monkeypatch.setattr(SAF, "_check_ids", lambda *_: None)
    ours, model, ids = saf(lag=1, start_epoch=1, device="cpu"), mlp(), torch.arange(N)
    counts = []
    for epoch in (1, 2, 3):
        ours.set_epoch(epoch)
        launches.clear()
        with NoHostReads():
            loss = ours(epoch * model(X), Y, ids)
            loss.backward()
        counts.append(len(launches))
    assert loss > F.cross_entropy(3 * model(X), Y) + 1e-3
    assert counts == ([0, 0, 0] if backend == "torch" else [1, 1, 1])


def test_wrong_shapes_are_refused(backend):
    ours, ids = saf(), torch.arange(4)
    with pytest.raises(ValueError, match="logits have 5 classes, but SAF was made for 3"):
        ours(torch.randn(4, 5), Y[:4], ids)
    with pytest.raises(ValueError, match=r"targets must be \[4\] class indices or \[4, 3\] probabilities"):
        ours(torch.randn(4, C), Y[:3], ids)
    with pytest.raises(ValueError, match="logits must be floating"):
        ours(torch.ones(4, C, dtype=torch.int64), Y[:4], ids)
    for epoch, error in ((0, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="epoch"):
            ours.set_epoch(epoch)


def test_a_forgotten_set_epoch_is_noticed(backend):
    ours, args = saf(), (torch.randn(N, C), Y, torch.arange(N))
    ours(*args)
    ours(*args)
    with pytest.warns(UserWarning, match=r"set_epoch\(e\) at the start of every epoch"):
        ours(*args)
    ours(*args)  # told once


# as a module


def test_evaluation_is_cross_entropy_and_leaves_no_trace(backend):
    ours = saf(lag=1, start_epoch=0, device="cpu").eval()
    ours.set_epoch(2)
    z, ids = torch.randn(4, C, requires_grad=True), torch.arange(4)
    assert torch.equal(ours(z, Y[:4], ids), F.cross_entropy(z, Y[:4]))
    assert not ours._history._fields["tags"].any()


def test_records_keep_their_dtype_where_a_model_is_cast(backend):
    holder = nn.ModuleList([nn.Linear(2, 2), saf(device="cpu", history_dtype=torch.float16)]).double().to("cpu")
    assert holder[1]._history._fields["records"].dtype == torch.float16


def test_indexed_dataset_yields_ids():
    pairs = torch.utils.data.TensorDataset(X, Y)
    indexed = IndexedDataset(pairs)
    assert len(indexed) == N
    x, y, i = indexed[5]
    assert i == 5
    assert torch.equal(x, X[5])
    assert y == Y[5]
    assert IndexedDataset(list("abc"))[1] == ("b", 1)
    assert indexed.tensors is pairs.tensors
    loader = torch.utils.data.DataLoader(indexed, batch_size=5, shuffle=True, num_workers=1)
    seen = [i for _, _, ids in loader for i in ids.tolist()]
    assert sorted(seen) == list(range(N))
    with pytest.raises(TypeError, match="cannot be indexed"):
        IndexedDataset(iter([1]))


@pytest.mark.parametrize("to_host", [False, True])
def test_copies_of_records_are_waited_for_on_the_gpus_own_stream(monkeypatch, to_host):
    """Whatever device is the current one; copies and streams are stand-ins here."""
    gpu, recorded = torch.device("cuda", 1), []

    class Field:
        device = gpu if to_host else torch.device("cpu")

    class Event:
        def record(self, stream):
            recorded.append(stream)

    monkeypatch.setattr(history_module, "_start_copy", lambda field, device: field)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    history_module.AsyncCopy(torch.arange(2), 1, {"tags": Field()}, torch.device("cpu") if to_host else gpu)
    assert recorded == ["stream of cuda:1"]
