"""The block after the one at hand, read and moved to the GPUs while that computes.

On a CPU a second block would only take memory, and the processor from the first.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from secateur.models.replay import working_copy


def wanted(devices: Sequence[torch.device]) -> bool:
    """Whether blocks are moved ahead to these devices."""
    return all(device.type == "cuda" for device in devices)


class Prefetch:
    """Working copies of one block, a device each, that a thread of its own makes."""

    def __init__(self, devices: Sequence[torch.device], dtype: torch.dtype | None) -> None:
        self.devices, self.dtype = devices, dtype
        self._thread = ThreadPoolExecutor(1) if wanted(devices) else None
        self._begun: tuple[int, Future[list[nn.Module]]] | None = None

    def begin(self, index: int, block: nn.Module) -> None:
        """Make copies of the block of that number."""
        if self._thread:
            self._begun = index, self._thread.submit(self._copies, block)

    def take(self, index: int) -> list[nn.Module] | None:
        """The copies of that block; None where there are none, or a device had no room for them."""
        begun, self._begun = self._begun, None
        try:
            return begun[1].result() if begun and begun[0] == index else None
        except torch.OutOfMemoryError:
            return None

    def _copies(self, block: nn.Module) -> list[nn.Module]:
        """Finished copies; on a GPU they do not wait for what that computes."""
        copies = []
        for device in self.devices:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            with torch.cuda.stream(stream):
                copies.append(working_copy(block, device, self.dtype))
            if stream:
                stream.synchronize()
        return copies
