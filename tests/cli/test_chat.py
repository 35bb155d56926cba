"""--chat: a conversation in which each turn reads only what is new."""

import io
import json
import shutil
import signal
import sys

import pytest

import generate
from checkpoints import write_json
from cli.main import main
from generate import load
from runs import SHORT, Terminal, interrupt, write_lines


def messages(*texts):
    return [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(texts), texts, strict=False)
    ]


def test_a_conversation_reads_each_turn_once_and_remembers_all(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na dog\nthe mat\n"))
    result = run(" ".join(SHORT), "--chat", "--policy", "full", checkpoint=chatty)
    model, tokenizer = load(str(chatty))
    conversation, turns = [], [tokenizer.chat(messages(text)) for text in ("the cat", "a dog", "the mat")]
    turns[1:] = [ids[1:] for ids in turns[1:]]  # the template writes its bos once
    for new, row in zip(turns, result.rows, strict=True):
        unread = 0 if not conversation else 1  # an answer's last token was generated and not yet read
        assert row["prompt_len"] == unread + len(new)
        conversation += new
        [again] = generate.generate(model, tokenizer, [conversation], "full", max_new_tokens=6, compile=False)
        assert row["token_ids"] == again.token_ids
        conversation += row["token_ids"]
    assert [row["index"] for row in result.rows] == [0, 1, 2]
    assert result.status == 0 and result.out == "".join(row["text"].removesuffix("\n") + "\n" for row in result.rows)


def rewritten(chatty, tmp_path, template):
    """`chatty` with another chat template."""
    folder = shutil.copytree(chatty, tmp_path / "rewritten")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": template})
    return folder


def test_a_template_that_changes_earlier_turns_makes_the_conversation_be_read_again(
    run, monkeypatch, tmp_path, chatty, caplog
):
    counting = "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    folder = rewritten(chatty, tmp_path, counting)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na dog\n"))
    first, second = run(" ".join(SHORT), "--chat", checkpoint=folder).rows
    whole = load(str(folder))[1].chat(messages("the cat", first["text"], "a dog"))
    assert second["prompt_len"] == len(whole)
    assert "the conversation is read again" in caplog.text


