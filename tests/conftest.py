import pytest
import torch
from hypothesis import settings

from checkpoints import make_checkpoint
from generate import load

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every run
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random two-layer model with its tokenizer, loaded."""
    return load(str(make_checkpoint(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    """One layer: half the time to compile."""
    return load(str(make_checkpoint(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)))


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """One layer with a head_dim of 64: 16 words of 8-bit codes, two groups of 4-bit codes."""
    folder = make_checkpoint(tmp_path_factory.mktemp("wide"), num_hidden_layers=1, head_dim=64)
    return load(str(folder))[0]
