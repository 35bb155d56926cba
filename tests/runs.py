"""Runs of generate.py's command line, in this process, and what they leave behind."""

import io
import json
from pathlib import Path

import generate
from cli.main import main

SCRIPT = Path(generate.__file__)
PROMPT = "the cat and a dog sat on the mat"
SHORT = ["--no-compile", "--max-new-tokens", "6", "--ignore-eos"]
FIVE = [{"prompt": "the cat"}, {"prompt_ids": [5]}, {"prompt": PROMPT}, {"prompt_ids": [9, 8, 7]}, {"prompt": "a dog"}]


class Run:
    """`generate.py` with these arguments: its exit status, what it printed, and the rows of its --output."""

    def __init__(self, capsys, folder, argv, overwrite=True):
        self.output = folder / "rows.jsonl"
        self.status = main([*argv, "--output", str(self.output), *(["--overwrite"] if overwrite else [])])
        self.out, err = capsys.readouterr()
        self.err = [line for line in err.splitlines() if line and not line.startswith("loading ")]
        lines = self.output.read_text(encoding="utf-8").splitlines() if self.status == 0 else []
        self.rows = [json.loads(line) for line in lines]

    @property
    def ids(self):
        return [row["token_ids"] for row in self.rows]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def contents(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def interrupt(*anything, **whatever):
    raise KeyboardInterrupt