def test_on_a_terminal_a_prompt_is_only_the_first_turn(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", Terminal("a dog\n"))
    assert len(run(" ".join(SHORT), "--chat", "--prompt", "the cat", checkpoint=chatty).rows) == 2


def test_without_a_terminal_a_prompt_is_the_whole_conversation(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a dog\n"))
    assert len(run(" ".join(SHORT), "--chat", "--prompt", "the cat", checkpoint=chatty).rows) == 1


def test_an_empty_line_is_no_turn(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nthe cat\n   \n\na dog\n"))
    result = run(" ".join(SHORT), "--chat", checkpoint=chatty)
    assert len(result.rows) == 2


def test_a_terminal_is_told_how_to_leave_and_each_turn_ends_in_one_line(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", Terminal("the cat\na dog\n"))
    result = run(" ".join(SHORT), "--chat", checkpoint=chatty)
    turns = [line for line in result.err if "slots are left" in line]
    assert "Ctrl-D" in result.err[0] and len(turns) == 2
    slots = [int(turn.split("; ")[1].split()[0]) for turn in turns]
    assert all("6 tokens" in turn for turn in turns) and slots[0] > slots[1]


def test_a_single_turn_without_a_terminal_takes_the_slots_of_one_turn(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    [row] = run(" ".join(SHORT), "--chat", "--prompt", "the cat", checkpoint=chatty).rows
    assert row["stats"]["prompt_slots"] == 64


def test_a_system_message_opens_a_conversation(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na dog\n"))
    rows = run(" ".join(SHORT), "--chat", "--system", "a mat", checkpoint=chatty).rows
    whole = [{"role": "system", "content": "a mat"}, *messages("the cat")]
    assert rows[0]["prompt_len"] == len(load(str(chatty))[1].chat(whole)) and len(rows) == 2


@pytest.mark.parametrize("policy", ["slide", "h2o"])
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(run, monkeypatch, chatty, policy):
    """What was said stays: the next turn reads on top of it, as if the answer had been that short."""
    settings = f"--no-compile --ignore-eos --policy {policy} --heavy 4 --recent 4"
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na dog\n"))
    wanted = run(settings + " --max-new-tokens 30", "--chat", checkpoint=chatty)
    decode, pressed = generate.Engine.decode, []

    def press_at_step_five(engine, t, graph_key=None):
        if t == 5 and not pressed:
            pressed.append(t)
            signal.raise_signal(signal.SIGINT)
        return decode(engine, t, graph_key)

    monkeypatch.setattr(generate.Engine, "decode", press_at_step_five)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na dog\n"))
    result = run(settings + " --max-new-tokens 30", "--chat", checkpoint=chatty)
    first, second = result.rows
    assert result.status == 0 and first["finish_reason"] == "interrupted"
    assert first["token_ids"] == wanted.rows[0]["token_ids"][:6]
    assert "stopped by Ctrl-C" in result.err[0] and len(second["token_ids"]) == 30
    unread_and_turn = 1 + len(load(str(chatty))[1].chat(messages("a dog"))[1:])
    assert second["prompt_len"] == unread_and_turn


def test_ctrl_c_pressed_twice_in_an_answer_ends_the_program(capsys, monkeypatch, chatty):
    def press(engine, t, graph_key=None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate.Engine, "decode", press)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert main(["--checkpoint", str(chatty), "--chat", *SHORT]) == 130


def test_the_prompt_sign_of_a_terminal_is_no_generated_text(run, monkeypatch, chatty):
    monkeypatch.setattr(sys, "stdin", Terminal("a dog\n"))
    result = run(" ".join(SHORT), "--chat", checkpoint=chatty)
    assert result.out == result.rows[0]["text"].removesuffix("\n") + "\n"


def test_a_conversation_that_outgrows_the_model_ends_in_one_line_and_keeps_its_rows(
    capsys, tmp_path, monkeypatch, chatty
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na dog\n"))
    output = tmp_path / "rows.jsonl"
    status = main(
        ["--checkpoint", str(chatty), "--no-compile", "--chat", "--output", str(output), "--max-new-tokens", "500"]
    )
    assert status == 2 and "512 positions" in capsys.readouterr().err.splitlines()[-1]
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == [0]


def test_chat_with_a_prompt_file_answers_each_prompt_by_itself(run, tmp_path, chatty):
    file = write_lines(tmp_path / "two.jsonl", [{"prompt": "the cat"}, {"prompt": "a dog"}])
    rows = run(" ".join(SHORT), "--chat", "--prompt-file", file, checkpoint=chatty).rows
    tokenizer = load(str(chatty))[1]
    assert [row["prompt_len"] for row in rows] == [len(tokenizer.chat(messages(text))) for text in ("the cat", "a dog")]


def test_prompt_ids_are_taken_as_they_are_with_chat_too(run, tmp_path, chatty):
    file = write_lines(tmp_path / "ids.jsonl", [{"prompt_ids": [0, 2, 266, 3]}])
    [row] = run(" ".join(SHORT), "--chat", "--prompt-file", file, checkpoint=chatty).rows
    assert row["prompt_len"] == 4


@pytest.mark.parametrize("argv", [["--chat"], ["--chat", "--prompt", "the cat"], ["--chat", "-"]])
def test_chat_without_a_template_is_refused(refused, argv):
    assert "no chat template" in refused(*argv)


def test_a_conversation_cannot_be_traced(refused, chatty):
    assert "--trace" in refused("--chat", "--trace", "t.npz", checkpoint=chatty)


def test_a_conversation_has_one_answer_to_each_turn(refused, chatty):
    flags = ("--chat", "--samples", "2", "--temperature", "1", "--policy", "slide")
    assert "--samples: a conversation goes on from one answer" in refused(*flags, checkpoint=chatty)


def test_ctrl_c_at_the_prompt_sign_ends_a_conversation(capsys, monkeypatch, chatty):
    monkeypatch.setattr("builtins.input", interrupt)
    assert main(["--checkpoint", str(chatty), "--chat", *SHORT]) == 130
    assert "interrupted" in capsys.readouterr().err
