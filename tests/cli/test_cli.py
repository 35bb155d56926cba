"""The command line: what each flag changes, what goes where, and what is refused before anything is computed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
import kernels
from checkpoints import make_checkpoint, write_json
from cli.main import main, payoff
from cli.output import RowFile
from generate import Engine, Options, Stats, load
from model import Llama
from oracle import paper_budget, paper_interval, paper_selects
from runs import FIVE, PROMPT, SCRIPT, SHORT, contents, interrupt, write_lines

# ---- every flag changes something

BASE = "--no-compile --ignore-eos --max-new-tokens 48 --heavy 4 --recent 4"
SNAPKV = "--compress snapkv --prompt-budget 4 --obs-window 2"
HOT = "--temperature 2"


def token_ids(run):
    return run.ids


def stat(name):
    return lambda run: [row["stats"][name] for row in run.rows]


EFFECTS = {  # field of Options -> flags without it, flags with it, where the difference must show
    "checkpoint": ("", "--checkpoint OTHER", token_ids),
    "policy": ("", "--policy slide", token_ids),
    "heavy": ("", "--heavy 1", token_ids),
    "recent": ("", "--recent 2", token_ids),
    "score": ("", "--score current", token_ids),
    "interval": ("--policy slide", "--policy slide --interval 3", token_ids),
    "compress": (SNAPKV.replace("snapkv", "full"), SNAPKV, token_ids),
    "prompt_budget": (SNAPKV, f"{SNAPKV} --prompt-budget 5", token_ids),
    "obs_window": (SNAPKV, f"{SNAPKV} --obs-window 3", token_ids),
    "layer_shares": (
        "--compress prefixkv --prompt-budget 4 --obs-window 1 --layer-shares EVEN",
        "--compress prefixkv --prompt-budget 4 --obs-window 1 --layer-shares STEEP",
        token_ids,
    ),
    "question_after": (f"{SNAPKV} --obs-window 1", f"{SNAPKV} --obs-window 1 --question-after on", token_ids),
    "key_channels": ("--obs-window 1", "--obs-window 1 --key-channels 0.3", token_ids),
    "kv_format": ("", "--kv-format int4", stat("kv_bytes")),
    "max_new_tokens": ("", "--max-new-tokens 20", lambda run: [len(ids) for ids in run.ids]),
    "temperature": ("", HOT, token_ids),
    "top_k": (HOT, f"{HOT} --top-k 2", token_ids),
    "top_p": (HOT, f"{HOT} --top-p 0.3", token_ids),
    "seed": (HOT, f"{HOT} --seed 1", token_ids),
    "samples": (HOT, f"{HOT} --samples 2", lambda run: [row["sample"] for row in run.rows]),
    "ignore_eos": (
        "--checkpoint STOPPING --policy full --no-ignore-eos",
        "--checkpoint STOPPING --policy full --ignore-eos",
        lambda run: [row["finish_reason"] for row in run.rows],
    ),
    "stop": (HOT, f"{HOT} --stop e", lambda run: [row["text"] for row in run.rows]),
    "batch_size": ("--prompt-file TWO", "--prompt-file TWO --batch-size 1", stat("kv_bytes")),
    "max_context": ("", "--max-context 200", stat("prompt_slots")),
    "device": ("--device cpu", "--device nowhere", lambda run: run.status),
    "dtype": ("", "--dtype bfloat16", stat("kv_bytes")),
    "compile": ("--compile", "--no-compile", lambda run: [s > 0 for s in stat("compile_s")(run)]),
}


def test_every_option_is_in_the_table_of_effects():
    assert list(EFFECTS) == [entry.name for entry in fields(Options)]


@pytest.mark.parametrize("name", EFFECTS)
def test_a_flag_changes_what_it_is_there_to_change(run, tmp_path, monkeypatch, other, stopping, name):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)  # tests/core/test_engine.py compiles
    places = {"OTHER": str(other), "STOPPING": str(stopping)}
    for word, shares in (("EVEN", [1, 1]), ("STEEP", [1.5, 0.5])):
        places[word] = str(tmp_path / word)
        write_json(tmp_path / word, {"shares": {"prefixkv": shares}})
    places["TWO"] = write_lines(tmp_path / "two.jsonl", [{"prompt": "the cat"}, {"prompt": PROMPT}])
    *both, looks_at = EFFECTS[name]
    found = []
    for flags in both:
        for word, place in places.items():
            flags = flags.replace(word, place)
        prompt = [] if "--prompt-file" in flags else ["--prompt", PROMPT]
        result = run(f"{BASE} {flags}", *prompt)
        assert result.status == 0 or name == "device"
        found.append(looks_at(result))
    assert found[0] != found[1]


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    entries = [" ".join(entry.split()) for entry in capsys.readouterr().out.split("\n  -")]
    assert exit.value.code == 0
    for option in fields(Options):
        flag = f"-{option.name.replace('_', '-')}"
        [entry] = [entry for entry in entries if entry.split()[0].rstrip(",") == flag]
        default = [] if option.default == () else option.default
        assert entry.endswith(f"(default: {default})")
        if isinstance(option.default, bool):
            assert f"{flag}, --no{flag} " in entry
    for flag in ("-prompt", "-prompt-file", "-chat", "-output", "-trace"):
        assert flag in [entry.split()[0] for entry in entries]


# ---- where prompts come from


def test_a_prompt_is_the_same_from_every_source(run, tmp_path, monkeypatch, tiny):
    (tmp_path / "one.txt").write_text(PROMPT, encoding="utf-8")
    ids = load(str(tiny))[1].encode(PROMPT)
    rows = write_lines(tmp_path / "both.jsonl", [{"prompt": PROMPT}, {"prompt_ids": ids}])
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    sources = [["--prompt", PROMPT], ["--prompt-file", str(tmp_path / "one.txt")], ["-"], ["--prompt-file", rows]]
    [found] = {tuple(answer) for source in sources for answer in run(" ".join(SHORT), *source).ids}
    assert len(found) == 6


def test_prompt_ids_are_taken_as_they_are(run, tmp_path):
    """No bos is put before them, and special ids among them are nobody's mistake."""
    file = write_lines(tmp_path / "ids.jsonl", [{"prompt_ids": [268, 2, 1, 0, 319]}])
    [row] = run(" ".join(SHORT), "--prompt-file", file).rows
    assert row["prompt_len"] == 5


