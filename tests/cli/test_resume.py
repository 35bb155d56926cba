"""--output on a file that has rows: refused, resumed or overwritten."""

import json

import pytest

import generate
from cli.main import main
from runs import FIVE, SHORT, write_lines


@pytest.fixture
def again(capsys, tmp_path, tiny):
    """again("--resume", ...) -> exit status, the file's rows, what was said; the file stays between calls."""
    prompts = write_lines(tmp_path / "five.jsonl", FIVE)
    output = tmp_path / "rows.jsonl"

    def again(*flags, prompts=prompts):
        argv = [
            "--checkpoint",
            str(tiny),
            "--prompt-file",
            prompts,
            "--output",
            str(output),
            "--batch-size",
            "2",
            *SHORT,
        ]
        status = main([*argv, *flags])
        return status, [json.loads(line) for line in output.read_text().splitlines()], capsys.readouterr().err

    again.output = output
    return again


def tokens(rows):
    return [(row["index"], row["token_ids"]) for row in rows]


def test_a_file_with_rows_is_refused_or_overwritten(again):
    _, first, _ = again()
    status, rows, said = again()
    assert (status, rows) == (2, first) and "--resume goes on with them, --overwrite replaces them" in said
    status, rows, _ = again("--overwrite", "--temperature", "1")
    assert status == 0 and len(rows) == 5 and tokens(rows) != tokens(first)


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
@pytest.mark.parametrize("whole", [0, 1, 3, 4])
def test_a_resumed_run_gives_the_rows_of_an_uninterrupted_one(again, whole, cut):
    """The file was cut off after some whole rows and `cut` bytes of the next; -1: all but its line break."""
    _, first, _ = again()
    lines = again.output.read_bytes().splitlines(keepends=True)
    again.output.write_bytes(b"".join(lines[:whole]) + lines[whole][: cut if cut >= 0 else -1])
    status, rows, said = again("--resume")
    assert status == 0 and tokens(rows) == tokens(first)
    assert ("have a row" in said) == (whole > 0)


def test_a_resumed_run_computes_only_what_is_missing(again, monkeypatch):
    again()
    again.output.write_bytes(b"".join(again.output.read_bytes().splitlines(keepends=True)[:3]))
    seen, prefill = [], generate.Engine.prefill
    monkeypatch.setattr(generate.Engine, "prefill", lambda e, p, i, *n: (seen.extend(i), prefill(e, p, i, *n))[1])
    again("--resume")
    assert seen == [3, 4]
    again("--resume")
    assert seen == [3, 4]


def test_other_settings_are_refused_in_one_line(again, tmp_path):
    _, first, _ = again()
    for flags, named in {
        ("--temperature", "0.5"): "was made with temperature 0.0, this run has 0.5",
        ("--policy", "slide"): "policy 'discontinuous', this run has 'slide'",
        ("--dtype", "bfloat16"): "dtype 'float32', this run has 'bfloat16'",
        ("--stop", "x"): "stop [], this run has ['x']",
    }.items():
        status, rows, said = again("--resume", *flags)
        assert (status, rows) == (2, first) and named in said
    other = write_lines(tmp_path / "other.jsonl", FIVE[1:])
    status, rows, said = again("--resume", prompts=other)
    assert (status, rows) == (2, first) and "answers another prompt than number 0" in said


def test_a_batch_size_may_change_on_the_way(again):
    _, first, _ = again()
    again.output.write_bytes(b"".join(again.output.read_bytes().splitlines(keepends=True)[:2]))
    status, rows, _ = again("--resume", "--batch-size", "5")
    assert status == 0 and tokens(rows) == tokens(first)


HOT = ("--temperature", "1", "--top-k", "8", "--policy", "slide")


def test_a_prompt_of_which_some_answers_have_a_row_gets_the_others(again):
    """5 prompts of 3 answers each. The file ends within the second prompt, or holds the first answers alone."""
    flags = ("--samples", "3", *HOT)
    _, first, _ = again(*flags)
    assert [(row["index"], row["sample"]) for row in first] == [(i, s) for i in range(5) for s in range(3)]
    lines = again.output.read_bytes().splitlines(keepends=True)
    again.output.write_bytes(b"".join(lines[:4]))
    status, rows, said = again("--resume", *flags)
    assert status == 0 and tokens(rows) == tokens(first) and "4 of 15 answers have a row" in said
    again.output.write_bytes(b"".join(lines[::3]))  # of a run with --samples 1
    status, rows, said = again("--resume", *flags)
    assert status == 0 and sorted(tokens(rows)) == sorted(tokens(first)) and "5 of 15 answers" in said


def test_a_run_of_fewer_samples_has_nothing_left_to_do(again):
    _, first, _ = again("--samples", "2", *HOT)
    status, rows, said = again("--resume", *HOT)
    assert (status, rows) == (0, first) and "5 of 5 answers have a row" in said


@pytest.mark.parametrize(
    "line", ["{}", "[]", "5", "precious text", '{"index": "x", "prompt_digest": 1, "settings": 2}']
)
def test_a_file_of_something_else_is_left_alone(again, line):
    again.output.write_text(line + "\n")
    status = main(["--prompt", "x", "--checkpoint", "nowhere/at/all", "--output", str(again.output)])
    assert status == 2 and again.output.read_text() == line + "\n"
    argv = ["--resume", "--output", str(again.output)]
    assert main(["--prompt", "x", *SHORT, *argv]) == 2 and again.output.read_text() == line + "\n"


def test_flags_that_say_nothing_together_are_refused(refused, chatty):
    assert "give one of them" in refused("--prompt", "x", "--resume")
    assert "a conversation cannot be resumed" in refused("--chat", "--resume", checkpoint=chatty)


def test_resume_without_output_is_refused(capsys, tiny):
    assert main(["--checkpoint", str(tiny), "--prompt", "x", "--resume"]) == 2
    assert "--resume is about --output" in capsys.readouterr().err
