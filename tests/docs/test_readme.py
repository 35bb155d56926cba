"""README.md and docs/*.md: their commands parse, their Python runs as printed, their links and figures hold."""

import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from cache import Cache, CacheSize
from cli.main import parse_arguments
from generate import Options
from model import ModelConfig
from scope import COMPRESSORS, SCORES, STRATEGIES, Policy, schedule

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
METHODS, RESULTS = ROOT / "docs" / "methods.md", ROOT / "docs" / "results.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ---- reading a page


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of every `python ...` command, in blocks without a language and in the text."""
    lines = [line for language, block in blocks(page) if not language for line in block.splitlines()]
    lines += re.findall(r"`(python [^`]+)`", prose(page))
    return [line.split() for line in lines if line.startswith("python ")]


def rows(page: Path, header: str) -> list[list[str]]:
    """The cells of the first table whose header line begins so."""
    _, table = page.read_text().split(f"\n| {header}", 1)
    lines = table.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def examples() -> list:
    """(page, Python, what is printed below it) of the examples that run by themselves."""
    found = []
    for page in PAGES:
        pairs = zip(blocks(page), [*blocks(page)[1:], ("", "")], strict=True)
        shown = [(code, output if kind == "text" else None) for (language, code), (kind, output) in pairs
                 if language == "python" and "import" in code]  # fmt: skip
        found += [pytest.param(*example, id=f"{page.name}-{i}") for i, example in enumerate(shown)]
    return found


def run(*command: str, cwd: Path = ROOT) -> str:
    """Standard error and output of a program of this repository, or of a copy of it."""
    ran = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr + ran.stdout


# ---- commands


@every_page
def test_commands_are_accepted_by_their_own_parser(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "find_spec", bool)  # other programs need not be installed
    (tmp_path / "shares.json").write_text('{"shares": {"prefixkv": [1]}}')  # a command of the page makes it
    for _, script, *argv in commands(page):
        assert (ROOT / script).is_file(), script
        if script == "generate.py":
            arguments = parse_arguments(argv)
            assert Options(**{entry.name: getattr(arguments, entry.name) for entry in fields(Options)})
        elif hasattr(
            module := importlib.import_module(script.removesuffix(".py").replace("/", ".")), "parse_arguments"
        ):
            assert module.parse_arguments(argv)
        else:
            assert all(word in (ROOT / script).read_text() for word in argv)


def test_there_are_commands_to_check():
    assert len(commands(README)) >= 5
    assert len(commands(RESULTS)) >= 10


def test_a_wrong_command_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```\npython generate.py --no-such-flag\n```\n")
    with pytest.raises(ValueError, match="no-such-flag"):
        test_commands_are_accepted_by_their_own_parser(page, tmp_path, monkeypatch)


def test_the_makefile_has_the_targets():
    targets = set(re.findall(r"`make (\w+)`", README.read_text()))
    assert targets == {"demo", "real", "test"}
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)


# ---- what the README prints


@pytest.mark.parametrize("code, output", examples())
def test_python_runs_as_printed(code, output, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README", "exec"), {})
    assert output is not None
    assert capsys.readouterr().out == output


@pytest.mark.slow
def test_the_demo_prints_what_the_readme_shows():
    assert "generate.py --policy discontinuous\n" in (ROOT / "Makefile").read_text()
    printed = run("generate.py", "--policy", "discontinuous", "--no-compile").splitlines()
    _, shown = blocks(README)[0]
    assert "Answer_3" in shown
    shown = [line for line in shown.splitlines() if line != "..." and "compiling pays off" not in line]
    assert {untimed(line) for line in shown} <= {untimed(line) for line in printed}


def untimed(line: str) -> str:
    """A line of the demo without its times, which differ from run to run."""
    return re.sub(r"\d+\.\d+", "#", line) if line.startswith(("time", "speed")) else line


@pytest.mark.slow
def test_the_new_score_works_as_printed(tmp_path):
    """Edits a copy of scope.py as the README says, and runs the copy."""
    for name in ("scope.py", "cache.py", "kernels.py", "model.py", "generate.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("hf", "cli", "checkpoints"):
        shutil.copytree(ROOT / name, tmp_path / name)
    [new] = [block for language, block in blocks(README) if language == "python" and "SCORES" in block]
    function, row = new.removesuffix("}\n").split("SCORES = {\n    # beside the others:\n")
    scope = (tmp_path / "scope.py").read_text()
    assert scope.count("\nSCORES = {\n") == 1
    (tmp_path / "scope.py").write_text(scope.replace("SCORES = {\n", f"{function}SCORES = {{\n{row}"))
    settings = "--score best_ever --no-compile --max-new-tokens 40 --heavy 8 --recent 8 --policy slide"
    assert "score best_ever" in run("generate.py", *settings.split(), cwd=tmp_path)


# ---- what the README says


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1400


def test_the_worked_schedule_is_the_real_one():
    plan = schedule(Policy("slide", heavy=1, recent=1, score="cumulative"), T=4)
    table = rows(README, "t | reuse")
    assert [[int(cell) for cell in row[:4]] for row in table] == [
        [t, *step[:3]] for t, step in enumerate(plan.steps, 1)
    ]
    for (*_, meaning), step in zip(table, plan.steps, strict=True):
        assert ("dead slot" if step.reuse >= 0 else f"slot {step.fresh}") in meaning
        assert ("dies" in meaning) == (step.evict == 1)
    assert schedule(Policy("slide", heavy=1, recent=1, score="cumulative"), T=100).n_slots == 3


def graphs(policy: str) -> set[tuple[bool, int]]:
    """What the README's command compiles: (selects, decode slots read)."""
    options = Options(policy=policy, heavy=768, recent=256, max_new_tokens=4096)
    config = ModelConfig(8, 8, 8, n_layers=4, n_heads=2, n_kv_heads=2, head_dim=2)
    return set(Cache(config, *options.rules(), CacheSize(1, [64], options.max_new_tokens), torch.float32).graph_keys)


