"""Outputs that are checked before a run, keep every finished row, and are never half written."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unicodedata import category

fcntl = None
with contextlib.suppress(ImportError):
    import fcntl  # locks --output; Windows has none


def check_outputs(outputs: dict[str, str | None], inputs: dict[str, str | None] | None = None) -> None:
    """Refuse an output that could not be written or would replace another file of the run. Flags -> paths or None.

    An input that is a folder is a checkpoint: none of its files is an output.
    """
    others = {flag: Path(path) for flag, path in (inputs or {}).items() if path is not None}
    for flag, path in ((flag, Path(path)) for flag, path in outputs.items() if path is not None):
        if not outputs[flag] or path.is_dir():
            raise ValueError(f"{flag} {outputs[flag]!r} is no file name: give a file")
        if not path.parent.is_dir():
            raise ValueError(f"{flag} {path}: there is no directory {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{flag} {path} cannot be written: no permission")
        if path.exists() and not path.is_file() and flag != "--output":
            raise ValueError(f"{flag} {path} is no regular file: it would be replaced, so give a file")
        for name, other in others.items():
            if other.is_dir() and same_file(path.resolve().parent, other):
                raise ValueError(f"{flag} {path} lies in {name} {other}: the run reads that folder, so give another")
            if same_file(path, other):
                raise ValueError(f"{name}, {flag} name the same file, {path}: give each its own")
        others[flag] = path


def same_file(a: Path, b: Path) -> bool:
    """Whether two names mean one file: two links to it are one, and so is a name of a file that is still to be made."""
    return a.samefile(b) if a.exists() and b.exists() else a.resolve() == b.resolve()


def silence_stdout() -> None:
    """Nobody takes what is printed: Python would say so once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def replace_file(path: str, write: Callable) -> None:
    """write(file) makes the new content; the old file stays until it is complete. A link is followed."""
    whole = Path(path).resolve()
    unfinished = whole.with_name(whole.name + ".part")
    try:
        with open(unfinished, "wb") as file:
            write(file)
        unfinished.replace(whole)
    finally:
        unfinished.unlink(missing_ok=True)


class RowFile:
    """--output: a .jsonl file that keeps every row it was given. Without a path, the rows go nowhere.

    A file that has rows is refused, unless the run resumes it or may overwrite it; then it is emptied when the first
    row comes, not before. A second run on the same file is refused.
    """

    def __init__(self, path: str | None, resume: bool = False, overwrite: bool = False):
        self.path = path or os.devnull
        self.resume = resume
        self.rows = 0
        if resume and overwrite:
            raise ValueError("--resume and --overwrite: give one of them")
        if (resume or overwrite) and path is None:
            raise ValueError(f"--{'resume' if resume else 'overwrite'} is about --output: name a file there")
        has_rows = os.path.isfile(self.path) and os.path.getsize(self.path) > 0
        if has_rows and not (resume or overwrite):
            raise ValueError(f"--output {path} has rows: --resume goes on with them, --overwrite replaces them")

    def __enter__(self) -> "RowFile":
        existed = os.path.exists(self.path)
        self.file = open(self.path, "ab", buffering=0)
        self.regular = Path(self.path).is_file()
        self.is_new = self.regular and not existed
        if self.regular and fcntl:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.file.close()
                raise ValueError(f"--output {self.path}: another run is writing to it, so give another file") from None
        return self

    def finished(self, settings: dict, digests: list[str]) -> set[tuple[int, int]]:
        """--resume: (index, sample) of each row; the prompts have these digests. A half-written last line is cut off.

        Raises ValueError where the rows belong to another run.
        """
        if not (self.resume and self.regular):
            return set()
        content = Path(self.path).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        done = {self.answer_of(line, n, settings, digests) for n, line in enumerate(whole.splitlines(), 1)}
        if len(whole) < len(content):
            self.file.truncate(len(whole))
        return done

    def answer_of(self, line: bytes, number: int, settings: dict, digests: list[str]) -> tuple[int, int]:
        where = f"--output {self.path}:{number}"
        try:
            row = json.loads(line)
            index, sample, prompt_digest, theirs = (row[x] for x in ("index", "sample", "prompt_digest", "settings"))
            differs = [name for name in settings if theirs.get(name) != settings[name]]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{where} is no row of this program: give another file, or --overwrite") from None
        if differs:
            name = differs[0]
            was = f"was made with {name} {theirs.get(name)!r}, this run has {settings[name]!r}"
            raise ValueError(f"{where} {was}: give the same settings, another file, or --overwrite")
        if not (type(index) is int and 0 <= index < len(digests) and digests[index] == prompt_digest):
            raise ValueError(f"{where} answers another prompt than number {index} of this run: give another file")
        return index, sample

    def write(self, row: dict) -> None:
        if self.regular and not self.rows and not self.resume:
            self.file.truncate(0)
        self.rows += 1
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        end = self.file.seek(0, os.SEEK_END) if self.regular else 0
        try:
            if self.file.write(line) < len(line):
                raise OSError(f"--output {self.path}: the disk is full, {self.rows - 1} rows are in the file")
        except OSError:
            if self.regular:
                self.file.truncate(end)  # no half a row
            raise

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.is_new and not self.rows:
            os.unlink(self.path)


class Printer:
    """Standard output. The first unfinished answer streams; the text of those after it waits.

    goes_on: the run goes on where standard output takes no more, because its rows go to a file; `close` then says so.
    """

    def __init__(self, numbers: list[int], goes_on: bool = False):
        self.numbers = list(numbers)  # of the answers that are not through; the first one streams
        self.goes_on = goes_on
        self.failed: OSError | None = None
        self.waiting: dict[int, str] = {}
        self.last = ""

    def print_piece(self, number: int, piece: str) -> None:
        if number != self.numbers[0]:
            self.waiting[number] = self.waiting.get(number, "") + piece
        elif piece:
            self.last = piece
            self.show(piece)

    def show(self, text: str) -> None:
        if self.failed:
            return
        if sys.stdout.isatty():  # what a model writes may not move the cursor or rename the window
            text = "".join(char if category(char) != "Cc" or char in "\n\t" else "\ufffd" for char in text)
        try:
            print(text, end="", flush=True)
        except OSError as error:
            self.failed = error
            silence_stdout()
            if not self.goes_on:
                raise

    def close(self) -> None:
        if self.failed:
            raise self.failed

    def end_answer(self) -> None:
        self.show("" if self.last.endswith("\n") else "\n")
        self.last = ""
        self.numbers.pop(0)
        if self.numbers:
            self.print_piece(self.numbers[0], self.waiting.pop(self.numbers[0], ""))
