import pytest
import torch

import fastsam

torch.set_num_threads(1)


@pytest.fixture(params=["torch"])
def backend(request):
    fastsam.set_backend(request.param)
    yield request.param
    fastsam.set_backend(None)
