"""The package as users get it: a wheel that imports alone, and an import that needs neither Triton nor a GPU."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = "import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
TRAIN = """
import torch, fastsam
model = torch.nn.Linear(4, 2)
opt = fastsam.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, model=model, lr=0.1)
before = model.weight.detach().clone()
opt.step(lambda x: model(x).square().mean(1), torch.ones(3, 4))
assert not torch.equal(before, model.weight)
print(fastsam.__file__, fastsam.__version__)
"""


def run(code, cwd, python=sys.executable):
    result = subprocess.run([python, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "blocked", [[], ["triton"], ["triton", "click", "rich", "matplotlib", "sklearn", "numpy.f2py"]]
)
def test_import_and_training_without_optional_packages(tmp_path, blocked):
    run(BLOCKED.format(blocked=blocked) + TRAIN, tmp_path)


def test_import_loads_no_optional_package(tmp_path):
    loaded = run("import sys, fastsam; print(*sys.modules)", tmp_path).split()
    assert not {"click", "rich", "matplotlib", "sklearn", "apex", "kernels"} & set(loaded)


def test_public_names():
    import fastsam

    optimizers, losses = {"SAM", "ESAM", "MSAM"}, {"SAF", "MESA"}
    others = {"GraphStep", "IndexedDataset", "SampleToRankSampler", "graph_step", "set_backend"}
    assert set(fastsam.__all__) == optimizers | losses | others
    assert all(hasattr(fastsam, name) and getattr(fastsam, name).__doc__ for name in fastsam.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not a source tree: these tests run against an installed wheel")
    out = tmp_path_factory.mktemp("wheel")
    # a copy, so that the build leaves nothing in the tree
    source = out / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "fastsam", "kernels"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(out.glob("fastsam-*.whl"))


def test_wheel_holds_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for module in (ROOT / "fastsam").glob("*.py"):
        assert f"fastsam/{module.name}" in names
    for module in (ROOT / "kernels").glob("*.py"):
        assert f"fastsam/kernels/{module.name}" in names
    assert "fastsam/py.typed" in names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)


def test_wheel_runs_in_a_clean_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run("import sysconfig; print(sysconfig.get_path('purelib'))", tmp_path, python).strip())
    zipfile.ZipFile(wheel).extractall(site)
    # borrow the dependencies, not the editable install: a .pth in a borrowed folder is not read
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    file, version = run(TRAIN, tmp_path, python).split()
    assert Path(file).parent == site / "fastsam"
    assert version != "0+unknown"
