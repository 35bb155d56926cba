"""The command line in the processes of torchrun: rank 0 reads, writes and speaks, the others only compute."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
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


# ---- last words: a rank leaves them in torchrun's store, which outlives all ranks. To ask it is no message. ------

PATIENCE = 5  # seconds that a rank waits for what another one says


def leave_word(line: str) -> None:
    if store := open_store():
        store.set(f"last word of rank {RANK}", line)


def must_say(line: str) -> bool:
    """Whether this rank prints the line that it ends with: rank 0 does, another one unless rank 0 says the same."""
    leave_word(line)
    return RANK == 0 or not hears(lambda store: last_word(store, 0) == line)


def peer_said_why() -> bool:
    """Whether another rank has said why it ended."""
    return hears(lambda store: any(last_word(store, rank) for rank in range(N_RANKS) if rank != RANK))


def last_word(store: dist.TCPStore, rank: int) -> str | None:
    name = f"last word of rank {rank}"
    return store.get(name).decode() if store.check([name]) else None


def hears(question: Callable[[dist.TCPStore], bool]) -> bool:
    """Whether the answer becomes yes before this rank's patience ends."""
    store, until = open_store(), time.monotonic() + PATIENCE
    while store and time.monotonic() < until:
        if question(store):
            return True
        time.sleep(0.05)
    return False


def open_store() -> dist.TCPStore | None:
    """None where there is none: in a single process, or where something else than torchrun has started the ranks."""
    if N_RANKS == 1:
        return None
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*where, timeout=timedelta(seconds=PATIENCE))
    except (RuntimeError, KeyError):
        return None


def lost_a_peer(error: BaseException | None) -> bool:
    """Whether this is what gloo or NCCL say when another rank has ended."""
    if N_RANKS == 1 or error is None:
        return False
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    told = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    return told or isinstance(error, dist.DistError) or lost_a_peer(error.__cause__)


def leave(status: int) -> int:
    """End a run. After a failure nothing is tidied up: torch would warn of a message under way, or wait for it."""
    if N_RANKS > 1 and status:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # it may be None or closed, and its reader gone
                stream.flush()
        os._exit(status)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return status
