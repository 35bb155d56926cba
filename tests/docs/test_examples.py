"""examples/ runs from the repository's root with the bundled model, and says what is true."""

import runpy
from pathlib import Path

import pytest

from examples.own_attention import decode_greedily
from generate import MINI, generate, load

ROOT = Path(__file__).parent.parent.parent


def run(script: str, monkeypatch, capsys) -> list[str]:
    """The lines that a script prints."""
    monkeypatch.chdir(ROOT)
    runpy.run_path(script, run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_call_it_compares_two_policies(monkeypatch, capsys):
    full, _, full_bytes, evicting, _, fewer_bytes = run("examples/call_it.py", monkeypatch, capsys)
    assert full.removeprefix("full") == evicting.removeprefix("discontinuous") == ": 438 tokens, finished by stop"
    assert full_bytes == "  512 decode slots per KV head, 860,232 bytes of KV cache"
    assert fewer_bytes == "  193 decode slots per KV head, 529,736 bytes of KV cache"


def test_own_attention_prints_both_windows(monkeypatch, capsys):
    whole, narrow = run("examples/own_attention.py", monkeypatch, capsys)
    assert "The answer is 30." in whole
    assert "The answer is 30." not in narrow


@pytest.fixture(scope="module")
def mini():
    return load("checkpoints/mini", dtype="float32")


def test_a_window_that_holds_everything_equals_the_full_cache(mini):
    model, tokenizer = mini
    prompt = (MINI / "demo.txt").read_text()
    [full] = generate(model, tokenizer, [prompt], "full", max_new_tokens=60, compile=False)
    ids = tokenizer.encode(prompt)
    assert decode_greedily(model, ids, len(ids) + 60, 60) == full.token_ids
    assert decode_greedily(model, ids, 64, 60) != full.token_ids
