"""The memory that a piece of code takes, watched storage by storage.

`Live` follows every tensor that is made under it from its birth to its last reference. Over real
tensors it measures. Under torch's FakeTensorMode, where tensors have shapes and no data, the very
code of a training step runs in seconds whatever its size, and `Live` tells what the step will take.

Left out: what an allocator adds by rounding and fragmentation, and the workspaces of kernels.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Parts = dict[str, float]  # what a number of bytes is made of


class Live(TorchDispatchMode):
    """Bytes of the storages that operations under it make, as they come and go.

    Storages of `resident` tensors are known beforehand and not counted. `vocabulary` is the last
    dimension by which logits are told from other activations.
    """

    def __init__(self, resident: Iterable[Tensor] = (), vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.known: dict[int, int] = {}  # address of a storage -> number of its birth
        self.sizes: list[int] = []  # bytes, by number of birth
        self.names: dict[int, str] = {}  # number of birth -> what it holds, if not activations
        self.events: list[int] = []  # number + 1 for a birth, -(number + 1) for an end
        for tensor in resident:
            self.known[tensor.untyped_storage()._cdata] = -1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out

    def hold(self, tensor: Tensor, name: str | None = None) -> None:
        """Count `tensor`, as `name`, until nobody refers to its storage."""
        storage = tensor.untyped_storage()
        number = self.known.get(storage._cdata)
        if number is None:
            number = self.known[storage._cdata] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.events.append(number + 1)
            weakref.finalize(storage, self._drop, storage._cdata).atexit = False
            if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                self.names[number] = "logits"
        if name is not None:
            self.names[number] = name

    def _drop(self, address: int) -> None:
        self.events.append(-(self.known.pop(address) + 1))

    @property
    def peak(self) -> Parts:
        """What was live, by name, when most was."""
        best, when, now = 0, 0, 0
        for i, event in enumerate(self.events):
            now += self.sizes[event - 1] if event > 0 else -self.sizes[-event - 1]
            if now > best:
                best, when = now, i + 1
        return self._at(when)

    @property
    def end(self) -> Parts:
        """What is live now."""
        return self._at(len(self.events))

    def _at(self, when: int) -> Parts:
        alive: set[int] = set()
        for event in self.events[:when]:
            (alive.add if event > 0 else alive.discard)(abs(event) - 1)
        parts: Parts = {}
        for number in alive:
            name = self.names.get(number, "activations")
            parts[name] = parts.get(name, 0.0) + self.sizes[number]
        return parts
