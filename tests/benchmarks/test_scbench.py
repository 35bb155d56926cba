"""benchmarks/scbench.py: scorers, what is read before each answer, what a killed run keeps, the command end to end."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common, report, scbench
from benchmarks.scbench import TASKS, Dialogue, converse, main, random_order, word_f1
from checkpoints import make_checkpoint
from generate import MINI, Conversation, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mini():
    """The bundled model, and its tokenizer as --mini has it."""
    model, tokenizer = load(str(MINI))
    return model, scbench.stops_at_newline(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a"))


def mini_arguments(*flags: str):
    return scbench.parse_arguments(["--mini", "--k", "4", "--contexts", "1", "--seeds", "0", *flags])


def dialogue_of(mini, *flags: str) -> Dialogue:
    arguments = mini_arguments(*flags)
    [example] = scbench.examples_of(arguments)
    return scbench.make_dialogue(arguments, mini[1], example)


def write_rows(path: Path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# ---- scorers


@pytest.mark.parametrize(
    "task, answers, right, wrong",
    [
        ("scbench_kv", ["5f-a1"], 'It is "5f-a1".', "5F-A1"),
        ("scbench_prefix_suffix", ["abcxyz"], "abcxyz", "abc xyz"),
        ("scbench_qa_eng", ["Rothstein", "The ACE"], "ace.", "place"),
        ("scbench_many_shot", ["(A)"], "The answer: (a)", "(B)"),
        ("scbench_many_shot", ["A"], "A", "Answer"),
        ("scbench_choice_eng", ["B"], " B. the dog", "A. the dog"),
        ("scbench_choice_eng", ["B"], "A guess: the answer is (B)", "Because I say so"),
        ("scbench_mf", ["42"], "is 42.0, not 41", "41, not 42"),
        ("scbench_mf", ["-3.5"], "-3.5", "3.5"),
        ("mini", ["7"], " So Answer_3 = 9. The answer is 7.", " So 7.\nThe answer is 7."),
    ],
)
def test_a_scorer_tells_right_from_wrong(task, answers, right, wrong):
    score = scbench.SCORERS[task]
    assert score(right, answers) == 1 and score(wrong, answers) == 0


def test_variables_and_words_count_in_part():
    assert scbench.word_f1("he is ace", ["an ace"]) == 0.5, "precision 1/3, recall 1"
    assert scbench.share_named("abc, xyz", ["ABC", "DEF", "XYZ", "UVW"]) == 0.5
    assert set(scbench.SCORERS) == {*TASKS, "mini"}


@pytest.mark.parametrize("part", ["The ", "The x is", "answer is ", "answer is A", "1.", "-", "5 ", "x", "Answer_0:"])
def test_long_and_odd_texts_take_linear_time(part):
    started = time.monotonic()
    for score in scbench.SCORERS.values():
        score(part * 20_000, ["5"])
    scbench.query_text(TASKS["scbench_mf"], {"input": part * 20_000})
    assert time.monotonic() - started < 1


words = st.lists(st.sampled_from(["red", "Red", "fox", "the", "7"])).map(" ".join)


@given(words, words)
def test_f1_is_symmetric_and_1_for_the_same_words_alone(a, b):
    score = word_f1(a, [b])
    a_words, b_words = scbench.words_of(a), scbench.words_of(b)
    assert score == word_f1(b, [a]) and 0 <= score <= 1
    assert (score == 1) == (a_words == b_words and bool(a_words))
    assert (score == 0) == (not a_words & b_words)


# ---- mini: contexts of questions


@given(st.lists(st.integers(0, 40), max_size=20), st.integers())
def test_an_order_has_every_question_once_and_references_first(sources, seed):
    references = {label: 1 + x % (label - 1) for label, x in enumerate(sources, 2) if x % 3}
    order = random_order(len(sources) + 1, references, Random(seed))
    assert sorted(order) == list(range(1, len(sources) + 2))
    assert all(order.index(references[label]) < order.index(label) for label in references)


def test_mini_queries_are_answered_by_their_references():
    arguments = scbench.parse_arguments(["--mini", "--mode", "multi-turn"])
    examples = scbench.examples_of(arguments)
    assert len(examples) == 48 and len({example.context for example in examples}) == 48
    orders = [[int(query[7:-1]) for query in example.queries] for example in examples]
    assert orders[0] != sorted(orders[0]) and all(sorted(order) == list(range(1, 17)) for order in orders)
    for example, order in zip(examples, orders, strict=True):
        found = scbench.references_of(example.context)
        assert found and all(order.index(found[label]) < order.index(label) for label in found)
        told = dict(zip(order, example.references, strict=True))
        assert all(f"Answer_{source} =" in told[label] for label, source in found.items())
        assert all(map(scbench.solution, example.references, example.answers))


def test_requests_have_no_references():
    [example] = scbench.examples_of(mini_arguments("--k", "12"))
    assert scbench.references_of(example.context) == {}
    [example] = scbench.examples_of(mini_arguments("--k", "12", "--mode", "multi-turn", "--reference-rate", "1"))
    assert len(scbench.references_of(example.context)) > 6


# ---- published rows

TURN = {"input": "Where?", "answer": "x"}
PUBLISHED = {
    "scbench_kv": TURN,
    "scbench_vt": {"input": "Which?", "answer": ["VAR A", "VAR B"]},
    "scbench_qa_eng": {"input": "Who?", "answer": ["Bob", "Robert"]},
    "scbench_choice_eng": {"input": "Which {x}?", "answer": "cat", "options": ["dog", "cat", "cow", "hen"]},
    "scbench_mf": {"input": "The Largest Number is: ", "answer": 42},
}


def row_of(name: str, turns: int = 2, context="the cat sat on the mat") -> dict:
    return {"id": 0, "context": context, "multi_turns": [PUBLISHED[name]] * turns}


@pytest.mark.parametrize(
    "name, query, answers, reference",
    [
        ("scbench_kv", "Where?", ["x"], "x"),
        ("scbench_vt", "Which?", ["VAR A", "VAR B"], "VAR A, VAR B"),
        ("scbench_qa_eng", "Question: Who?\nAnswer:", ["Bob", "Robert"], "Bob"),
        (
            "scbench_choice_eng",
            "Question: Which {x}?\nA. dog\nB. cat\nC. cow\nD. hen\n\nThe letter of the correct answer is",
            ["B"],
            "B",
        ),
        ("scbench_mf", "What is the largest number?\n\nThe Largest Number is: ", ["42"], "42"),
    ],
)
def test_a_published_row(name, query, answers, reference):
    example = scbench.data_example(TASKS[name], row_of(name, context=[3, 1, 2]))
    assert example.queries == [query] * 2 and example.answers == [answers] * 2 and example.references == [reference] * 2
    assert example.context == TASKS[name].start + "[3, 1, 2]"


BAD = [
    ("scbench_kv", {}, "no `context`, or no list in `multi_turns`"),
    ("scbench_kv", {"context": "x", "multi_turns": []}, "no `context`, or no list in `multi_turns`"),
    ("scbench_kv", {"context": "x", "multi_turns": [TURN, {"answer": "x"}]}, "turn 2 has no text in `input`"),
    ("scbench_kv", {"context": "x", "multi_turns": [TURN | {"answer": {}}]}, "turn 1 has no `answer` of the kind"),
    ("scbench_mf", {"context": "x", "multi_turns": [TURN]}, "turn 1 has no `answer` of the kind that first_number"),
    ("scbench_choice_eng", {"context": "x", "multi_turns": [TURN]}, "turn 1 has no `answer` of the kind that letter"),
    ("scbench_choice_eng", {"context": "x", "multi_turns": [TURN | {"options": 5}]}, "turn 1 has no `answer` of"),
]


@pytest.mark.parametrize("name, row, said", BAD)
def test_a_malformed_row_is_named_and_skipped(folder, tmp_path, capsys, name, row, said):
    file = write_rows(tmp_path / f"{name}.jsonl", row, row_of(name), "[1]")
    flags = ["--checkpoint", folder, "--no-compile", "--methods", "full", "--max-new-tokens", "3"]
    assert main(["--data", file, *flags, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    captured = capsys.readouterr()
    assert f"{file}:1: skipped: {said}" in captured.err and f"{file}:3: skipped: a JSON object" in captured.err
    assert f"{folder} {name} multi-request" in captured.out


def test_the_hub_has_a_file_for_every_task(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "x.jsonl", row_of("scbench_kv"))
    asked = []

    def download(*what, **more):
        asked.append((*what, more))
        return file

    monkeypatch.setattr(scbench, "hf_hub_download", download)
    command = ["--hub", "scbench_kv", "--checkpoint", folder, "--no-compile", "--methods", "full"]
    assert main([*command, "--max-new-tokens", "3"]) == 0
    assert asked == [("microsoft/SCBench", "data/scbench_kv.jsonl", {"repo_type": "dataset"})]
    assert Path("scbench_kv.predictions.jsonl").exists()


# ---- what is read


def texts(tokenizer, dialogue: Dialogue) -> list[str]:
    decode = partial(tokenizer.backend.backend.decode, skip_special_tokens=False)
    return [decode(ids) for ids in (dialogue.context, *dialogue.reads)]


def test_chat_turns_spell_what_the_template_would(tmp_path):
    _, tokenizer = load(str(make_checkpoint(tmp_path / "a", tokenizer="tokenizers")))
    example = scbench.data_example(TASKS["scbench_kv"], row_of("scbench_kv"))
    flags = ["--data", "scbench_kv.jsonl", "--mode", "multi-turn"]
    read = texts(tokenizer, scbench.make_dialogue(scbench.parse_arguments(flags), tokenizer, example))
    first, *rest = [{"role": "user", "content": f"{example.context}\n\nWhere?"}, {"role": "assistant", "content": "x"}]
    messages = [first, *rest, {"role": "user", "content": "Where?"}]
    assert "".join(read) == tokenizer.render(messages) and read[2].startswith("x<|user|>")
    requests = texts(tokenizer, scbench.make_dialogue(scbench.parse_arguments(flags[:2]), tokenizer, example))
    assert "".join(requests[:2]) == tokenizer.render([first]) and requests[1] == requests[2]
    plain = scbench.parse_arguments([*flags, "--no-chat"])
    read = texts(tokenizer, scbench.make_dialogue(plain, tokenizer, example))
    assert read == ["<|begin|>" + example.context, "\n\nWhere?", "x\n\nWhere?"]


def test_a_template_that_drops_earlier_turns_is_refused(tmp_path):
    _, tokenizer = load(str(make_checkpoint(tmp_path / "a", tokenizer="tokenizers")))
    tokenizer.template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="drops what was said before: run with --no-chat"):
        scbench.chat_frame(tokenizer)


SETTINGS = {"max_new_tokens": 34, "heavy": 7, "recent": 7, "compile": False, "max_context": 512}


def answers(mini, policy: str, dialogue: Dialogue) -> list[list[int]]:
    conversation = Conversation(*mini, dialogue.context, policy, **SETTINGS)
    return [result.token_ids for result, _ in converse(conversation, dialogue)]


def fresh(mini, policy: str, context: list[int], read: list[int]) -> list[int]:
    conversation = Conversation(*mini, context, policy, **SETTINGS)
    conversation.read(read)
    return conversation.answer().token_ids


@pytest.mark.parametrize("policy", ["full", "slide", "discontinuous"])
def test_a_request_is_answered_as_if_it_were_the_first(mini, policy):
    dialogue = dialogue_of(mini)
    assert answers(mini, policy, dialogue) == [fresh(mini, policy, dialogue.context, ids) for ids in dialogue.reads]


def test_a_turn_follows_the_reference_answers(mini):
    dialogue = dialogue_of(mini, "--mode", "multi-turn")
    reads = [[*ids[:-3], 9, 9, *ids[-3:]] for ids in dialogue.reads]  # something that the model would not have said
    given = answers(mini, "full", replace(dialogue, reads=reads))
    context, expected = dialogue.context, []
    for ids in reads:
        expected.append(fresh(mini, "full", context, ids))
        context = context + ids
    assert given == expected


def test_a_turn_follows_the_models_own_answers(mini):
    dialogue = dialogue_of(mini, "--mode", "multi-turn", "--own-answers")
    assert [len(ids) for ids in dialogue.reads] == [3, 4, 4, 4], "no reference answer, a newline before a later query"
    given = answers(mini, "full", dialogue)
    context, expected = dialogue.context, []
    for ids in dialogue.reads:
        ids = ids[-3:]  # the newline is the token that the model has stopped at
        expected.append(fresh(mini, "full", context, ids))
        context = context + ids + expected[-1]
    assert given == expected


def test_room_is_what_follows_the_context_at_most():
    reads = [[1] * 5, [1] * 8]
    assert Dialogue("multi-request", False, [1], reads).room(10) == 8
    assert Dialogue("multi-turn", False, [1], reads).room(10) == 13
    assert Dialogue("multi-turn", True, [1], reads).room(10) == 33


def test_contexts_that_do_not_fit_are_named(folder, tmp_path, capsys):
    rows = [row_of("scbench_kv", context="the cat " * n) for n in (2, 400)]
    file = write_rows(tmp_path / "scbench_kv.jsonl", *rows)
    command = ["--data", file, "--checkpoint", folder, "--no-compile", "--methods", "full", "--max-new-tokens", "3"]
    command += ["--predictions", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "o.json")]
    assert main(command) == 0
    assert "context 2: skipped: it needs" in capsys.readouterr().err
    assert json.loads((tmp_path / "o.json").read_text())["lines"][0]["contexts"] == 1
    write_rows(tmp_path / "scbench_kv.jsonl", rows[1])
    assert main(command) == 2
    assert "no context fits the model's 512 positions" in capsys.readouterr().err


# ---- methods and settings


def jobs_of(*flags: str) -> list[common.Job]:
    arguments = mini_arguments(*flags)
    return scbench.jobs_of(arguments, {"max_new_tokens": 40}, common.Sizes(prompt=100, output=32))


def test_compressors_run_at_every_share_and_the_others_with_the_whole_context():
    labels = [(job.labels["method"], job.labels["prompt_share"], job.labels["decode_budget"]) for job in jobs_of()]
    whole = [name for name in scbench.METHODS if "compress" not in name]
    assert labels[: len(whole)] == [(name, 1, 1 if name == "full" else 0.5) for name in whole]
    compressors = [name for name in scbench.METHODS if "compress" in name]
    assert labels[len(whole) :] == [(name, share, 1) for share in (0.8, 0.6) for name in compressors]
    assert len(scbench.METHODS) <= 9, "a plot has few colours"
    [job] = jobs_of("--methods", "slide", "--set", "compress=snapkv", "--prompt-share", "0.5", "--recent", "4")
    assert (job.settings["compress"], job.settings["prompt_budget"], job.settings["recent"]) == ("snapkv", 50, 4)


def test_settings_follow_the_task_and_the_flags():
    data = scbench.parse_arguments(["--data", "a.jsonl", "--task", "scbench_mf"])
    assert scbench.settings_of(data, None, []) == ({"max_new_tokens": 5, "compile": True}, 5)
    given = scbench.parse_arguments(["--hub", "scbench_mf", "--max-new-tokens", "9", "--no-compile"])
    assert scbench.settings_of(given, None, []) == ({"max_new_tokens": 9, "compile": False}, 9)


def test_mini_settings_leave_a_margin_beyond_the_longest_solution(mini):
    arguments = mini_arguments("--compile")
    settings, longest = scbench.settings_of(arguments, mini[1], scbench.examples_of(arguments))
    assert settings == {"max_new_tokens": longest + scbench.MARGIN, "compile": True}


# ---- running, being killed, running on

SMALL = ["--mini", "--k", "2", "--contexts", "2", "--seeds", "0", "--methods", "full", "slide"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small run as a function of more flags -> exit status; `.ran` has the policy of every conversation."""
    real = scbench.Conversation

    def small(*flags: str) -> int:
        return main([*SMALL, "--json", str(tmp_path / "o.json"), *flags])

    def conversation(*arguments, **settings):
        small.ran.append(settings["policy"])
        return real(*arguments, **settings)

    small.ran = []
    small.lines = lambda: json.loads((tmp_path / "o.json").read_text())["lines"]
    monkeypatch.setattr(scbench, "Conversation", conversation)
    return small


