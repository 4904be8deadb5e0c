"""The package as users get it: a wheel that imports alone, and an import that needs neither Triton nor a GPU."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from versions import ENVIRONMENTS

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


def run_with(site, *arguments):
    """Run Python with a folder of packages before all others and warnings as errors; return exit code and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-W", "error::UserWarning", *arguments]
    result = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    return result.returncode, result.stderr


def install(site, name, files):
    """Put a distribution into a folder as an installer does: its files, and a RECORD that lists them."""
    about = site / f"{name}-0.0.1.dev0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1.dev0\n")
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, f"{about.name}/METADATA"]))
    for file, text in files.items():
        (site / file).parent.mkdir(exist_ok=True)
        (site / file).write_text(text)


@pytest.mark.parametrize(
    "blocked", [[], ["triton"], ["triton", "click", "rich", "matplotlib", "sklearn", "numpy.f2py"]]
)
def test_import_and_training_without_optional_packages(tmp_path, blocked):
    run(BLOCKED.format(blocked=blocked) + TRAIN, tmp_path)


def test_import_loads_no_optional_package(tmp_path):
    loaded = run("import sys, fastsam; print(*sys.modules)", tmp_path).split()
    assert not {"click", "rich", "matplotlib", "sklearn", "scipy", "apex", "kernels"} & set(loaded)


def test_public_names():
    import fastsam

    optimizers, losses = {"SAM", "ESAM", "MSAM", "GSAM", "LookSAM", "TwoPassOptimizer"}, {"SAF", "MESA"}
    others = {"GraphStep", "IndexedDataset", "SampleToRankSampler", "Weighted", "graph_step", "norm_layer_groups"}
    assert set(fastsam.__all__) == optimizers | losses | others | {"set_backend", "whole"}
    assert all(hasattr(fastsam, name) and getattr(fastsam, name).__doc__ for name in fastsam.__all__)


def test_public_names_of_the_measures():
    from fastsam import sharpness

    measures = {"sam_sharpness", "m_sharpness", "gradient_cosine", "hessian_eigenvalues", "power_iteration"}
    results = {"Sharpness", "GradientCosine", "HessianEigenvalues", "PowerIteration", "Spectrum", "Landscape"}
    assert set(sharpness.__all__) == measures | results | {"spectrum", "landscape", "line"}
    assert all(getattr(sharpness, name).__doc__ for name in sharpness.__all__)


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
    return next(out.glob("fastsam_torch-*.whl"))


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


def test_the_lowest_versions_claimed_are_those_that_test_versions_has():
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE).group(1)
    extra = re.search(r"^cli = \[(.*?)\]", text, re.MULTILINE).group(1)
    claimed = dict(re.findall(r'"([\w-]+)>=([\d.]+)', dependencies + extra))
    claimed["python"] = re.search(r'^requires-python = ">=([\d.]+)"', text, re.MULTILINE).group(1)
    assert {"python", "torch", "triton", "numpy", "click"} <= set(claimed)
    tested = ENVIRONMENTS["lowest"]
    assert set(tested) == set(claimed)
    assert all(f"{tested[name]}.0".startswith(f"{version}.") for name, version in claimed.items())


@pytest.fixture
def site(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    return tmp_path / "site"


def test_version_is_that_of_the_distribution(site):
    code = "import fastsam, importlib.metadata as m; assert fastsam.__version__ == m.version('fastsam-torch') == {!r}"
    version = next(site.glob("*.dist-info")).stem.removeprefix("fastsam_torch-")
    assert run_with(site, "-c", code.format(version)) == (0, "")


def test_a_source_tree_that_is_not_installed_has_no_version(site):
    for about in site.glob("*.dist-info"):
        shutil.rmtree(about)
    # -S leaves out every installed distribution, and what is imported here needs none
    code = "from importlib.util import *; s = spec_from_file_location('i', 'fastsam/installation.py'); "
    code += "m = module_from_spec(s); s.loader.exec_module(m); assert m.installed_version() == '0+unknown'"
    assert run_with(site, "-S", "-c", code) == (0, "")


def test_the_unrelated_distribution_beside_ours_is_no_matter(site):
    install(site, "fastsam", {})
    assert run_with(site, "-c", "import fastsam; fastsam.SAM") == (0, "")


def test_ours_over_the_unrelated_distribution_warns(site):
    ours = (site / "fastsam" / "__init__.py").read_text()
    install(site, "fastsam", {"fastsam/__init__.py": ours})
    code, err = run_with(site, "-c", "import fastsam")
    assert code == 1
    assert "UserWarning: the installed distribution 'fastsam' 0.0.1.dev0 is not fastsam-torch but lists" in err
    assert "Run pip uninstall fastsam, then install fastsam-torch again with pip's --force-reinstall" in err


def test_the_unrelated_distribution_over_ours_is_named_by_the_command(site):
    install(site, "fastsam", {"fastsam/__init__.py": "# theirs\n"})
    code, err = run_with(site, "-m", "fastsam", "--version")
    assert code == 2
    assert err.count("\n") == 1
    assert f"{site / 'fastsam' / '__init__.py'} is not fastsam-torch's" in err
    assert "Run pip uninstall fastsam, then install fastsam-torch again" in err


def test_our_package_without_its_init_is_named_by_the_command(site):
    (site / "fastsam" / "__init__.py").unlink()
    code, err = run_with(site, "-m", "fastsam", "--version")
    assert code == 2
    assert err.startswith("fastsam: the package fastsam, which has no __init__.py, is not fastsam-torch's")