def test_blank_lines_of_a_jsonl_file_are_no_prompts(run, tmp_path):
    file = tmp_path / "gaps.jsonl"
    file.write_text('\n{"prompt": "the cat"}\r\n   \n{"prompt": "a\u2028dog"}', encoding="utf-8")
    assert len(run(" ".join(SHORT), "--prompt-file", str(file)).rows) == 2


def test_a_text_file_is_one_prompt_with_its_line_breaks(run, tmp_path, tiny):
    (tmp_path / "lines.txt").write_text("the cat\n\na dog\n", encoding="utf-8")
    [row] = run(" ".join(SHORT), "--prompt-file", str(tmp_path / "lines.txt")).rows
    assert row["prompt_len"] == len(load(str(tiny))[1].encode("the cat\n\na dog\n"))


# ---- where results go


def test_rows_are_in_input_order_whatever_the_batch_size(run, tmp_path):
    file = write_lines(tmp_path / "five.jsonl", FIVE)
    for size in (1, 2, 5, 99):
        rows = run(f"{' '.join(SHORT)} --batch-size {size}", "--prompt-file", file).rows
        assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
        assert [row["prompt_len"] for row in rows] == [3, 1, 17, 3, 5]


def test_a_row_is_in_the_file_before_the_next_batch_begins(run, tmp_path, monkeypatch):
    file, lines, prefill = write_lines(tmp_path / "five.jsonl", FIVE), [], generate.Engine.prefill

    def count_lines_and_prefill(engine, *batch):
        lines.append((tmp_path / "rows.jsonl").read_bytes().count(b"\n"))
        return prefill(engine, *batch)

    monkeypatch.setattr(generate.Engine, "prefill", count_lines_and_prefill)
    run(f"{' '.join(SHORT)} --batch-size 2", "--prompt-file", file)
    assert lines == [0, 2, 4]


def test_a_row_has_the_documented_keys(run):
    [row] = run(BASE, "--prompt", PROMPT).rows
    settings = {"policy": "discontinuous", "heavy": 4, "recent": 4, "score": "cumulative"}
    keys = ["index", "sample", "prompt_len", "token_ids", "text", "finish_reason", "stats", "settings", "prompt_digest"]
    assert list(row) == keys
    promised = "policy heavy recent score steps kv_bytes kv_bytes_full prefill_s compile_s decode_s tokens_per_s"
    assert set(promised.split()) <= set(row["stats"])
    assert settings.items() <= row["stats"].items()
    assert row["stats"]["steps"] == 47 and row["stats"]["prefill_s"] > 0 and row["stats"]["compile_s"] == 0