@pytest.mark.parametrize("kept, runs", [(0, 4), (1, 3), (3, 1), (4, 0)])
def test_a_killed_run_goes_on_with_the_conversation_it_was_in(small, tmp_path, capsys, kept, runs):
    file = tmp_path / "p.jsonl"
    assert small("--predictions", str(file)) == 0
    whole, lines = file.read_bytes().splitlines(keepends=True), small.lines()
    assert len(small.ran) == len(whole) == 4
    small.ran.clear()
    file.write_bytes(b"".join(whole[:kept]) + (whole[kept][:99] if kept < 4 else b""))
    assert small("--predictions", str(file)) == 0
    assert len(small.ran) == runs and [x["accuracy"] for x in small.lines()] == [x["accuracy"] for x in lines]
    if kept == 4:
        assert small.lines() == lines, "times are kept with the answers"
    assert ("half written" in capsys.readouterr().err) is (kept < 4)


def test_an_interrupted_conversation_runs_again_as_a_whole(small, tmp_path, monkeypatch, capsys):
    file, real = tmp_path / "p.jsonl", scbench.converse

    def interrupted(conversation, dialogue):
        turns = real(conversation, dialogue)
        yield next(turns)
        if len(small.ran) == 2:
            raise KeyboardInterrupt
        yield from turns

    monkeypatch.setattr(scbench, "converse", interrupted)
    assert small("--predictions", str(file)) == 130 and "interrupted" in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == 1
    monkeypatch.setattr(scbench, "converse", real)
    small.ran.clear()
    assert small("--predictions", str(file)) == 0 and small.ran == ["full", "slide", "slide"]