def test_the_graphs_are_counted_right():
    growing = graphs("discontinuous")
    assert (len(growing), max(growing)[1]) == (7, 1028)
    assert sum(selects for selects, _ in growing) == 3
    assert [len(graphs(policy)) for policy in ("slide", "cascade", "recent", "h2o", "streaming", "pyramidinfer")] == [
        2
    ] * 6
    assert len(graphs("full")) == 1
    assert "compiles 7" in README.read_text()
    assert "compiles 7: four that append and three that select" in METHODS.read_text()


def test_methods_has_every_row_of_the_tables():
    for header, table in (("`--policy`", STRATEGIES), ("`--score`", SCORES), ("`--compress`", COMPRESSORS)):
        assert {row[0].split("`")[1] for row in rows(METHODS, header)} == set(table)


def test_the_readmes_accuracies_are_those_of_the_results():
    measured = {row[0]: row[3:] for row in rows(RESULTS, "method | any distance")}
    for method, *cells in rows(README, "method | budget"):
        assert [cell.replace(", ", " / ") for cell in cells] == measured[method.split(" (")[0]]


def test_the_readmes_speeds_are_those_of_the_results():
    measured, workload = {}, ()
    for prompt_and_new, batch, policy, _, ratio, _, _, megabytes, _, avx2 in rows(RESULTS, "prompt + new"):
        workload = (prompt_and_new, batch) if batch else workload
        measured[(*workload, policy)] = f"{ratio}, {avx2}", megabytes
    for prompt_and_new, batch, ratio, megabytes in rows(README, "prompt + new"):
        _, full = measured[prompt_and_new, batch, "`full`"]
        assert (ratio, megabytes.split(" → ")[1].removesuffix(" MB")) == measured[prompt_and_new, batch, "`slide`"]
        assert megabytes.split(" → ")[0] == full


COMPARED = ("`full`", "`slide`", "llama.cpp", "transformers")


def test_the_readmes_milliseconds_on_a_real_model_are_those_of_the_results():
    measured = [row[1] for row in rows(RESULTS, "| AVX-512: step ms") if row[0].split()[0] in COMPARED]
    [said] = re.findall(r"a step of `slide` takes.*?\(", README.read_text(), re.DOTALL)
    assert len(measured) == len(COMPARED) and sorted(re.findall(r"\d+\.\d", said)) == sorted(measured)


# ---- links


@every_page
def test_links_point_to_something(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> list[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@every_page
def test_code_that_is_named_exists(page):
    """`cache.py`, `tests/oracle.py` and `scope.schedule` in the text."""
    modules = {name: importlib.import_module(name) for name in ("scope", "cache", "kernels", "model", "generate")}
    for name in re.findall(r"`([\w/]+\.(?:py|md))`", page.read_text()):
        assert (ROOT / name).exists(), name
    for module, member in re.findall(r"`(scope|cache|kernels|model|generate)\.(\w+)", page.read_text()):
        assert member == "py" or hasattr(modules[module], member), f"{module}.{member}"
