"""Weights whose norm no process can tell: refused with the reason and a way out, before anything is changed."""

import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastsam.distributed.dtensor import is_dtensor

_OWN_NORM = "every rank would perturb by the norm of its own part"
_FSDP2 = "use torch.distributed.fsdp.fully_shard (FSDP2)"


def refuse_unsupported(params: Sequence[Tensor]) -> None:
    """Raise ValueError if a parameter is a part of a weight without saying which, or a sum over ranks."""
    for p in params:
        shape = f"a parameter of shape {tuple(p.shape)}"
        if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
            raise ValueError(
                f"{shape} is a sum over ranks (Partial), of which nobody holds a weight to perturb; redistribute it"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(f"{shape} is sharded by FullyShardedDataParallel (FSDP1), where {_OWN_NORM}; {_FSDP2}")
        if hasattr(p, "_st_info"):
            raise ValueError(
                f"{shape} is this rank's part of a tensor parallel weight, which DistributedDataParallel and "
                f"replicate() hold as a plain tensor, so that {_OWN_NORM}; {_FSDP2} over the ranks that hold copies"
            )


def refuse_pipelines(params: Sequence[Tensor]) -> None:
    """Raise ValueError if the parameters belong to some stages of a torch.distributed.pipelining pipeline alone."""
    module = sys.modules.get("torch.distributed.pipelining.stage")
    # Looked for only where there are several processes: to find who refers to a class takes a tenth of a second.
    if module is None or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    own, kinds = {id(p) for p in params}, _with_subclasses(module._PipelineStageBase)
    # An instance refers to its class.
    stages: list[Any] = [o for o in gc.get_referrers(*kinds) if type(o) in kinds]
    ours = {s.stage_index: s.num_stages for s in stages if any(id(p) in own for p in s.submod.parameters())}
    if ours and len(ours) < max(ours.values()):
        raise ValueError(
            f"the parameters are those of pipeline stage {', '.join(map(str, sorted(ours)))} of {max(ours.values())}: "
            "every process would perturb by the norm of its own stages' gradient, where that of the whole model is "
            f"meant; {_FSDP2} or DistributedDataParallel without pipeline stages"
        )


def _with_subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_with_subclasses, cls.__subclasses__()))
