"""Lets a torchvision that was built for CUDA be imported beside a torch without it; nobody here uses its kernels."""

import importlib.util
from pathlib import Path

import torch


def _is_foreign():
    found = importlib.util.find_spec("torchvision")
    if found is None or torch.version.cuda is not None:
        return False
    return "+cu" in Path(found.origin).with_name("version.py").read_text(encoding="utf-8")


if _is_foreign():
    # without them torchvision's import fails where it says what they return
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
