"""What modules hold at one moment, by reference and by value, in few copies of whole lists."""

import copy
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastsam.distributed.dtensor import local
from fastsam.kernels import ops, replay_tables
from fastsam.kernels.tensor_list import as_words

_PIECE = 2**24


class Slot(NamedTuple):
    """Where a tensor is held: a key of one of a module's dicts, or of a list."""

    owner: Any
    key: Any

    @property
    def held(self) -> Any:
        """The tensor that is there now, or None."""
        return self.owner[self.key]


def slots_of(modules: Iterable[nn.Module], kind: Literal["_parameters", "_buffers"]) -> list[Slot]:
    """Return where these modules hold their parameters, or their buffers, those that are None too."""
    # The dicts of a scripted module have items, but no iterator.
    owners = (getattr(module, kind) for module in modules)
    return [Slot(owner, name) for owner in owners for name, _ in owner.items()]


class Snapshot:
    """What slots and objects held when it was taken. Its memory is used again as long as the tensors are the same.

    It is taken at once, so an interrupt finds all of it or nothing.
    """

    def __init__(self) -> None:
        self.is_taken = False
        self._slots: list[Slot] = []
        self._held: list[Any] = []
        self._objects: list[tuple[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._aliases: list[Tensor] = []
        self._words: list[Tensor] = []
        self._values: list[Tensor] = []
        self._addresses: list[int] = []

    def take(self, slots: list[Slot], objects: Sequence[Any] = ()) -> None:
        """Save what is in these slots, and the states of these objects.

        Args:
            slots: of tensors or None.
            objects: with state_dict() and load_state_dict().
        """
        self.is_taken = False
        self._slots, self._held = slots, [slot.held for slot in slots]
        tensors = [local(t) for t in self._held if has_value(t)]
        if not self._fits(tensors):
            self._tensors, self._addresses = tensors, list(map(Tensor.data_ptr, tensors))
            self._aliases = [t.detach() for t in tensors]
            self._words = list(map(as_words, self._aliases))
            self._values = list(map(torch.empty_like, self._words))
        # The memory is a capture's too, whatever becomes of this snapshot.
        replay_tables.hold(*self._values)
        ops.copy_(self._values, self._words)
        self._objects = [(thing, copy.deepcopy(thing.state_dict())) for thing in objects]
        self.is_taken = True

    def put_back(self) -> list[Slot]:
        """Bring references and values back, if it was taken. Idempotent.

        Returns:
            The slots in which another tensor was meanwhile.
        """
        if not self.is_taken:
            return []
        replaced = [i for i, slot in enumerate(self._slots) if slot.held is not self._held[i]]
        for i in replaced:
            self._slots[i].owner[self._slots[i].key] = self._held[i]
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            for tensor, alias in zip(self._tensors, self._aliases, strict=True):
                # Somebody has assigned to tensor.data.
                tensor.data = alias
        ops.copy_(self._words, self._values)
        for thing, state in self._objects:
            thing.load_state_dict(copy.deepcopy(state))
        return [self._slots[i] for i in replaced]

    def drop(self) -> None:
        """Forget what was taken, but not the memory."""
        self.is_taken, self._slots, self._held, self._objects = False, [], [], []

    def value_of(self, tensor: Tensor) -> Tensor:
        """Return what one of the tensors held."""
        i = next(i for i, t in enumerate(self._tensors) if t is tensor)
        words = self._values[i]
        return (
            words if words.shape == tensor.shape else words.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        )

    def _fits(self, tensors: list[Tensor]) -> bool:
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and list(map(Tensor.data_ptr, tensors)) == self._addresses


def has_value(tensor: Any) -> bool:
    """Whether a tensor's entries can be copied out and in; of others the reference alone is kept."""
    if tensor is None or is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    # An expanded tensor has entries that share memory.
    return tensor.is_contiguous() or all(step or n <= 1 for step, n in zip(tensor.stride(), tensor.shape, strict=True))


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return a 0-dim int64 tensor that other contents, or another order of them, change."""
    words = as_words(local(tensor.detach())).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    # In pieces, since every word becomes an integer of 8 bytes.
    for piece in words.split(_PIECE):
        integers = piece.view(torch.uint8 if piece.element_size() == 1 else torch.int32).to(torch.int64)
        total = total * 1_000_003 + (integers * torch.arange(1, len(integers) + 1, device=words.device)).sum()
    return total
