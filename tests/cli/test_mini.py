"""The bundled model: what the README says of it must hold."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from generate import MINI, generate, load

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("problems", MINI / "problems.py")
problems = importlib.util.module_from_spec(spec)
sys.modules["problems"] = problems
spec.loader.exec_module(problems)


@pytest.fixture(scope="module")
def mini():
    return load(str(MINI))


def accuracy(mini, policy, n_questions=16, prompts=8, **settings):
    """Share of right answers, of all questions and of cross-references alone."""
    made = [problems.make_problem(f"test {i}", n_questions) for i in range(prompts)]
    settings = {"max_new_tokens": 32 * n_questions, "batch_size": prompts, "compile": False} | settings
    results = generate(*mini, [problem.prompt for problem in made], policy, **settings)
    right, crossing = [], []
    for problem, result in zip(made, results, strict=True):
        found = problems.read_results(result.text)
        hits = [found.get(i + 1) == wanted for i, wanted in enumerate(problem.expected)]
        right += hits
        crossing += [hit for hit, crosses in zip(hits, problem.is_reference, strict=True) if crosses]
    return sum(right) / len(right), sum(crossing) / len(crossing)


@pytest.mark.parametrize("n_questions", [16, 24, 30])
def test_with_the_full_cache_it_answers_at_least_99_percent(mini, n_questions):
    everything, crossing = accuracy(mini, "full", n_questions)
    assert everything >= 0.99
    assert crossing >= 0.98


def test_the_weights_are_small_and_safe():
    assert (MINI / "model.safetensors").stat().st_size < 10e6
    assert not [path for path in MINI.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_demo_answers_as_the_full_cache_does(mini):
    prompt = (MINI / "demo.txt").read_text()
    [demo] = generate(*mini, [prompt], compile=False)
    [full] = generate(*mini, [prompt], "full", compile=False)
    assert demo.text == full.text
    assert demo.finish_reason == "stop"
    assert demo.stats.kv_bytes < 0.7 * demo.stats.kv_bytes_full


@pytest.mark.slow
def test_policies_lie_in_their_bands_at_a_quarter_of_the_output(tmp_path):
    """Accuracies of a small run; wide bands, because 12 prompts are few. A method that moves out has changed."""
    command = "benchmarks/longgenbench.py --mini --k 24 --prompts 12 --seeds 0 --decode-budget 0.25 --min-distance 6"
    bands = {
        "full": (99, 100),
        "slide": (85, 100),
        "discontinuous": (75, 98),
        "slide:score=current": (50, 85),
        "recent": (50, 85),
        "streaming": (30, 85),
    }
    command = [*command.split(), "--methods", *bands, "--json", "out.json"]
    ran = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    lines = {line["method"]: line["accuracy"][0] for line in json.loads((tmp_path / "out.json").read_text())["lines"]}
    assert not {name: lines[name] for name, (low, high) in bands.items() if not low <= lines[name] <= high}
