"""What every recorded result says about where and how it was made."""

import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results"


def environment(device: str, command: str) -> dict[str, Any]:
    """Describe the machine, the software and the command.

    Args:
        device: "cpu" or "cuda".
        command: the line that was typed.
    """
    is_cuda = device == "cuda"
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "pytorch_optimizer": _version("pytorch_optimizer"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else "none",
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def recorded(kind: str, device_name: str) -> Path:
    """Return where the results of this kind lie for the device of this name."""
    return RECORDED / f"{kind}_{re.sub(r'[^a-z0-9]+', '_', device_name.lower())}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip().split("\n")[0] or "unknown"