def test_the_full_caches_bytes_are_those_of_prompt_plus_T_and_a_policy_takes_fewer(run):
    full = run(f"{BASE} --policy full", "--prompt", PROMPT).rows[0]["stats"]
    small = run(f"{BASE} --policy slide", "--prompt", PROMPT).rows[0]["stats"]
    keys_and_values = 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, head_dim, float32
    assert keys_and_values * (17 + 48) <= full["kv_bytes_full"] <= 1.2 * keys_and_values * (64 + 48)
    assert small["kv_bytes"] < small["kv_bytes_full"] == full["kv_bytes_full"] == full["kv_bytes"]


def test_token_ids_are_the_generated_ones_and_text_is_theirs(run, tiny):
    result = run(BASE, "--prompt", PROMPT)
    [row] = result.rows
    assert len(row["token_ids"]) == 48 and row["finish_reason"] == "length"
    assert row["text"] == load(str(tiny))[1].decode(row["token_ids"])


def test_a_stopped_row_holds_its_stop_token_but_not_in_its_text(run, stopping):
    free = run(BASE + " --policy full", "--prompt", PROMPT).ids[0]
    result = run("--no-compile --max-new-tokens 48 --policy full", "--prompt", PROMPT, checkpoint=stopping)
    [row], (_, tokenizer) = result.rows, load(str(stopping))
    assert row["finish_reason"] == "stop" and row["token_ids"][-1] in tokenizer.stop_ids
    assert row["token_ids"] == free[: len(row["token_ids"])] and row["stats"]["steps"] < 47
    assert row["text"] == tokenizer.decode(row["token_ids"][:-1]) == result.out.removesuffix("\n")
    assert row["text"] != tokenizer.decode(row["token_ids"])


def test_standard_output_holds_the_texts_alone_in_input_order(run, tmp_path):
    file = write_lines(tmp_path / "five.jsonl", FIVE)
    result = run(f"{BASE} --batch-size 2", "--prompt-file", file)
    assert result.out == "".join(row["text"].removesuffix("\n") + "\n" for row in result.rows)


def test_the_summary_on_standard_error_has_the_figures_of_the_rows(run):
    result = run(BASE, "--prompt", PROMPT)
    said, stats = " ".join(result.err), result.rows[0]["stats"]
    assert all(word in said for word in ("discontinuous", "heavy 4", "recent 4", "cumulative"))
    assert f"{stats['kv_bytes'] / stats['kv_bytes_full']:.0%}" in said
    assert f"{stats['tokens_per_s']:.1f} tokens/s" in said


def test_the_summary_says_when_compiling_pays_off(run):
    [row] = run(BASE, "--prompt", PROMPT).rows
    stats = Stats(**row["stats"] | {"steps": 100, "decode_s": 1.0, "compile_s": 9.0, "eager_step_s": 0.1})
    assert payoff([stats]).endswith("pays off after 100 steps, this run had 100")
    short = payoff([replace(stats, compile_s=18.0)])
    assert short.endswith("after 200 steps, this run had 100: for so short a run, --no-compile is faster")
    assert payoff([stats, stats]).endswith("pays off after 100 steps, this run had 200")
    assert payoff([replace(stats, eager_step_s=0.01)]).endswith("compiling saves nothing here: use --no-compile")
    assert payoff([replace(stats, compile_s=0.0)]) == payoff([replace(stats, steps=0)]) == ""


def test_without_output_nothing_is_written(capsys, tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", str(tiny), "--prompt", "the cat", *SHORT]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["/dev/null", "/dev/stdout"])
def test_output_may_be_a_device(capfd, tiny, device):
    assert main(["--checkpoint", str(tiny), "--prompt", "the cat", *SHORT, "--output", device]) == 0
    assert ('"finish_reason"' in capfd.readouterr().out) is (device == "/dev/stdout")


def test_a_full_disk_ends_the_run_in_one_line(capsys, tiny):
    assert main(["--checkpoint", str(tiny), "--prompt", "the cat", *SHORT, "--output", "/dev/full"]) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]


# ---- --trace


def traced(run, tmp_path, flags):
    file = tmp_path / "trace.npz"
    [row] = run(f"{BASE} {flags}", "--prompt", PROMPT, "--trace", str(file)).rows
    with np.load(file) as trace:
        return row, {name: trace[name] for name in trace.files}