def test_predictions_of_another_mode_or_setting_are_not_taken(small, tmp_path):
    for more, runs in (
        ([], 4),
        ([], 0),
        (["--mode", "multi-turn", "--reference-rate", "0"], 4),
        (["--mode", "multi-turn", "--reference-rate", "0", "--own-answers"], 4),
        (["--decode-budget", "0.25"], 2),
        (["--set", "score=current"], 4),
        (["--max-new-tokens", "6"], 4),
        (["--dtype", "float32"], 4),
        (["--k", "3"], 4),
        (["--seeds", "0", "7"], 4),
        (["--device", "cpu"], 0),
    ):
        small.ran.clear()
        flags = ["--max-new-tokens", "5", "--predictions", str(tmp_path / "p.jsonl"), *more]
        assert small(*flags) == 0 and len(small.ran) == runs, more


def test_a_line_has_every_figure(small, capsys):
    assert small("--mode", "multi-turn") == 0
    full, slide = small.lines()
    assert full["accuracy"] == [100, 0] and full["first"][0] == full["last"][0] == 100
    assert [turn for turn, _ in full["start_by_turn"]] == [1, 2]
    assert 0 < full["prefill_s"] < full["first_start_s"] and full["later_start_s"] > 0 and full["restart"] > 0
    saved = full["first_start_s"] - full["later_start_s"]
    assert full["saved_prefills"] == pytest.approx(saved / full["prefill_s"])
    assert slide["slots"] < full["slots"] and slide["kv_bytes"] < full["kv_bytes"]
    header = capsys.readouterr().out.splitlines()[1]
    assert all(name in header for name in ("first start", "later", "saved", "restart", "live peak"))


