"""The first weights of a run, from a file: a checkpoint of `fastsam train`, or a state dict that torch.save wrote."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, read_archive


def find(path: Path) -> Path:
    """Return the file of weights at `path`, in full: that file, or the checkpoint in that directory.

    Raises:
        InputError: there is none.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; name a checkpoint of fastsam train, its directory, or a state dict")
    return file.resolve()


def start_from(path: Path, model: nn.Module, classes: int) -> list[str]:
    """Copy weights and running statistics into a model, all but those of a last layer for other classes.

    Args:
        path: what `find` returned.
        model: on the CPU; nothing of it is changed where an error is raised.
        classes: number of classes of the model.

    Returns:
        Names of the tensors that keep what they were.

    Raises:
        InputError: the file cannot be read, or is of another architecture.
    """
    saved, wanted = _read(path), model.state_dict()
    if missing := sorted(wanted.keys() - saved.keys()):
        raise InputError(f"{path} has no {missing[0]}: it is of another model")
    if extra := sorted(saved.keys() - wanted.keys()):
        raise InputError(f"{path} has {extra[0]}, which the model has not: it is of another model")
    kept = [name for name, tensor in wanted.items() if _is_of_other_classes(saved[name], tensor, classes)]
    for name, tensor in wanted.items():
        if name not in kept and saved[name].shape != tensor.shape:
            shapes = f"{list(saved[name].shape)} where the model has {list(tensor.shape)}"
            raise InputError(f"{path}: {name} is {shapes}; it is of another model, or of pictures of another size")
    if len(kept) > 2:
        raise InputError(f"{path}: {', '.join(kept)} differ, more than a last layer; it is of another model")
    model.load_state_dict({name: wanted[name] if name in kept else saved[name] for name in wanted})
    return kept


def _is_of_other_classes(saved: Tensor, wanted: Tensor, classes: int) -> bool:
    """Whether a tensor has the same shape but for its first dimension, which is the number of classes."""
    same_inputs = saved.dim() == wanted.dim() > 0 and saved.shape[1:] == wanted.shape[1:]
    return same_inputs and wanted.shape[0] == classes != saved.shape[0]


def _read(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a file, its tensors on the CPU."""
    try:
        content = read_archive(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist any more") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no weights; name a checkpoint of fastsam train or a state dict")
    return content