@pytest.mark.parametrize("policy", ["full", "slide", "discontinuous"])
def test_a_trace_holds_the_position_in_every_slot_after_prefill_and_every_step(run, tmp_path, policy):
    row, trace = traced(run, tmp_path, f"--policy {policy}")
    pos, prompt_slots = trace["pos"], int(trace["prompt_slots"])
    slots = prompt_slots + row["stats"]["decode_slots"]
    assert pos.dtype == np.int32 and pos.shape == (row["stats"]["steps"] + 1, 2, 1, 2, slots)
    prompt, decode = np.split(pos, [prompt_slots], axis=-1)
    assert (prompt[..., :17] == np.arange(17)).all() and (prompt[..., 17:] == -1).all()
    assert (decode[0] == -1).all()
    setting = policy, 4, 4, 48  # heavy, recent, T
    for t in range(1, len(pos)):
        assert (decode[t].max(-1) == 17 + t - 1).all()  # the token of step t has just been written
        held, budget = (decode[t] >= 0).sum(-1), paper_budget(*setting, t)
        assert (held <= min(t, budget + paper_interval(*setting) - 1)).all()
        if paper_selects(*setting, t):
            assert (held == min(t, budget)).all()


def test_a_trace_names_its_settings(run, tmp_path):
    _, trace = traced(run, tmp_path, "--policy slide --score current")
    found = [trace[name].item() for name in ("policy", "heavy", "recent", "score", "max_new_tokens")]
    assert found == ["slide", 4, 4, "current", 48]
    assert [file.name for file in tmp_path.iterdir() if "trace" in file.name] == ["trace.npz"]


def test_a_trace_of_a_batch_has_a_row_for_each_prompt(run, tmp_path):
    file = write_lines(tmp_path / "five.jsonl", FIVE)
    run(BASE, "--prompt-file", file, "--trace", str(tmp_path / "trace.npz"))
    with np.load(tmp_path / "trace.npz") as trace:
        live = (trace["pos"][0] >= 0).sum(-1)
    assert live.tolist() == [[[n, n] for n in (3, 1, 17, 3, 5)]] * 2


# ---- what is refused

