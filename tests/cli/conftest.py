"""Checkpoints, and functions that run the command line on them."""

import io
import os
import shutil
import sys

import pytest

import generate
from checkpoints import make_checkpoint, write_json
from cli.main import main
from generate import load
from runs import PROMPT, Run, contents


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """A checkpoint with a chat template."""
    return make_checkpoint(tmp_path_factory.mktemp("chatty"), "tokenizers")


@pytest.fixture(scope="session")
def stopping(tiny, tmp_path_factory):
    """`tiny`, made to stop in the middle of its greedy answer to PROMPT, at a token that one can see."""
    model, tokenizer = load(str(tiny))
    [result] = generate.generate(model, tokenizer, [PROMPT], "full", compile=False, max_new_tokens=40, ignore_eos=True)
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("stopping"), dirs_exist_ok=True)
    seen = [i for n, i in enumerate(result.token_ids) if n > 8 and tokenizer.decode([i]).isalpha()]
    write_json(folder / "generation_config.json", {"eos_token_id": [seen[0], 2]})
    return folder


@pytest.fixture
def run(capsys, tmp_path, tiny):
    """run("--heavy 3", "--prompt", ...) -> Run, on the tiny checkpoint unless another is named."""

    def run(flags="", *argv, checkpoint=tiny):
        return Run(capsys, tmp_path, ["--checkpoint", str(checkpoint), *flags.split(), *argv])

    return run


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch, tiny):
    """Runs in a folder with files of value; what is refused says so in one line and touches none of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    (tmp_path / "folder").mkdir()
    for name in ("one.txt", "one.npz", "rows.jsonl"):
        (tmp_path / name).write_text("precious")
    os.link(tmp_path / "one.npz", tmp_path / "hard.npz")

    def refused(*argv, checkpoint=tiny, overwrite=True):
        if "--output" not in argv:
            argv = ("--output", "rows.jsonl", *argv)
        if overwrite:
            argv = ("--overwrite", *argv)
        before = contents(tmp_path)
        status = main(["--checkpoint", str(checkpoint), "--no-compile", "--max-new-tokens", "3", *argv])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("loading ")]
        assert (status, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("generate.py: error: ") and contents(tmp_path) == before
        return lines[0]

    return refused
