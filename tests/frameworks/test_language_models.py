"""SAF and MESA over the tokens of a GPT-2, alone and inside SAM, beside a loop written by hand in plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from by_hand import assert_same_weights
from texts import ROWS, continued, gpt2, stacked

from fastsam import MESA, SAF, SAM, Weighted

EPOCHS, BATCHES, LR, RHO, LAM, TAU, DECAY = 3, 2, 0.1, 0.1, 1.0, 5.0, 0.9
DATA = continued(BATCHES)


def tokens(model, ids):
    return model(input_ids=ids).logits[:, :-1]


def batches():
    for i in range(BATCHES):
        ids, labels = stacked(DATA, i * ROWS)
        yield ids, labels, torch.arange(ROWS) + i * ROWS


def trained(name, inside):
    """Per-token losses as `Weighted`, in which tokens of label -100 weigh nothing."""
    model, width = gpt2().double(), DATA[0]["input_ids"].numel() - 1
    if name == "saf":
        vocabulary = model.config.vocab_size
        past = SAF(len(DATA) * width, vocabulary, lam=LAM, tau=TAU, lag=1, start_epoch=1, reduction="none")
    else:

        def output(outputs):
            return outputs.logits[:, :-1].flatten(0, 1)

        past = MESA(model, lam=LAM, tau=TAU, decay=DECAY, start_epoch=1, reduction="none", output=output)

    def losses(ids, labels, rows):
        y = labels[:, 1:]
        places = rows[:, None] * width + torch.arange(width)
        found = past(tokens(model, ids).flatten(0, 1), y.flatten(), places.flatten() if name == "saf" else ids)
        return Weighted(found.view(y.shape), y != -100)

    plain = torch.optim.SGD(model.parameters(), lr=LR)
    opt = SAM.wrap(plain, rho=RHO if inside == "sam" else 0.0, model=model)
    if name == "mesa":
        past.attach(opt)
    for epoch in range(1, EPOCHS + 1):
        past.set_epoch(epoch)
        for batch in batches():
            opt.step(losses, *batch)
    return model


def by_hand(name, inside):
    model = gpt2().double()
    params, teacher, recorded = list(model.parameters()), copy.deepcopy(model), {}

    def objective(ids, labels, t):
        z, y = tokens(model, ids), labels[:, 1:]
        found = F.cross_entropy(z.transpose(1, 2), y, reduction="none")
        if t is not None:
            p = (t / TAU).softmax(2)
            divergence = (p * (p.log() - (z / TAU).log_softmax(2))).sum(2)
            found = found + LAM * TAU**2 * divergence
        counts = y != -100
        return (found * counts).sum() / counts.sum(), z.detach()

    for epoch in range(1, EPOCHS + 1):
        for i, (ids, labels, _) in enumerate(batches()):
            t = None
            if epoch > 1:
                with torch.no_grad():
                    t = recorded[epoch - 1, i] if name == "saf" else tokens(teacher, ids)
            loss, z = objective(ids, labels, t)
            g = torch.autograd.grad(loss, params)
            recorded[epoch, i] = z.half().double()
            if inside == "sam":
                w = [p.detach().clone() for p in params]
                norm = torch.stack([g_n.square().sum() for g_n in g]).sum().sqrt()
                with torch.no_grad():
                    torch._foreach_add_(params, [RHO * g_n / norm for g_n in g])
                g = torch.autograd.grad(objective(ids, labels, t)[0], params)
                with torch.no_grad():
                    torch._foreach_copy_(params, w)
            with torch.no_grad():
                torch._foreach_sub_(params, [LR * g_n for g_n in g])
                for v, p in zip(teacher.parameters(), params, strict=True):
                    v.mul_(DECAY).add_(p, alpha=1 - DECAY)
    return model


@pytest.mark.parametrize("inside", ["sgd", "sam"])
@pytest.mark.parametrize("name", ["saf", "mesa"])
def test_tokens_are_compared_with_their_own_past(name, inside):
    assert_same_weights(trained(name, inside), by_hand(name, inside))
