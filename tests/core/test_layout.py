"""The five files: what they import, what they know, and that they run without anything else."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scope import COMPRESSORS, SCORES, STRATEGIES

ROOT = Path(__file__).parents[2]
FIVE = ["scope", "kernels", "model", "cache", "generate"]
FOLDERS = [f"{folder}/{path.name}" for folder in ("hf", "cli") for path in sorted((ROOT / folder).glob("*.py"))]
FILES = [*(f"{name}.py" for name in FIVE), *FOLDERS]
MAY_IMPORT = {
    "kernels.py": set(),
    "model.py": {"kernels"},
    "scope.py": {"kernels"},
    "cache.py": {"kernels", "model", "scope"},
    "generate.py": {"kernels", "model", "scope", "cache", "hf", "cli"},
    "hf": {"model", "scope", "hf"},
    "cli": {"scope", "cache", "model", "generate", "cli"},
}
every_file = pytest.mark.parametrize("file", FILES)


def parse(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(tree) -> set[str]:
    """First parts of the names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name.split(".")[0] for name in names}


@every_file
def test_imports_run_one_way(file):
    ours = imported(parse(file)) & {*FIVE, "hf", "cli", "", "benchmarks", "tests"}  # "": a relative import
    assert ours <= MAY_IMPORT[file if file in MAY_IMPORT else file.split("/")[0]]


def test_generate_imports_hf_only_where_a_checkpoint_is_loaded():
    """So the five files import without it."""
    tree = parse("generate.py")
    for node in [*tree.body]:
        assert not isinstance(node, ast.Import | ast.ImportFrom) or "hf" not in imported(node)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and "hf" in imported(node)]
    assert [function.name for function in functions] == ["load"]


NAMES = {*STRATEGIES, *SCORES, *COMPRESSORS}


def names_compared(tree) -> list[str]:
    """Names of policies, scores and compressors in comparisons and `match` statements."""
    places = [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.match_case)]
    texts = [node.value for place in places for node in ast.walk(place) if isinstance(node, ast.Constant)]
    return [text for text in texts if text in NAMES]


@every_file
def test_no_file_asks_for_a_policy_by_its_name(file):
    """What a method does is a row of the tables in scope.py. There is no `if policy == "h2o"` anywhere."""
    assert names_compared(parse(file)) == []


def test_the_search_for_names_finds_them():
    assert names_compared(ast.parse("if policy.name == 'slide' or score in ('own', 'x'): pass")) == ["slide", "own"]
    assert names_compared(ast.parse("match name:\n    case 'h2o': pass")) == ["h2o"]
    assert imported(ast.parse("def f():\n    from hf.tokenizer import a\nimport os.path")) == {"hf", "os"}


ALONE = """
import sys
import torch
from generate import Conversation, generate
from model import Llama, ModelConfig


class Stream:
    def push(self, ids, last=False):
        return "".join(map(chr, ids))


class Letters:
    stop_ids = [0]

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def stream(self):
        return Stream()


torch.manual_seed(0)
model = Llama(ModelConfig(128, 16, 24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4)).eval()
pieces = {0: "", 1: ""}


def on_text(index, piece):
    pieces[index] += piece


settings = {"heavy": 3, "recent": 3, "max_new_tokens": 20, "compile": False}
results = list(generate(model, Letters(), ["the cat", "a dog"], "slide", on_text=on_text, **settings))
assert [result.index for result in results] == [0, 1]
assert all(1 <= len(result.token_ids) <= 20 for result in results)
assert [result.text for result in results] == [pieces[0], pieces[1]]
answer = Conversation(model, Letters(), "the cat", "slide", **settings).answer()
assert answer.token_ids == results[0].token_ids
others = {"hf", "cli", "safetensors", "tokenizers", "sentencepiece"}
assert not others & {name.split(".")[0] for name in sys.modules}
"""


def test_the_five_files_run_a_model_and_a_tokenizer_of_ones_own(tmp_path):
    for name in FIVE:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    ran = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
