"""fidelity.py: what is fed, what is compared with the full cache, and that a run goes on where it was cut."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import fidelity
from benchmarks.fidelity import Sample, make_samples, parse_arguments, with_needles
from generate import load

README = str(Path(__file__).parents[2] / "checkpoints" / "mini" / "README.md")
SMALL = ["--text", README, "--prompt-tokens", "40", "--output-tokens", "60", "--dtype", "float32"]


@pytest.fixture(scope="module")
def mini():
    return load("checkpoints/mini", dtype="float32")


def lines(tmp_path, *flags) -> dict[str, dict]:
    """The table of a small run, by method."""
    saved = tmp_path / "table.json"
    assert fidelity.main([*SMALL, *flags, "--json", str(saved)]) == 0
    return {line["method"]: line for line in json.loads(saved.read_text())["lines"]}


def test_full_has_the_perplexity_of_the_text_itself(mini, tmp_path):
    model, tokenizer = mini
    found = lines(tmp_path, "--methods", "full", "--pieces", "1")["full"]["perplexity"]
    [sample] = make_samples(parse_arguments([*SMALL, "--pieces", "1"]), model, tokenizer)
    ids = torch.tensor([sample.prompt + sample.output])
    with torch.inference_mode():
        logits = model.logits(model(ids, torch.arange(ids.shape[1])[None]))[0, len(sample.prompt) - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.output)).exp().item()
    assert found == pytest.approx(wanted, rel=1e-4)


def test_full_is_compared_with_itself_and_eviction_changes_predictions(tmp_path):
    table = lines(tmp_path, "--methods", "full", "slide", "recent")
    assert table["full"]["change"][0] == 0 == table["full"]["kl"]
    assert table["full"]["same"] == 1
    for method in ("slide", "recent"):
        assert table[method]["kl"] > 1e-4
        assert table[method]["kv_bytes"] < table["full"]["kv_bytes"]
        assert table[method]["change_parts"][0] == 0, "15 tokens are within the budget, so the first quarter is full's"


@pytest.mark.parametrize("method", ["slide", "discontinuous", "h2o", "streaming"])
def test_a_budget_of_the_whole_output_changes_nothing(tmp_path, method):
    line = lines(tmp_path, "--methods", "full", method, "--decode-budget", "1")[method]
    assert line["kl"] == pytest.approx(0, abs=1e-6)
    assert line["change"][0] == pytest.approx(0, abs=1e-5)


def test_pieces_of_a_text_follow_each_other_and_begin_as_the_model_wants(mini):
    model, tokenizer = mini
    samples = make_samples(parse_arguments([*SMALL, "--pieces", "3"]), model, tokenizer)
    bos, ids = tokenizer.encode(""), tokenizer.encode(Path(README).read_text(), bos=False)
    assert len(samples) == 3
    assert all(sample.prompt[: len(bos)] == bos for sample in samples)
    assert sum((sample.prompt[len(bos) :] + sample.output for sample in samples), []) == ids[: 3 * (100 - len(bos))]


def test_needles_stand_where_they_are_said_to_and_lengths_stay(mini):
    _, tokenizer = mini
    filler = tokenizer.encode("\n", bos=False)[-1:]
    sample = with_needles(Sample(filler * 200, filler * 900), tokenizer, [100, 300], "seed")
    assert (len(sample.prompt), len(sample.output)) == (200, 900)
    assert sorted(needle.distance for needle in sample.needles) == [0, 0, 100, 300]
    text = {where: tokenizer.decode(ids) for where, ids in (("prompt", sample.prompt), ("output", sample.output))}
    for needle in sample.needles:
        code = tokenizer.decode(needle.code)
        assert sample.output[needle.start : needle.start + len(needle.code)] == needle.code
        assert code.strip().isdigit() and len(code.strip()) == 4
        assert text["output"].count(code) == (2 if needle.distance else 1), "once as a fact, once as the answer"
        assert text["prompt"].count(code) == (0 if needle.distance else 1)


def test_needles_are_reported_by_distance(tmp_path, capsys):
    more = ["--output-tokens", "500", "--needles", "--distances", "60", "130", "--methods", "full", "slide"]
    table = lines(tmp_path, *more, "--pieces", "1", "--prompt-tokens", "120")
    assert list(table["slide"]["needles"]) == ["prompt", "60", "130"]
    assert "needle 130" in capsys.readouterr().out


def test_a_run_that_was_cut_goes_on_where_it_stopped(tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    flags = ["--methods", "full", "slide", "--pieces", "2", "--predictions", str(kept)]
    whole = lines(tmp_path, *flags)
    rows = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(rows[:-1]))
    again = lines(tmp_path, *flags)
    assert len(kept.read_text().splitlines()) == len(rows)
    assert again["slide"]["change"] == whole["slide"]["change"]
    assert "3 of 4" in capsys.readouterr().err


def test_own_continuations_are_what_the_model_says(mini, monkeypatch):
    monkeypatch.setattr(fidelity, "REQUESTS", ["Question_1: Dan has 22 cards and finds 8 more.\nSolve Question_1."])
    arguments = parse_arguments(["--output-tokens", "30", "--seed", "3"])
    one, other = (make_samples(arguments, *mini) for _ in range(2))
    assert one == other
    assert len(one[0].output) == 30


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--text", README, "--prompt-tokens", "90000"], "3940 tokens"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", ""], "--text is '': give a file name"),
        (["--needles", "--distances", "5000"], "--distances"),
        (["--needles", "--distances", "300", "301", "--text", README, "--output-tokens", "500"], "apart"),
        (["--methods", "slid"], "slid"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(capsys, flags, named):
    assert fidelity.main(flags) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("fidelity.py: error:") and named in said