def test_quarters_and_turns_of_contexts_of_different_lengths():
    row = {"task": "scbench_kv", "seed": 0, "answers": [["x"]] * 4, "preds": ["x", "", "x", "x"]}
    short = row | {"answers": [["x"]] * 2, "preds": ["", "x"]}
    scored = [scbench.scored_of(row), scbench.scored_of(short)]
    assert report.accuracy_by_part(scored, 2) == [100 / 4, 100]
    assert report.accuracy_by_part(scored[:1], 8) == [100, None, 0, None, 100, None, 100, None]


def test_every_default_method_has_room_for_its_own_answers_and_its_place_in_the_plot(small, tmp_path):
    plot = tmp_path / "o.png"
    flags = ["--k", "6", "--contexts", "1", "--mode", "multi-turn", "--own-answers", "--max-new-tokens", "16"]
    assert small(*flags, "--methods", *scbench.METHODS, "--plot", str(plot)) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    whole, compressed = scbench.panels(small.lines())
    assert whole.title == "whole context, decode budget 50%" and len(whole.lines) == 6
    assert len(compressed.lines) == 6 and "h2o keeps 80%" in compressed.lines


# ---- the command line


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "one of the arguments --mini --data --hub is required"),
        (["--hub", "scbench_summary"], "unknown task 'scbench_summary': choose from scbench_kv, "),
        (["--data", "scbench_repoqa_and_kv.jsonl"], "unknown task 'scbench_repoqa_and_kv'"),
        (["--data", "mine.jsonl"], "unknown task 'mine': choose from"),
        (["--data", "mine.jsonl", "--task", "mini"], "unknown task 'mini': choose from"),
        (["--hub", ""], "unknown task 'mini': choose from"),
        (["--data", ""], "--data is '': give a file name"),
        (["--data", "no.jsonl", "--task", "scbench_kv"], "No such file or directory: 'no.jsonl'"),
        (["--data", "/dev/null", "--task", "scbench_kv"], "/dev/null has no usable row"),
        (["--mini", "--own-answers"], "--own-answers goes with --mode multi-turn"),
        (["--mini", "--reference-rate", "2"], "--reference-rate: 2 is not 0 to 1"),
        (["--mini", "--contexts", "0"], "--contexts: 0 is not 1 or more"),
        (["--mini", "--mode", "chat"], "invalid choice: 'chat'"),
        (["--mini", "--methods", "slid"], "unknown policy 'slid'"),
        (["--mini", "--batch-size", "2"], "unknown --batch-size 2"),
        (["--mini", "--plot", "x.txt"], "--plot is x.txt: it must be .png, .pdf or .svg"),
        (
            ["--mini", "--json", "x", "--predictions", "x"],
            "--json, --predictions name the same file",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--checkpoint", folder]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.startswith("scbench.py: error: ") and captured.out == ""
    assert captured.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_limit_takes_the_first_rows(folder, tmp_path):
    file = write_rows(tmp_path / "scbench_kv.jsonl", *[row_of("scbench_kv", context=f"the cat {n}") for n in range(3)])
    command = ["--data", file, "--checkpoint", folder, "--no-compile", "--methods", "full", "--max-new-tokens", "3"]
    assert main([*command, "--limit", "2", "--predictions", str(tmp_path / "p.jsonl")]) == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2


def test_the_script_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "scbench.py"), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "checkpoints/mini k=2 reference-rate=0.0 multi-request"
    assert done.stderr.endswith("full: 2 conversations\nslide: 2 conversations\n")
    assert list(tmp_path.iterdir()) == []