IMPOSSIBLE = {
    "--heavy -1": ["heavy", "-1"],
    "--recent -1": ["recent", "-1"],
    "--heavy 1.5": ["--heavy", "1.5"],
    "--heavy many": ["--heavy", "many"],
    "--max-new-tokens 0": ["max_new_tokens", "0"],
    "--max-new-tokens 999": ["ends at token 3", "999", "512 positions", "--max-new-tokens"],
    "--temperature -0.1": ["temperature", "-0.1"],
    "--temperature nan": ["temperature", "nan"],
    "--temperature inf": ["temperature", "inf"],
    "--top-k -1": ["top_k", "-1"],
    "--top-p 0": ["top_p", "0"],
    "--top-p 1.01": ["top_p", "1.01"],
    "--top-p nan": ["top_p", "nan"],
    "--seed -1": ["seed", "-1"],
    f"--seed {2**63}": ["seed", str(2**63)],
    "--batch-size 0": ["batch_size", "0"],
    "--interval -1": ["interval", "-1"],
    "--prompt-budget 0": ["prompt_budget", "0"],
    "--obs-window 0": ["obs_window", "0"],
    "--prompt-budget 4 --obs-window 5": ["obs_window", "5", "4"],
    "--compress zipvl": ["layer_shares", "not given", "benchmarks/calibrate.py"],
    "--compress zipvl --layer-shares missing.json": ["layer_shares missing.json", "No such file", "calibrate.py"],
    "--compress zipvl --layer-shares one.txt": ["layer_shares one.txt", "no table of shares", "calibrate.py"],
    "--question-after dog": ["prompt 0 has no question after 'dog'", "--question-after"],
    "--question-after cat": ["prompt 0 has no question after 'cat'", "--question-after"],
    "--question-after h --prompt-budget 1 --obs-window 1": ["question 0 is 2", "0 to 1", "prompt_budget"],
    "--key-channels 0": ["key_channels", "0", "above 0 and at most 1"],
    "--key-channels 1.1": ["key_channels", "1.1"],
    "--policy best": ["--policy", "best", "discontinuous"],
    "--score best": ["--score", "best", "cumulative"],
    "--compress zip": ["--compress", "zip", "snapkv"],
    "--nonsense": ["--nonsense", "--help"],
    "--prompt": ["--prompt", "--help"],
    "- ": ["not several"],
    "--prompt-file one.txt": ["not several"],
    "--output": ["--output", "--help"],
    "--output missing/rows.jsonl": ["--output", "missing"],
    "--output folder": ["--output", "folder", "no file name"],
    "--output one.txt/rows.jsonl": ["--output", "one.txt"],
    "--trace missing/trace.npz": ["--trace", "missing"],
    "--trace folder": ["--trace", "folder", "no file name"],
    "--trace one.npz --output folder/../one.npz": ["--output, --trace name the same file"],
    "--trace one.npz --output hard.npz": ["--output, --trace name the same file"],
    "--trace /dev/null": ["--trace /dev/null", "no regular file"],
}
FILES = {  # what is wrong with a prompt file -> the file, and what must be named
    "no JSON": ("{oops}", ["bad.jsonl:1", "broken JSON"]),
    "no JSON further down": ('{"prompt": "x"}\n\n{"prompt": }', ["bad.jsonl:3", "broken JSON"]),
    "no object": ('{"prompt": "x"}\n["x"]', ["bad.jsonl:2", "prompt_ids"]),
    "no prompt in it": ('{"promt": "x"}', ["bad.jsonl:1", "prompt_ids"]),
    "a prompt that is no text": ('{"prompt": ["x"]}', ["bad.jsonl:1", "TEXT"]),
    "a prompt that is null": ('{"prompt": null}', ["bad.jsonl:1", "TEXT"]),
    "ids that are no list": ('{"prompt_ids": "x"}', ["bad.jsonl:1", "ID"]),
    "a prompt and ids": ('{"prompt": "x", "prompt_ids": [5]}', ["bad.jsonl:1"]),
    "half a character": ('{"prompt": "x"}\n{"prompt": "\\ud800"}', ["surrogate"]),
    "an id above the vocabulary": ('{"prompt_ids": [5, 320]}', ["prompt 0", "320", "319"]),
    "an id below it": ('{"prompt_ids": [5]}\n{"prompt_ids": [-1]}', ["prompt 1", "-1"]),
    "an id that is no whole number": ('{"prompt_ids": [1.0]}', ["prompt 0", "1.0"]),
    "an id that is true": ('{"prompt_ids": [true]}', ["prompt 0", "True"]),
    "an id that is a list": ('{"prompt_ids": [[5]]}', ["prompt 0", "[5]"]),
    "no ids": ('{"prompt_ids": []}', ["prompt 0", "empty"]),
    "too many ids": ('{"prompt_ids": [5]}\n' + f'{{"prompt_ids": {[5] * 510}}}', ["prompt 1", "510", "512 positions"]),
    "nothing": ("", ["no prompts"]),
    "blank lines": ("\n \n", ["no prompts"]),
}


SHARES = {  # content of --layer-shares -> what must be named
    "[]": "no table of shares",
    '{"shares": [1, 1]}': "no table of shares",
    '{"shares": {"zipvl": 2}}': "no table of shares",
    "[" * 10**5: "no table of shares",
    '{"shares": {"zipvl": [2, 0]}}': "[2, 0]: it must be numbers above 0 with the mean 1",
    '{"shares": {"zipvl": [1, NaN]}}': "nan",
    '{"shares": {"zipvl": ["1", "1"]}}': "'1'",
    '{"shares": {"zipvl": [1, 0.5]}}': "with the mean 1",
    '{"shares": {"zipvl": [1, 1, 1]}}': "for 3 layers: it must be for the 2 of the model",
    '{"shares": {"prefixkv": [1, 1]}}': "not given",
}


@pytest.mark.parametrize("content", SHARES, ids=lambda content: content[:40])
def test_a_file_of_shares_that_does_not_fit_is_refused(refused, tmp_path, content):
    (tmp_path / "shares.json").write_text(content)
    said = refused("--prompt", "x", "--compress", "zipvl", "--layer-shares", "shares.json")
    assert "layer_shares" in said and SHARES[content] in said


@pytest.mark.parametrize("flags", IMPOSSIBLE)
def test_an_impossible_setting_is_refused_in_one_line_before_anything_is_written(refused, flags):
    line = refused("--prompt", "the cat", *flags.split())
    assert [word for word in IMPOSSIBLE[flags] if word not in line] == [], line


@pytest.mark.parametrize("text, named", FILES.values(), ids=FILES)
def test_a_bad_prompt_file_is_refused_in_one_line_that_says_where(refused, tmp_path, text, named):
    (tmp_path / "bad.jsonl").write_text(text + "\n")
    line = refused("--prompt-file", "bad.jsonl")
    assert [word for word in named if word not in line] == [], line


