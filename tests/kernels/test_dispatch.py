"""Who serves which tensors, and what is said where a backend cannot run."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import kernels

import fastsam
from fastsam.kernels import ops, reference

CPU = [torch.ones(2)]
CUDA = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))]


def stand_in(interpreted):
    return SimpleNamespace(INTERPRETED=interpreted)


@pytest.fixture
def triton(monkeypatch):
    """Pretend about the Triton kernels, the GPU and its generation."""

    def pretend(backend, has_gpu=False, capability=(9, 0)):
        monkeypatch.setattr(ops, "_triton_backend", lambda: backend)
        monkeypatch.setattr(ops, "_has_gpu", lambda: has_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        ops._is_supported.cache_clear()

    yield pretend
    ops._is_supported.cache_clear()


def test_the_default_on_a_gpu_is_triton_and_on_a_cpu_torch(triton):
    compiled = stand_in(False)
    triton(compiled, has_gpu=True)
    assert ops._pick(CUDA) is compiled
    assert ops._pick(CPU + CUDA) is compiled  # it leaves the former to the references
    assert ops._pick(CPU) is reference
    assert ops._pick([]) is reference


def test_a_gpu_without_triton_or_before_ampere_is_served_by_torch(triton, choose):
    triton(None)
    assert ops._pick(CUDA) is reference
    old = stand_in(False)
    triton(old, has_gpu=True, capability=(7, 5))
    assert ops._pick(CUDA) is reference
    choose("triton")
    assert ops._pick(CUDA) is old
    assert ops._pick(CPU) is reference


def test_a_choice_is_respected(triton, choose):
    triton(stand_in(False), has_gpu=True)
    choose("torch")
    assert ops._pick(CUDA) is reference


def test_a_choice_that_cannot_run_says_why(triton):
    triton(None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        fastsam.set_backend("triton")
    triton(stand_in(False))
    with pytest.raises(RuntimeError, match=r"no GPU .* or set TRITON_INTERPRET=1 before fastsam is imported"):
        fastsam.set_backend("triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of 'triton', 'torch', or None"):
        fastsam.set_backend("cuda")
    assert ops._chosen is None


def test_the_interpreter_serves_the_cpu_and_refuses_a_gpu(triton, choose):
    interpreted = stand_in(True)
    triton(interpreted)
    choose("triton")
    assert ops._pick(CPU) is interpreted
    with pytest.raises(RuntimeError, match=r"a tensor is on cuda:0, but Triton interprets .* set_backend\('torch'\)"):
        ops._pick(CUDA)
    choose("torch")
    assert ops._pick(CUDA) is reference


SCRIPT = """
import sys, torch, fastsam
from fastsam.kernels import ops
imported = {"triton", "fastsam.kernels.triton_backend"} & sys.modules.keys()
p = torch.nn.Parameter(torch.ones(3))
opt = fastsam.SAM([p], torch.optim.SGD, lr=0.1)
opt.step(lambda x: (p * x).sum(1), torch.ones(2, 3))
print(len(imported), "fastsam.kernels.triton_backend" in sys.modules, ops._pick([p]).__name__)
"""


@pytest.mark.skipif(kernels is None, reason="triton is not installed")
@pytest.mark.parametrize(("variable", "said"), [(None, "0 False fastsam.kernels.reference"),
                                            ("1", "0 True fastsam.kernels.triton_backend")])  # fmt: skip
def test_triton_is_imported_on_first_use_alone(variable, said):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {} if variable is None else {"TRITON_INTERPRET": variable}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said
