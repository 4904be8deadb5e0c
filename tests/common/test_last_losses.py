"""`last_perturbed_loss`: the second pass's objective over the rows of the loss that a step returns."""

import torch
import torch.nn.functional as F
from laws import PLAIN, law
from methods import WAYS
from problems import batches, losses_of, mlp
from training import Training

from fastsam import MSAM

OTHER_WAYS = {"the caller runs the passes, and has their losses": lambda cell: cell.way not in ("loss_fn", "backward")}


@law(skips=PLAIN | OTHER_WAYS)
def test_it_is_the_loss_of_all_rows_at_the_perturbed_weights(cell):
    training = Training(cell)
    for _ in range(4):
        calls, has_second = [], training.opt.needs_second_pass

        def losses(*batch, calls=calls):
            found = training.losses(*batch)
            # shards side by side come out of torch.func alone
            calls.append(found.detach())
            return found

        training.begin()
        WAYS[cell.way](training.opt, losses, *training.batch)
        training.taken += 1
        found = training.opt.last_perturbed_loss
        if not has_second:
            assert found is None
        elif cell.options.get("execution") != "batched":
            # two calls a part; ESAM's third is on the rows that it has chosen
            perturbed = calls[1:2] if cell.subject.optimizer == "esam" else calls[1::2]
            torch.testing.assert_close(found, torch.cat(perturbed).mean())
        else:
            assert found.shape == ()


@law(skips=PLAIN | {"the passes are ours": lambda cell: cell.way in ("loss_fn", "backward")})
def test_other_ways_leave_none(cell):
    training = Training(cell)
    training.opt._run.perturbed_losses = [None]
    training.step()
    assert training.opt.last_perturbed_loss is None


def test_side_by_side_it_is_that_of_one_shard_after_the_other(choose):
    choose("torch")
    found = []
    for execution in ("sequential", "batched"):
        model = mlp()
        opt = MSAM(model.parameters(), torch.optim.SGD, 0.3, num_shards=3, execution=execution, model=model, lr=0.1)
        loss = opt.step(losses_of(model), *batches(1)[0])
        found.append(opt.last_perturbed_loss)
        assert found[-1] > loss
    torch.testing.assert_close(*found)


@law(skips=PLAIN | OTHER_WAYS)
def test_a_base_step_leaves_none(cell):
    training = Training(cell, on_base_step="ignore")
    training.step()
    training.opt.zero_grad()
    F.cross_entropy(training.model(training.batch[0]), training.batch[1]).backward()
    if training.opt.needs_second_pass:
        training.opt.step()
        assert training.opt.last_perturbed_loss is None
