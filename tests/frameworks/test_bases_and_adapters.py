"""Base optimizers of other packages, and peft's adapters, beside loops written by hand."""

import copy
import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from by_hand import METHODS, ByHand
from problems import batches, losses_of, mlp

from fastsam import ESAM, MSAM, SAM

DATA = batches(5)
BASES = {
    "schedulefree.SGDScheduleFree": {"lr": 0.1, "momentum": 0.9},
    "schedulefree.AdamWScheduleFree": {"lr": 0.01},
    "pytorch_optimizer.Lion": {"lr": 1e-3, "weight_decay": 0.1},
    "pytorch_optimizer.AdaBelief": {"lr": 0.01},
    "pytorch_optimizer.Lamb": {"lr": 0.01},
    "pytorch_optimizer.SOAP": {"lr": 0.01},
    "pytorch_optimizer.ScheduleFreeAdamW": {"lr": 0.01},
    "pytorch_optimizer.Adan": {"lr": 0.01},
    "pytorch_optimizer.Prodigy": {"lr": 1.0},
    "timm.optim.Lamb": {"lr": 0.01},
    "timm.optim.NAdamW": {"lr": 0.01},
    "timm.optim.Lookahead": {"lr": 0.1},
    "pytorch_optimizer.Lookahead": {"lr": 0.1},
}


def built(name):
    """A function of parameters that returns the base optimizer."""
    package, _, cls = name.rpartition(".")
    pytest.importorskip(package.partition(".")[0])
    make = getattr(importlib.import_module(package), cls)
    if cls == "Lookahead":
        return lambda params: make(torch.optim.SGD(params, lr=0.1, momentum=0.9), k=2)
    return functools.partial(make, **BASES[name])


# SOAP's own first steps turn a change of 1e-15 in a gradient into one of 1e-2 in a weight: its eigenvectors of a
# matrix that lacks rank are rounding's
@pytest.mark.parametrize("method", ["sam", "esam", "msam"])
@pytest.mark.parametrize("name", [name for name in BASES if not name.endswith("SOAP")])
def test_bases_of_other_packages(name, method):
    model, make = mlp(batchnorm=True), built(name)
    cls, options = METHODS[method]
    opt = cls.wrap(make(model.parameters()), model=model, **options)
    loop = ByHand(method, copy.deepcopy(model), None, lambda params, **_: make(params), options)
    loop.losses = losses_of(loop.model)
    switches = hasattr(loop.base, "train")
    for batch in DATA:
        if switches:
            loop.base.train()
            opt.train()
        opt.step(losses_of(model), *batch)
        opt.zero_grad()
        loop.step(loop.gradient(*batch))
    loop.assert_equals(model)
    if switches:
        # evaluation sees the average
        opt.eval()
        loop.base.eval()
        loop.assert_equals(model)


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "pytorch_optimizer.SOAP", "timm.optim.NAdamW"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name):
    whole, make = mlp(batchnorm=True), built(name)
    opt = ESAM.wrap(make(whole.parameters()), rho=0.1, model=whole)
    train = getattr(opt, "train", lambda: None)

    def steps(opt, model, data):
        for batch in data:
            opt.step(losses_of(model), *batch)

    train()
    steps(opt, whole, DATA[:3])
    resumed = mlp(batchnorm=True, seed=2)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    other = ESAM.wrap(make(resumed.parameters()), rho=0.1, model=resumed)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    getattr(other, "train", lambda: None)()
    steps(opt, whole, DATA[3:])
    steps(other, resumed, DATA[3:])
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


@pytest.mark.parametrize(("cls", "options"), [(SAM, {}), (ESAM, {"seed": 4}), (MSAM, {"num_shards": 4})])
def test_adapters_of_peft(cls, options):
    """The frozen weights stay as they are, bit for bit, and the adapters take the method's step."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from texts import classified, gpt2, stacked

    model = peft.get_peft_model(
        gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    )
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    name = cls.__name__.lower()
    loop = ByHand(name, copy.deepcopy(model), None, torch.optim.AdamW, {"rho": 0.1, **options}, lr=1e-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = cls(trained, torch.optim.AdamW, rho=0.1, model=model, lr=1e-2, **options)

    def losses(model):
        return lambda ids, labels: F.cross_entropy(model(input_ids=ids).logits[:, -1], labels, reduction="none")

    loop.losses = losses(loop.model)
    for i in range(4):
        batch = stacked(classified(4), 8 * i)
        opt.step(losses(model), *batch)
        opt.zero_grad()
        loop.step(loop.gradient(*batch))
    loop.assert_equals(model)
    for name, p in model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])
