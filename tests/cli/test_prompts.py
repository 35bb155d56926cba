"""Where prompts come from, what a row of a prompt file may say, and flags as people type them."""

import io
import json
import sys

import pytest

from generate import generate, load
from runs import FIVE, PROMPT, SHORT, write_lines


@pytest.mark.parametrize("added", ["\n", "\r\n"])
def test_the_line_break_that_echo_adds_is_not_in_the_prompt(run, monkeypatch, added):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + added, newline=""))
    piped = run(" ".join(SHORT), "-")
    assert piped.ids == run(" ".join(SHORT), "--prompt", PROMPT).ids
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n\n"))
    assert run(" ".join(SHORT), "-").rows[0]["prompt_len"] > piped.rows[0]["prompt_len"]


@pytest.mark.parametrize("name", ["five.jsonl", "five.JSONL", "five.ndjson", "five.json", "five.JSON"])
def test_the_name_of_a_file_says_what_it_holds(run, tmp_path, name):
    whole = json.dumps(FIVE, indent=1)
    lines = "".join(json.dumps(row) + "\n" for row in FIVE)
    (tmp_path / name).write_text(whole if name.lower().endswith(".json") else lines)
    rows = run(" ".join(SHORT), "--prompt-file", str(tmp_path / name)).rows
    assert [row["prompt_len"] for row in rows] == [3, 1, 17, 3, 5]


def test_a_json_file_may_be_one_prompt(run, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"prompt": PROMPT, "id": "a"}))
    [row] = run(" ".join(SHORT), "--prompt-file", str(tmp_path / "one.json")).rows
    assert (row["prompt_len"], row["id"]) == (17, "a")


def test_an_id_comes_back_and_a_row_may_have_a_shorter_answer(run, tmp_path):
    rows = [{"prompt": PROMPT, "id": {"a": 1}, "max_new_tokens": 2}, {"prompt": PROMPT}]
    short, long = run(" ".join(SHORT), "--prompt-file", write_lines(tmp_path / "two.jsonl", rows)).rows
    assert short["id"] == {"a": 1} and "id" not in long
    assert short["token_ids"] == long["token_ids"][:2] and len(long["token_ids"]) == 6
    assert short["finish_reason"] == "length"


def test_messages_are_rendered_by_the_chat_template_with_and_without_chat(run, tmp_path, chatty):
    tokenizer = load(str(chatty))[1]
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
    said += [{"role": "user", "content": "the mat"}]
    file = write_lines(tmp_path / "said.jsonl", [{"messages": said}])
    for flags in ([], ["--chat"]):
        [row] = run(" ".join(SHORT), "--prompt-file", file, *flags, checkpoint=chatty).rows
        assert row["prompt_len"] == len(tokenizer.chat(said))


def test_system_comes_before_every_chat_that_has_none_of_its_own(run, tmp_path, chatty):
    tokenizer = load(str(chatty))[1]
    system, own = ({"role": "system", "content": text} for text in ("a mat", "a b"))
    user = {"role": "user", "content": "the cat"}
    file = write_lines(
        tmp_path / "three.jsonl", [{"messages": [user]}, {"messages": [own, user]}, {"prompt": "the cat"}]
    )
    rows = run(" ".join(SHORT), "--chat", "--system", "a mat", "--prompt-file", file, checkpoint=chatty).rows
    wanted = [[system, user], [own, user], [system, user]]
    assert [row["prompt_len"] for row in rows] == [len(tokenizer.chat(messages)) for messages in wanted]


def test_system_without_a_chat_is_refused(refused):
    assert "--system is a chat's: add --chat" in refused("--prompt", "the cat", "--system", "x")


