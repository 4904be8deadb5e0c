"""The tests on other versions than constraints.txt pins: `make test-versions`, `--help` for parts of it.

Every environment is made anew in build/versions with the Python that it names, which has to be installed. "lowest" has
the lowest versions that pyproject.toml claims; "between" has a Triton between that and the pinned one. In each the
kernels' tests run in Triton's interpreter, the laws of all methods and the command line in plain torch, and every
kernel is compiled for sm_90. torch comes from the package index with CUDA: an environment takes about 7 GB.
"""

import argparse
import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "versions"
ENVIRONMENTS = {
    "lowest": {
        "python": "3.10",
        "torch": "2.8.0",
        "triton": "3.4.0",
        "numpy": "1.26.0",
        "click": "8.1.0",
        "rich": "13.0.0",
        "matplotlib": "3.8.0",
        "scikit-learn": "1.4.0",
        "scipy": "1.11.0",
    },
    "between": {"python": "3.12", "torch": "2.11.0", "triton": "3.6.0", "numpy": "2.5.*"},
}
# matplotlib 3.8 calls what pyparsing 3.3 deprecates, and the tests take a warning for an error.
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "setuptools>=77", "pyparsing<3.3"]
CHECKS = {
    "kernels": ["-m", "pytest", "-q", "-n", "auto", "tests/kernels"],
    "methods": ["-m", "pytest", "-q", "-n", "auto", "tests/common", "tests/methods", "-k", "not triton"],
    "cli": ["-m", "pytest", "-q", "-n", "auto", "tests/cli"],
    "gate": ["-m", "benchmarks", "gate", "static", "--targets", "sm_90"],
}


def python_of(version: str) -> str:
    """Return the path of an installed Python of this version: on the PATH, or of pyenv."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for path in filter(None, candidates):
        # pyenv's commands on the PATH fail where another version is selected.
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return str(path)
    sys.exit(f"Python {version} is not installed; install it, or name the environments that can be made")


def build(name: str) -> None:
    """Make an environment with everything in it."""
    versions = ENVIRONMENTS[name]
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python_of(versions["python"]), "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pins = [f"{package}=={version}" for package, version in versions.items() if package != "python"]
    # One resolution of everything, so that what this package requires is held against the pins too.
    install = [python, "-m", "pip", "install", "--quiet", "--editable", ".[cli]", *pins, *TOOLS]
    subprocess.run(install, cwd=ROOT, check=True)


def versions_of(python: Path) -> str:
    """Return the versions of an environment as cells of a table: Python, torch, triton, numpy."""
    code = "import platform as p, torch, triton, numpy; packages = torch, triton, numpy; "
    code += "print(p.python_version(), *(package.__version__ for package in packages), sep=' | ')"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def check(name: str, python: Path, label: str) -> tuple[bool, str]:
    """Run one check, and return whether it is green and its row of a table."""
    command = shlex.join(CHECKS[label])
    print(f"{name}: python {command}", flush=True)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(FOLDER / f"{name}-cache")}
    log = FOLDER / f"{name}-{label}.log"
    with log.open("w") as file:
        done = subprocess.run([python, *CHECKS[label]], cwd=ROOT, env=environment, stdout=file, stderr=file)
    is_green = done.returncode == 0
    result = re.sub(r" in [\d.]+s.*", "", log.read_text().strip().split("\n")[-1])
    print(f"    {result}{'' if is_green else f'; red, see {log}'}", flush=True)
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return is_green, f"| {versions_of(python)} | `{command}` | {'' if is_green else 'red: '}{result} | {today} |"


def main() -> int:
    """Make the environments, run the checks in each, print the table, and return 1 if any is red."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--keep", action="store_true", help="use environments that are there already")
    chosen = parser.parse_args()
    results = []
    for name in chosen.only:
        python = FOLDER / name / "bin" / "python"
        if not (chosen.keep and python.exists()):
            build(name)
        results += [check(name, python, label) for label in chosen.checks]
    head = "| Python | torch | triton | numpy | command | result | date |"
    print("", head, "|" + " --- |" * 7, *(row for _, row in results), sep="\n")
    return 0 if all(is_green for is_green, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
