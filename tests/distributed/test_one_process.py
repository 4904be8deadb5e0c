"""What distributed training says to one process."""

import subprocess
import sys

import pytest
import torch
from problems import assert_same, batches, losses_of, mlp, snapshot

from fastsam import SAM


@pytest.mark.parametrize("bad", ["local", 0, -2, True, 1.5])
def test_unknown_perturb_sync_is_refused(bad):
    with pytest.raises(ValueError, match="perturb_sync must be None, 'global', 'replica' or a number of ranks"):
        SAM(mlp().parameters(), torch.optim.SGD, perturb_sync=bad, lr=0.1)


def test_one_process_is_one_replica():
    expected, model = mlp(), mlp()
    alone = SAM(expected.parameters(), torch.optim.SGD, lr=0.1)
    opt = SAM(model.parameters(), torch.optim.SGD, perturb_sync="replica", model=model, lr=0.1)
    for x, y in batches(3):
        alone.step(losses_of(expected), x, y)
        opt.step(losses_of(model), x, y)
    assert_same(model, snapshot(expected))
    opt = SAM(model.parameters(), torch.optim.SGD, perturb_sync=2, lr=0.1)
    with pytest.raises(ValueError, match="does not divide the 1 ranks"):
        opt.step(losses_of(model), *batches(1)[0])


def test_dtensor_is_not_imported_where_nobody_uses_it():
    program = "import sys, fastsam; print('torch.distributed.tensor' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
