"""The command line in the processes of torchrun: rank 0 reads, writes and speaks, the others only compute."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta

import torch.distributed as dist

from generate import exchange, together

N_RANKS = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if N_RANKS > 1 else 0


def from_first(work: Callable):
    """What work() returns on rank 0, a JSON value, on every rank, and its mistake too. Only rank 0 calls it."""
    value = None
    with together(N_RANKS):
        if RANK == 0:
            value = work()
    return exchange(value, N_RANKS)[0]


@contextmanager
def entered(manager: AbstractContextManager) -> Iterator[None]:
    """`with manager`, but a mistake in entering it on one rank is raised on all."""
    with ExitStack() as stack:
        with together(N_RANKS):
            stack.enter_context(manager)
        yield


LAST_WORDS = "scope: what rank 0 ends with"
PATIENCE = 5  # seconds that a rank waits for rank 0 to say the same


def must_say(line: str) -> bool:
    """Whether this rank prints the line that it ends with: rank 0 does, another one unless rank 0 says the same.

    torchrun's store tells. It outlives the ranks, and to ask it is no message that all ranks must join.
    """
    if N_RANKS == 1:
        return True
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*where, timeout=timedelta(seconds=PATIENCE))
        if RANK == 0:
            store.set(LAST_WORDS, line)
            return True
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if store.check([LAST_WORDS]) and store.get(LAST_WORDS).decode() == line:
                return False
            time.sleep(0.05)
        return True
    except (RuntimeError, KeyError):  # there is no store
        return True


def lost_a_peer(error: BaseException | None) -> bool:
    """Whether this is what gloo or NCCL say when another rank has ended: that one has said why."""
    if N_RANKS == 1 or error is None:
        return False
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    told = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    return told or isinstance(error, dist.DistError) or lost_a_peer(error.__cause__)


def leave() -> None:
    """At the end of a run that went well; after a mistake NCCL might wait here for ranks that have gone."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
