"""calibrate.py: the tokens that each layer needs, and a file that generate.py reads."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from benchmarks import calibrate
from benchmarks.calibrate import mass_curves, mean_shares, tokens_at_one_mass, tokens_for
from generate import generate, load

DATA = "checkpoints/mini/demo.txt"
masses = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.integers(1, 9), min_size=n, max_size=n), min_size=1, max_size=4)
)


def curves_of(rows):
    """rows: for each layer, the attention that each token receives."""
    mass = torch.tensor(rows, dtype=torch.float64).sort(descending=True).values
    return mass.cumsum(1) / mass.sum(1, keepdim=True)


def test_one_mass_gives_four_tokens_to_the_layers_that_need_one_and_three():
    curves = curves_of([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3]])
    assert tokens_at_one_mass(curves, 4).tolist() == [1, 3], "uniform would be 2 and 2"
    assert [tokens_for(mass, curves).tolist() for mass in (0.35, 0.7, 0.75, 0.85, 1.0)] == [
        [1, 1], [1, 2], [1, 3], [2, 3], [3, 3]
    ]  # fmt: skip


@given(masses, st.data())
def test_the_bisection_finds_what_a_search_of_every_mass_finds(rows, data):
    curves = curves_of(rows)
    total = data.draw(st.integers(len(rows), curves.numel()))
    counts = [tokens_for(mass, curves) for mass in curves.flatten().tolist()]  # between two of them nothing changes
    best = max((each for each in counts if each.sum() <= total), key=lambda each: each.sum(), default=None)
    wanted = [1] * len(rows) if best is None else best.tolist()  # fewer tokens than one each there are not
    assert tokens_at_one_mass(curves, total).tolist() == wanted


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4), st.floats(0.1, 1))
def test_equal_layers_share_evenly(row, n_layers, mass):
    curves = curves_of([row] * n_layers)
    for counts in (tokens_for(mass, curves), tokens_at_one_mass(curves, n_layers * len(row))):
        assert mean_shares([counts.tolist()]) == [1] * n_layers


@given(st.lists(st.lists(st.integers(1, 99), min_size=3, max_size=3), min_size=1, max_size=5))
def test_shares_have_the_mean_one_whatever_the_prompts(counts):
    assert sum(mean_shares(counts)) == pytest.approx(3)


def test_curves_are_those_of_the_attention_that_prefill_gives(tiny):
    """A layer's queries and keys are caught on their way into attention, and scored as the compressor scores them."""
    model, tokenizer = tiny
    ids, caught = tokenizer.encode("the cat sat on the mat"), []

    def attend(q, k, v):
        caught.append(kernels.received_from_last(q, k, *[torch.tensor([len(ids)])] * 2)[0].mean(0))
        return kernels.causal_attention(q, k, v)

    with torch.inference_mode():
        model(torch.tensor([ids]), torch.arange(len(ids))[None], [attend] * 2)
    torch.testing.assert_close(mass_curves(model, ids), curves_of(torch.stack(caught).tolist()), atol=1e-5, rtol=1e-5)


def test_what_it_writes_is_what_generate_reads(tmp_path, capsys):
    out = tmp_path / "shares.json"
    assert calibrate.main(["--data", DATA, "--out", str(out)]) == 0
    shares = json.loads(out.read_text())["shares"]
    assert all(sum(row) == pytest.approx(len(row)) and min(row) < max(row) for row in shares.values())
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == ["layer", *shares] and printed[2][1:] == [f"{row[0]:.2f}" for row in shares.values()]
    model, tokenizer = load("checkpoints/mini")
    settings = {"prompt_budget": 64, "obs_window": 8, "layer_shares": str(out), "max_new_tokens": 4, "compile": False}
    for name in shares:
        kept = []
        prompts = [tokenizer.encode("x" * 40) * 4]
        list(
            generate(
                model, tokenizer, prompts, "full", compress=name, on_step=lambda c, k=kept: k.append(c), **settings
            )
        )
        assert [kept[0].kept_of(layer, 1000) for layer in range(4)] == pytest.approx(
            [64 * x for x in shares[name]], abs=1
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "missing.jsonl"], "prompt file missing.jsonl cannot be read"),
        (["--data", DATA, "--keep", "0"], "--keep: 0 is not above 0"),
        (["--data", DATA, "--out", "missing/shares.json"], "no directory missing"),
        (["--data", DATA, "--out", "checkpoints/mini/shares.json"], "lies in --checkpoint"),
    ],
)
def test_a_mistake_is_one_line(flags, said, tmp_path, capsys):
    assert calibrate.main(["--out", str(tmp_path / "shares.json"), *flags]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("calibrate.py: error: ") and said in last
