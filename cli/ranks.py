"""The processes that torchrun starts, which share out one model. Rank 0 reads, writes and speaks; all compute."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from scope import one_line, require

N_RANKS = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if N_RANKS > 1 else 0


def join() -> tuple[int, int]:
    """(this process's rank, how many there are): (0, 1) unless torchrun has started several, whose group it joins."""
    n_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if n_ranks == 1:
        return 0, 1
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(days=1))  # a person may think for long between turns
        except (RuntimeError, ValueError) as error:
            why = f"{one_line(error)}: start all by torchrun, or unset WORLD_SIZE"
            raise ValueError(f"the group of {n_ranks} ranks cannot be joined: {why}") from None
    return dist.get_rank(), dist.get_world_size()


def take_device(name: str, n_ranks: int) -> str:
    """The device of this process. Of several ranks each takes the GPU with its number on its machine, where it has one;
    hf/ refuses a number that is too large."""
    if n_ranks == 1:
        return name
    require(name in ("auto", "cpu", "cuda"), "device", repr(name), "auto, cpu or cuda: each rank has its own")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    number = int(os.environ["LOCAL_RANK"])
    if number < torch.cuda.device_count():
        torch.cuda.set_device(number)  # for what else a library allocates
    return f"cuda:{number}"


# ---- what all ranks know ------------------------------------------------------------------------------------


def exchange(value, n_ranks: int) -> list:
    """The JSON values of all ranks, rank 0's first. They travel as bytes, not pickled: unpickling can run code."""
    if n_ranks == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.zeros(n_ranks, 1, dtype=torch.int64)
    dist.all_gather(list(sizes), torch.tensor([len(content)]))
    blocks = torch.zeros(n_ranks, int(sizes.max()), dtype=torch.uint8)
    dist.all_gather(list(blocks), torch.nn.functional.pad(content, (0, blocks.shape[1] - len(content))))
    return [json.loads(block[:size].numpy().tobytes()) for block, size in zip(blocks, sizes.flatten(), strict=True)]


@contextmanager
def all_or_none(n_ranks: int) -> Iterator[None]:
    """All ranks do what is in it, or none: a mistake on one of them is raised on each.

    Otherwise the others would go on to the next message, and wait there for the one that has left.
    """
    if n_ranks == 1:
        yield
        return
    mistake = None
    try:
        yield
    except (ValueError, OSError) as error:
        mistake = error
    said = exchange(mistake and one_line(mistake), n_ranks)
    wrong = [rank for rank, text in enumerate(said) if text is not None]
    if wrong:
        whose = f"rank {wrong[0]}: " if wrong[0] else ""
        raise ValueError(whose + said[wrong[0]]) from mistake


def from_first(work: Callable):
    """What work() returns on rank 0, a JSON value, on every rank, and its mistake too. Only rank 0 calls it."""
    value = None
    with all_or_none(N_RANKS):
        if RANK == 0:
            value = work()
    return exchange(value, N_RANKS)[0]


@contextmanager
def entered(manager: AbstractContextManager) -> Iterator[None]:
    """`with manager`, but a mistake in entering it on one rank is raised on all."""
    with ExitStack() as stack:
        with all_or_none(N_RANKS):
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