ROWS = {
    '{"prompt": "x", "temperature": 1}': "'temperature' is no field of a prompt",
    '{"prompt": "x", "max_new_tokens": 0}': "max_new_tokens is 0",
    '{"prompt": "x", "max_new_tokens": "3"}': 'max_new_tokens is "3"',
    '{"prompt": "x", "max_new_tokens": 4}': "wants max_new_tokens 4, --max-new-tokens is 3",
    '{"messages": []}': "messages must be",
    '{"messages": [{"role": "user"}]}': "messages must be",
    '{"messages": [{"role": "user", "content": "x"}]}': "no chat template",
    '{"prompt": "x", "messages": []}': "one of",
    "[" * 100000: "broken JSON",
    '{"prompt": ' + "1" * 5000 + "}": "broken JSON",
}


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_what_a_row_says_is_obeyed_or_refused(refused, tmp_path, row):
    (tmp_path / "bad.jsonl").write_text(row)
    assert ROWS[row] in refused("--prompt-file", "bad.jsonl")


def test_a_broken_json_file_is_refused(refused, tmp_path):
    (tmp_path / "bad.json").write_text('[{"prompt": "x"}, 5]')
    assert "bad.json, row 1: one of" in refused("--prompt-file", "bad.json")


# ---- flags


def test_underscores_are_dashes(run):
    typed = ["--max_new_tokens", "5", "--no_compile", "--prompt=the_cat"]
    [row] = run("--ignore_eos", *typed).rows
    assert len(row["token_ids"]) == 5 and row["prompt_len"] > 3


TYPED = {
    "--checkpoint-path X": "unknown --checkpoint-path: did you mean --checkpoint?",
    "--checkpoint_path X": "did you mean --checkpoint?",
    "-p hi": "unknown -p: did you mean --prompt?",
    "--temprature=1": "did you mean --temperature?",
    "hello": "unexpected 'hello': a prompt follows --prompt",
    "--nonsense-that-is-like-nothing": "unknown --nonsense-that-is-like-nothing (see --help)",
}


@pytest.mark.parametrize("flags", TYPED)
def test_a_mistyped_flag_is_named_with_the_nearest_one(refused, flags):
    assert TYPED[flags] in refused(*flags.split())


# ---- --stop


def test_an_answer_ends_before_a_stop_text(run):
    whole = run("--no-compile --ignore-eos --max-new-tokens 48 --policy full", "--prompt", PROMPT)
    stop = whole.rows[0]["text"][20:24]
    cut = run("--no-compile --ignore-eos --max-new-tokens 48 --policy full", "--prompt", PROMPT, "--stop", stop)
    [row], [long] = cut.rows, whole.rows
    assert row["text"] == long["text"][: long["text"].index(stop)] == cut.out.removesuffix("\n")
    assert row["finish_reason"] == "stop" and row["token_ids"] == long["token_ids"][: len(row["token_ids"])]
    assert len(row["token_ids"]) == row["stats"]["steps"] + 1 < 48


@pytest.mark.parametrize("read_every", [1, 8])
def test_streamed_text_never_holds_a_part_of_a_stop_text(tiny, monkeypatch, read_every):
    """A device that runs ahead makes no difference."""
    monkeypatch.setattr("generate.READ_EVERY", {"cpu": read_every})
    model, tokenizer = load(str(tiny))
    settings = {"compile": False, "max_new_tokens": 40, "ignore_eos": True, "temperature": 1.5}
    [whole] = generate(model, tokenizer, [PROMPT], "full", **settings)
    pieces = []
    settings["on_text"] = lambda _, piece: pieces.append(piece)
    for start in range(0, 30, 3):
        stops = (whole.text[start + 4 : start + 9], "never in it")
        pieces.clear()
        [cut] = generate(model, tokenizer, [PROMPT], "full", stop=stops, **settings)
        assert cut.text == whole.text[: whole.text.index(stops[0])] == "".join(pieces)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_a_stop_text_that_never_comes_loses_no_text(run):
    whole = run("--no-compile --ignore-eos --max-new-tokens 20", "--prompt", PROMPT)
    last = whole.rows[0]["text"][-1]
    assert (
        run("--no-compile --ignore-eos --max-new-tokens 20 --stop", last + "\n\n", "--prompt", PROMPT).out == whole.out
    )


def test_an_empty_stop_text_is_refused(refused):
    assert "stop is ['']" in refused("--prompt", "x", "--stop", "")