@pytest.mark.parametrize(
    "file, content",
    {"missing.txt": None, "folder": None, "latin.txt": b"caf\xe9", "latin.jsonl": b'{"prompt": "\xe9"}'}.items(),
)
def test_a_prompt_file_that_cannot_be_read_is_refused(refused, tmp_path, file, content):
    if content:
        (tmp_path / file).write_bytes(content)
    assert f"prompt file {file} cannot be read" in refused("--prompt-file", file)


def test_prompts_that_are_no_text_at_all_are_refused(refused, chatty):
    """Bytes of the command line that are no UTF-8 reach Python as lone surrogates."""
    assert "prompt" in refused("--prompt", "caf\udce9", checkpoint=chatty)


def test_an_empty_prompt_is_refused_where_the_tokenizer_adds_nothing(refused, tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "folder" / "no bos")
    write_json(folder / "tokenizer_config.json", {"add_bos_token": False})
    assert "prompt 0 is empty" in refused("--prompt", "", checkpoint=folder)


def test_the_prompt_file_is_not_overwritten_by_the_output(refused, tmp_path):
    file = write_lines(tmp_path / "five.jsonl", FIVE)
    (tmp_path / "link.jsonl").symlink_to(file)
    for other_name in ("five.jsonl", "./folder/../five.jsonl", "link.jsonl"):
        assert "same file" in refused("--prompt-file", file, "--output", other_name)


@pytest.mark.parametrize("flag", ["--output", "--trace"])
def test_no_file_of_the_checkpoint_is_overwritten(refused, tmp_path, tiny, flag):
    before = contents(tiny)
    (tmp_path / "link").symlink_to(tiny / "model.safetensors")
    for path in (tiny / "model.safetensors", tiny / "new.jsonl", "link"):
        assert f"lies in --checkpoint {tiny}" in refused("--prompt", "the cat", flag, str(path))
    assert contents(tiny) == before


def test_a_chat_that_is_refused_leaves_the_output_as_it_was(refused, chatty):
    line = refused("--chat", "--prompt", "x", "--max-context", "100000", checkpoint=chatty)
    assert "max_context is 100000" in line


def test_an_empty_name_of_a_prompt_file_is_not_the_demo(refused):
    """As from `--prompt-file "$UNSET"`."""
    assert "prompt file . cannot be read" in refused("--prompt-file", "")


def test_a_second_run_on_the_same_output_is_refused_and_the_first_keeps_its_rows(refused, tmp_path):
    with RowFile(str(tmp_path / "rows.jsonl"), overwrite=True) as first:
        assert "another run is writing to it" in refused("--prompt", "the cat")
        first.write({"index": 0})
    assert (tmp_path / "rows.jsonl").read_text() == '{"index": 0}\n'


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    with RowFile(str(tmp_path / "rows.jsonl")) as output:
        output.write({"index": 0})
        room = io.FileIO(str(tmp_path / "rows.jsonl"), "a")
        monkeypatch.setattr(output, "file", HalfFull(room))
        with pytest.raises(OSError, match="1 rows are in the file"):
            output.write({"index": 1})
    assert (tmp_path / "rows.jsonl").read_text() == '{"index": 0}\n'


