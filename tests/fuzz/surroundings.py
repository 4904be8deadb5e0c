"""What the property tests of this folder share: how many examples they take, what they count, what may not change."""

import copy
import pickle
from collections import Counter, defaultdict

import torch
from hypothesis import HealthCheck, Phase, settings

FIGURES: dict[str, Counter] = defaultdict(Counter)
"""How many examples and calls each test has seen and how they ended, by the name of the test."""


def is_full():
    """Whether `--hypothesis-profile=full` asks for all examples; without it a few, the same in every run."""
    return settings.default.max_examples >= 1000


def budget(bounded, full, **options):
    """Settings of a test that takes so many examples."""
    return settings(
        max_examples=full if is_full() else bounded,
        derandomize=not is_full(),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )


def values(thing):
    """A picture of nested values by which two can be compared, NaN and tensors included; parameters by identity."""
    if isinstance(thing, torch.nn.Parameter):
        return id(thing)
    if isinstance(thing, torch.Tensor):
        return str(thing.dtype), tuple(thing.shape), pickle.dumps(thing.detach().resolve_conj().tolist())
    if isinstance(thing, dict):
        return {values(k): values(v) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [values(entry) for entry in thing]
    return repr(thing)


def picture(model, opt=None):
    """All that a refused call may not change: weights, buffers, gradients, random numbers, the optimizer's groups,
    defaults and state."""
    seen = {
        "tensors": values({name: t.data for name, t in (*model.named_parameters(), *model.named_buffers())}),
        "gradients": values([None if p.grad is None else p.grad for p in model.parameters()]),
        "random numbers": values(torch.get_rng_state()),
        "requires_grad": [p.requires_grad for p in model.parameters()],
    }
    if opt is not None:
        base = getattr(opt, "base_optimizer", opt)
        seen |= {
            "groups": values(base.param_groups),
            "defaults": values(base.defaults),
            "state": values({id(p): dict(entries) for p, entries in base.state.items()}),
            "hooks": [len(getattr(base, name)) for name in vars(base) if name.startswith("_optimizer_")],
        }
    return copy.deepcopy(seen)


def changes(before, after):
    """The names of what has changed."""
    return [name for name in before if before[name] != after[name]]
