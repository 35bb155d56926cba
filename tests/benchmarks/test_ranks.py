"""benchmarks/ranks.py: the table on paper is the page's, and the measurement runs."""

from pathlib import Path

import pytest

from benchmarks import ranks

PAGE = Path(__file__).parents[2] / "docs" / "ranks.md"


@pytest.fixture(scope="module")
def paper():
    return ranks.paper()


def test_the_page_has_the_table_that_the_script_computes(paper):
    page = PAGE.read_text()
    assert f"| {' | '.join(ranks.PAPER_COLUMNS)} |" in page
    for line in paper:
        assert f"| {' | '.join(cell(line) for cell in ranks.PAPER_COLUMNS.values())} |" in page


def test_the_table_on_paper_agrees_with_sums_by_hand(paper):
    attention, mlp = 8192 * (64 + 8 + 8 + 64) * 128, 3 * 8192 * 28672
    norms, table = 2 * 8192, 128256 * 8192
    for line in paper:
        n = line["ranks"]
        numbers = 80 * ((attention + mlp) / n + norms) + 8192 + table + table / n
        assert line["weights"] == 2 * numbers
        keys_and_values = 2 * 80 * 8 / n * 128 * 2 * (8192 + 8192)
        assert keys_and_values <= line["full"] <= 1.01 * keys_and_values  # positions take the rest
        assert line["full"] * n == pytest.approx(paper[0]["full"], rel=1e-6)
    assert paper[3]["sent"] == pytest.approx(7 / 8 * (160 * 2 * 16384 + 256512))


@pytest.mark.slow
def test_ranks_and_threads_take_turns(capsys):
    assert ranks.main(["--shape", "mini", "--workload", "16+32", "--dtype", "float32", "--no-compile"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[2:5]] == [["1", "1"], ["1", "2"], ["2", "1"]]
    assert all(float(number) > 0 for line in printed[2:5] for number in line.split()[2:5])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--ranks 3", "8 KV heads and 1408 channels of the MLP cannot be shared out evenly to 3 ranks"),
        ("--workload 8+24", "--workload is 8+24: it must be PROMPT+NEW with NEW above 24"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, flags, complaint):
    assert ranks.main(flags.split()) == 2
    assert f"ranks.py: error: {complaint}" in capsys.readouterr().err
