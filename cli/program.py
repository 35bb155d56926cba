"""What every program here does with its flags, its mistakes and its notes."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable

from cli import ranks
from scope import one_line


def note(text: str, from_any_rank: bool = False) -> None:
    # sys.stderr is None where the shell has closed it; print would then write to standard output.
    if sys.stderr and (ranks.RANK == 0 or from_any_rank):
        print(text, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Mistakes are a ValueError of one line. `--max_new_tokens` is `--max-new-tokens`."""

    def parse_args(self, argv: list[str] | None = None, namespace=None) -> argparse.Namespace:
        argv = [dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
        arguments, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.error(f"unknown {' '.join(unknown)[:80]}" + self.nearest(unknown[0]))
        return arguments

    def nearest(self, word: str) -> str:
        """`--checkpoint_path` -> the flag that it begins with, `--prompts` -> the one that is spelt most like it."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        name = word.split("=")[0]
        near = [flag for flag in flags if name.startswith(flag) or (len(name) < 4 and flag[2:3] == name[1:2])]
        near += difflib.get_close_matches(name, flags, n=1)
        return f": did you mean {near[0]}?" if name.startswith("-") and near else ""

    def error(self, message: str):  # argparse would print the usage before its one line
        raise ValueError(f"{message} (see --help)")


def dashed(word: str) -> str:
    """--max_new_tokens=5 -> --max-new-tokens=5. What follows the "=" stays, and so does whatever is no flag."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.match(r"--[a-z]", name) else word


def run_program(name: str, work: Callable[[], None]) -> int:
    """The exit status. 0: done; 2: a mistake, said in one line; 1: the reader of our output has gone, or another rank;
    130: Ctrl-C."""
    try:
        return end_of(name, work)
    except KeyboardInterrupt:  # also while a lost rank is looked into: Ctrl-C has ended that one first
        ranks.leave_word("interrupted")
        note(f"\n{name}: interrupted")
        return 130


def end_of(name: str, work: Callable[[], None]) -> int:
    try:
        work()
        return 0
    except BrokenPipeError:
        from cli.output import silence_stdout

        silence_stdout()
        return 1
    except Exception as error:
        if ranks.lost_a_peer(error):
            if not ranks.peer_said_why():
                complain(name, f"another rank has ended: {one_line(error)}")
            return 1
        if not isinstance(error, ValueError | OSError):  # a crash, which Python reports
            ranks.leave_word(one_line(error))
            raise
        complain(name, one_line(error))
        return 2


def complain(name: str, mistake: str) -> None:
    """Say once what all ranks end with; a rank that is alone with it says its number."""
    if ranks.must_say(mistake):
        rank = f"rank {ranks.RANK}: " if ranks.RANK else ""
        note(f"{name}: {rank}error: {mistake}", from_any_rank=True)