class HalfFull:
    """A file on a disk that has room for three more bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, line):
        return self.file.write(line[:3])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_trace_follows_a_link_and_leaves_nothing_beside_it(run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "real" / "trace.npz")
    assert run("--no-compile --max-new-tokens 3 --trace", str(tmp_path / "link.npz"), "--prompt", PROMPT).status == 0
    assert (tmp_path / "link.npz").is_symlink() and os.listdir(tmp_path / "real") == ["trace.npz"]


@pytest.mark.parametrize("flags", ["--temperature 1e-38", "--temperature 1e-320", "--temperature 1 --top-p 1e-46"])
def test_a_tiny_temperature_or_top_p_is_greedy_in_the_limit(run, flags):
    greedy = run("--no-compile --max-new-tokens 8 --ignore-eos", "--prompt", PROMPT).ids
    assert run(f"--no-compile --max-new-tokens 8 --ignore-eos {flags}", "--prompt", PROMPT).ids == greedy


def test_what_standard_output_cannot_take_costs_no_row(tmp_path, tiny):
    """An ASCII terminal shows "?"; a full one, or a reader who has left, ends the text but not the run."""
    argv = [sys.executable, str(SCRIPT), "--checkpoint", str(tiny), "--no-compile", "--ignore-eos"]
    argv += ["--max-new-tokens", "5", "--prompt-file", write_lines(tmp_path / "five.jsonl", FIVE)]
    rows = {}
    for name, stdout in (("plain", "/dev/null"), ("full", "/dev/full")):
        with open(stdout, "w") as sink:
            done = subprocess.run(
                [*argv, "--output", str(tmp_path / name)], stdout=sink, stderr=subprocess.PIPE, text=True
            )
        rows[name] = [json.loads(line)["token_ids"] for line in (tmp_path / name).read_text().splitlines()]
        assert done.returncode == {"plain": 0, "full": 2}[name] and "Traceback" not in done.stderr
    assert rows["full"] == rows["plain"] and len(rows["plain"]) == 5
    assert "No space left" in done.stderr.splitlines()[-1]


def test_notes_do_not_reach_standard_output_when_standard_error_is_closed(tiny):
    argv = [sys.executable, str(SCRIPT), "--checkpoint", str(tiny), "--prompt", PROMPT, *SHORT]
    both = subprocess.run(argv, capture_output=True, text=True)
    alone = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *argv], stdout=subprocess.PIPE, text=True)
    assert (alone.returncode, alone.stdout) == (0, both.stdout)


def test_a_compiler_that_fails_is_one_line_that_names_the_way_out(refused, monkeypatch):
    def fail(*_):
        raise RuntimeError("InductorError: CppCompileError: C++ compile error\n\n" + "output\n" * 100)

    monkeypatch.setattr(torch, "compile", lambda *_, **how: fail)
    line = refused("--prompt", "the cat", "--compile")
    assert "torch.compile failed" in line and line.endswith("run with --no-compile")


def test_a_single_text_is_no_list_of_prompts(tiny):
    model, tokenizer = load(str(tiny))
    with pytest.raises(ValueError, match="prompts is 'the cat'.*a list of prompts"):
        generate.generate(model, tokenizer, "the cat")


def test_a_folder_of_the_user_goes_before_the_bundled_checkpoint(run, tmp_path, monkeypatch, tiny):
    wanted = run("--no-compile --max-new-tokens 6", "--prompt", PROMPT).ids
    shutil.copytree(tiny, tmp_path / "checkpoints" / "mini")
    monkeypatch.chdir(tmp_path)
    assert run("--no-compile --max-new-tokens 6", "--prompt", PROMPT, checkpoint="checkpoints/mini").ids == wanted


def test_an_empty_path_is_a_mistake_and_no_wish_for_no_output(refused):
    """As from `--output "$UNSET"`: the rows of a long run would be lost."""
    for flag in ("--output", "--trace"):
        assert f"{flag} '' is no file name: give a file" in refused("--prompt", "the cat", flag, "")


def test_an_output_without_permission_is_refused(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, whom nothing stops
    assert "no permission" in refused("--prompt", "the cat")


def test_a_head_that_does_not_fit_into_words_is_refused(refused, tmp_path):
    checkpoint = make_checkpoint(tmp_path.parent / "odd", head_dim=12)
    line = refused("--prompt", "the cat", "--kv-format", "k8v4", checkpoint=checkpoint)
    assert "head_dim is 12: it must be a multiple of 8 where K or V has 4 bits: choose another --kv-format" in line


def test_no_prompt_is_refused_unless_the_model_is_the_bundled_one(refused):
    line = refused()
    assert all(word in line for word in ("no prompt", "--prompt", "--prompt-file"))


def test_a_trace_of_several_batches_is_refused(refused, tmp_path):
    line = refused("--prompt-file", write_lines(tmp_path / "f.jsonl", FIVE), "--trace", "t.npz", "--batch-size", "4")
    assert "--trace" in line and "--batch-size 5" in line


def test_a_trace_above_a_gibibyte_is_refused_with_its_size(refused, tmp_path):
    file = write_lines(tmp_path / "many.jsonl", [{"prompt": "the cat"}] * 400)
    line = refused(
        "--prompt-file",
        file,
        *["--policy", "full", "--max-new-tokens", "500", "--batch-size", "400", "--trace", "t.npz"],
    )
    slots = 64 + 500
    low, high = (2 * 400 * 2 * n * 4 * 500 / 2**30 for n in (3 + 499, slots))
    size = float(line.split(" GiB")[0].split()[-1])
    assert low - 0.1 < size < high + 0.1 and "--max-new-tokens" in line


# ---- Ctrl-C, and a reader who leaves


PLACES = {
    "while loading": (generate, "load"),
    "in prefill": (Engine, "prefill"),
    "in the model": (Llama, "forward"),
    "while sampling": (kernels.Sampler, "forward"),
}


@pytest.mark.parametrize(("owner", "name"), PLACES.values(), ids=PLACES)
def test_ctrl_c_ends_a_run_with_one_word_wherever_it_comes(capsys, monkeypatch, tiny, owner, name):
    monkeypatch.setattr(owner, name, interrupt)
    assert main(["--checkpoint", str(tiny), "--prompt", "the cat", *SHORT]) == 130
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [line for line in said if not line.startswith("loading ")] == ["generate.py: interrupted"]


def test_ctrl_c_during_the_imports_is_no_traceback():
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--help"], stderr=subprocess.PIPE, stdout=-3, **hears)
    loaded = Path(f"/proc/{process.pid}/maps")  # torch is large: once its first library is there, more imports follow
    until = time.monotonic() + 30
    while process.poll() is None and "libtorch" not in loaded.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "Traceback" not in said


def test_ctrl_c_keeps_the_rows_of_the_running_batch_that_had_stopped(tiny):
    model, tokenizer = load(str(tiny))
    settings = {"compile": False, "max_new_tokens": 60}
    free = [r.token_ids for r in generate.generate(model, tokenizer, ["the cat", PROMPT], **settings, ignore_eos=True)]
    tokenizer.stop_ids = [next(i for i in free[1][5:20] if i not in free[0])]
    steps = []

    def interrupt_after_thirty(cache):
        steps.append(cache)
        if len(steps) == 30:
            raise KeyboardInterrupt

    kept = []
    with pytest.raises(KeyboardInterrupt):
        kept.extend(
            generate.generate(model, tokenizer, ["the cat", PROMPT], **settings, on_step=interrupt_after_thirty)
        )
    assert [(result.index, result.finish_reason) for result in kept] == [(1, "stop")]


@pytest.fixture
def start(tmp_path, tiny):
    """A run in a process of its own: many prompts one after another, so that it is not done when it is cut short."""
    prompts = str(tmp_path / "many.jsonl")
    argv = [sys.executable, str(SCRIPT), "--checkpoint", str(tiny), "--prompt-file", prompts, "--batch-size", "1"]
    argv += ["--no-compile", "--ignore-eos", "--max-new-tokens", "20", "--output", str(tmp_path / "rows.jsonl")]
    started = []

    def start(stdout, n_prompts=2500):
        write_lines(tmp_path / "many.jsonl", [{"prompt": PROMPT}] * n_prompts)
        hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background does not
        started.append(subprocess.Popen(argv, stdout=stdout, stderr=subprocess.PIPE, **hears))
        return started[0]

    yield start
    started[0].kill()
    started[0].wait()


def finished_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def test_ctrl_c_leaves_one_clean_line_and_the_finished_rows(start, tmp_path, tiny):
    process = start(subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(finished_rows(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1].decode().splitlines()
    assert process.returncode == 130
    assert [line for line in said if line] == [f"loading {tiny}", "generate.py: interrupted"]
    rows = finished_rows(tmp_path)
    assert 2 <= len(rows) < 2500 and [row["index"] for row in rows] == list(range(len(rows)))
    assert all(len(row["token_ids"]) == 20 for row in rows)


def test_a_reader_who_leaves_ends_the_text_but_not_the_rows(start, tmp_path, tiny):
    """As in `generate.py ... | head -c 9`."""
    process = start(subprocess.PIPE, n_prompts=40)
    assert len(process.stdout.read(9)) == 9
    process.stdout.close()
    said = process.stderr.read().decode().splitlines()
    assert process.wait(timeout=30) == 1
    assert said[0] == f"loading {tiny}" and not any("rror" in line for line in said)
    assert len(finished_rows(tmp_path)) == 40


def test_a_cache_of_the_compiler_that_cannot_be_written_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    argv = [sys.executable, str(SCRIPT), "--checkpoint", str(tiny), "--prompt", "the cat", "--max-new-tokens", "3"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    for flags, status in ((["--no-compile"], 0), ([], 2)):
        done = subprocess.run([*argv, *flags], capture_output=True, text=True, env=environment)
        assert done.returncode == status and "Traceback" not in done.stderr
    assert "cannot use its cache" in done.stderr and done.stderr.strip().endswith("or run with --no-compile")
