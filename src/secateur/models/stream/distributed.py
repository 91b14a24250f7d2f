"""Several processes on one run: `torchrun --nproc-per-node N -m secateur prune …`, on any machines.

Every rank has its share of the calibration windows and of the matrices to solve. Statistics are
sums, so they are reduced, and solved weights are handed round. Each rank then holds the same block
and goes on. Rank 0 alone writes.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import RankLost, SecateurError, in_one_line
from secateur.methods.statistics import Stats

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`. All must call the same things in the same order.

    Raises RankLost where another rank has died; an error of ours on one rank is raised on all.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, things: Sequence[Value]) -> list[Value]:
        """This rank's share: every `size`-th, from its own number on."""
        return list(things[self.rank :: self.size])

    def same(self, compute: Callable[[], Value]) -> Value:
        """What `compute()` gives on rank 0, everywhere. The value is pickled."""
        if self.size == 1:
            return compute()
        return self._answers(compute if self.first else lambda: None)[0]

    def together(self, compute: Callable[[], Value]) -> list[Value]:
        """What `compute()` gives on each rank, in order."""
        return [compute()] if self.size == 1 else self._answers(compute)

    @contextmanager
    def on_first(self, context: AbstractContextManager[Value]) -> Iterator[Value | None]:
        """Enter a context on rank 0 alone, which gives its value there and None elsewhere."""
        with ExitStack() as stack:
            entered: list[Value] = []
            self.same(lambda: entered.append(stack.enter_context(context)))
            yield entered[0] if entered else None

    def add(self, stats: Mapping[str, Stats]) -> dict[str, Stats]:
        """The sums of all ranks, by matrix; a rank may have seen no token of one."""
        if self.size == 1:
            return dict(stats)
        seen: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {}
        for rank in self._answers(lambda: {n: (s.tokens, _shapes(s)) for n, s in stats.items()}):
            for name, (tokens, shapes) in rank.items():
                seen[name] = (tokens + seen.get(name, (0, {}))[0], shapes)
        total = {}
        for name, (tokens, shapes) in seen.items():
            own = stats[name].sums if name in stats else {}
            sums = {what: self._sum(own.get(what), shape) for what, shape in shapes.items()}
            total[name] = Stats(tokens, sums)
        return total

    def hand_round(self, tensor: Tensor, owner: int) -> Tensor:
        """A tensor of any dtype as rank `owner` has it; the others give one of the same shape."""
        if self.size == 1:
            return tensor
        raw = tensor.contiguous().flatten().view(torch.uint8)
        raw = raw if dist.get_backend() == "gloo" else raw.cuda()
        with _others():
            dist.broadcast(raw, owner)
        return raw.to(tensor.device).view(tensor.dtype).view(tensor.shape)

    def _sum(self, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.zeros(shape, dtype=torch.float64) if tensor is None else tensor
        device = tensor.device
        tensor = tensor if dist.get_backend() == "gloo" else tensor.cuda()
        with _others():
            dist.all_reduce(tensor)
        return tensor.to(device)

    def _answers(self, compute: Callable[[], Any]) -> list[Any]:
        """Everybody's answer; an error on one rank is everybody's."""
        try:
            answer: tuple[Any, SecateurError | None] = compute(), None
        except SecateurError as error:
            answer = None, error
        answers: list[Any] = [None] * self.size
        with _others():
            dist.all_gather_object(answers, answer)
        for _, error in answers:
            if error is not None:
                raise error
        return [value for value, _ in answers]


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks that torchrun has started, and this one's share of the devices; else one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    with _others():
        backend, week = "nccl" if cuda else "gloo", timedelta(days=7)  # planning may take long
        dist.init_process_group(backend, timeout=week)
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if cuda:
            torch.cuda.set_device(local)
        yield Ranks(dist.get_rank(), size), f"cuda:{local}" if cuda else device
    finally:
        dist.destroy_process_group()


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"Another process of this run has died ({in_one_line(error, 120)}). What is finished "
            "is kept: the same command goes on, and pruning does with another number of processes "
            "too."
        ) from error


def _shapes(stats: Stats) -> dict[str, tuple[int, ...]]:
    return {name: tuple(total.shape) for name, total in stats.sums.items()}
