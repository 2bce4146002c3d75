"""Two processes that send each other tensors while they compute: how the towers of `model/parallel.py` talk."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=45)
"""How long a process waits for another one before it gives up."""


class PeerLostError(RuntimeError):
    """The process of the other tower is gone, or has been silent for too long."""


class Peer:
    """The process that holds the other tower of the same replica."""

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self.group, self._timeout = group, timeout
        self.tower = dist.get_rank(group)
        """Which one is ours, 0 or 1."""
        self.rank = dist.get_global_rank(group, 1 - self.tower)
        """The other process's rank in the world."""
        self.bytes_sent = 0
        """By this process, so far."""

    def exchange(self, mine: torch.Tensor, theirs: torch.Size | None = None) -> "Transfer":
        """Begin to send a tensor and to receive the peer's, of the same shape unless `theirs` says otherwise, with the
        same dtype and memory format."""
        return Transfer(self, mine, mine.shape if theirs is None else theirs)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what a backend raises when the other end is gone into `PeerLostError`."""
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(
                f"the process of the other tower (rank {self.rank}) is gone or has been silent for "
                f"{self._timeout.seconds} s; what it said last tells why ({reason_of(error)})"
            ) from None


def reason_of(error: RuntimeError) -> str:
    """The heart of what a backend raised: one sentence, without the place in its source."""
    line = str(error).splitlines()[0]
    return line.rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or line


class Transfer:
    """A tensor on its way to the peer, and the peer's on its way to us."""

    def __init__(self, peer: Peer, mine: torch.Tensor, theirs: torch.Size) -> None:
        self._peer, self._channels_last = peer, mine.ndim == 4
        if self._channels_last:  # as C-contiguous (N, H, W, C): what backends take
            mine = mine.permute(0, 2, 3, 1)
            theirs = torch.Size(theirs[n] for n in (0, 2, 3, 1))
        # Both are kept until they have arrived: nothing else holds them.
        self._mine, self._theirs = mine.contiguous(), mine.new_empty(theirs)
        peer.bytes_sent += self._mine.nbytes
        with peer.watched():
            self._works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, self._mine, peer.rank, peer.group),
                    dist.P2POp(dist.irecv, self._theirs, peer.rank, peer.group),
                ]
            )

    def wait(self) -> torch.Tensor:
        """What the peer sent. Raises `PeerLostError`."""
        with self._peer.watched():
            for work in self._works:
                work.wait()
        return self._theirs.permute(0, 3, 1, 2) if self._channels_last else self._theirs
