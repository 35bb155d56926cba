"""Other programs that decode the same checkpoint, for `speed.py --peers`. The project needs none of them.

Each one decodes greedily and has `decode(t)`, `wait()` and `compile_s`, like generate.Engine. It is made prefilled.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf.checkpoint import find_checkpoint
from scope import require


@dataclass(frozen=True)
class Race:
    """What every peer is given: the folder, the prompts [B, M], how many tokens follow, and where it runs."""

    folder: Path
    prompts: list[list[int]]
    new: int
    dtype: torch.dtype
    device: torch.device


class Transformers:
    """Hugging Face transformers, called as its manual does: with a static cache, only the decode step is compiled."""

    def __init__(self, race: Race, static: bool):
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

        self.device = race.device
        self.model = AutoModelForCausalLM.from_pretrained(race.folder, dtype=race.dtype).to(race.device).eval()
        length = len(race.prompts[0]) + race.new
        config = self.model.config
        named = signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in named else "past_key_values"  # before transformers 5.24
        self.cache = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
        self.step = torch.compile(self.model.forward, fullgraph=True, dynamic=False) if static else self.model.forward
        prompts = torch.tensor(race.prompts, device=race.device)
        self.compile_s = self.compile(prompts) if static else 0.0
        self.token = self.read(self.model.forward, prompts)

    @torch.inference_mode()
    def compile(self, prompts: Tensor) -> float:
        """The first step compiles; the cache is empty again afterwards."""
        self.token = self.read(self.model.forward, prompts)
        started = time.perf_counter()
        self.decode(1)
        self.wait()
        self.cache.reset()
        return time.perf_counter() - started

    @torch.inference_mode()
    def read(self, forward: Callable, ids: Tensor) -> Tensor:
        """ids [B, n] -> the likeliest next tokens [B, 1]."""
        out = forward(ids, **{self.cache_name: self.cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    def decode(self, t: int) -> None:
        self.token = self.read(self.step, self.token)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class LlamaCpp:
    """llama.cpp in its own defaults (K and V in float16); the weights are those of the .gguf file in the folder.

    Its C functions are called without the Python binding's `eval` and `sample`, which copy the logits of each step.
    """

    compile_s = 0.0

    def __init__(self, race: Race):
        import llama_cpp

        require(len(race.prompts) == 1, "--batch-sizes", len(race.prompts), "1 for llama.cpp, which has one row here")
        length, threads = len(race.prompts[0]) + race.new, torch.get_num_threads()
        where = {"n_gpu_layers": -1 if race.device.type == "cuda" else 0, "verbose": False}
        sizes = {"n_ctx": length, "n_batch": length, "n_threads": threads, "n_threads_batch": threads}
        self.library = llama_cpp
        self.model = llama_cpp.Llama(str(find_gguf(race.folder)), **sizes, **where)
        self.read(race.prompts[0])

    def read(self, ids: list[int]) -> None:
        tokens = (self.library.llama_token * len(ids))(*ids)  # the batch is a pointer to them
        if code := self.library.llama_decode(self.model.ctx, self.library.llama_batch_get_one(tokens, len(ids))):
            raise ValueError(f"llama.cpp could not decode {len(ids)} tokens: llama_decode returned {code}")
        last = self.library.llama_get_logits_ith(self.model.ctx, -1)  # waits for them
        logits = np.ctypeslib.as_array(last, (self.model.n_vocab(),))
        self.token = torch.tensor([int(logits.argmax())])

    def decode(self, t: int) -> None:
        self.read(self.token.tolist())

    def wait(self) -> None:
        """`read` has waited for the logits."""


def find_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    remedy = "one, say from llama.cpp's convert_hf_to_gguf.py with --outtype bf16"
    require(len(found) == 1, "--peers llama.cpp: .gguf files", f"{len(found)} in {folder}", remedy)
    return found[0]


PEERS: dict[str, tuple[str, Callable]] = {  # name -> the package it needs, how it is made
    "transformers-static": ("transformers", lambda race: Transformers(race, static=True)),
    "transformers-dynamic": ("transformers", lambda race: Transformers(race, static=False)),
    "llama.cpp": ("llama_cpp", LlamaCpp),
}
PIP_NAMES = {"llama_cpp": "llama-cpp-python"}


def check_peers(names: list[str], checkpoint: str | None) -> None:
    """Refuse, in one line, what a peer lacks."""
    if names and not checkpoint:
        raise ValueError(f"--peers {' '.join(names)}: they read a checkpoint, so give --checkpoint too")
    for package in (PEERS[name][0] for name in names):
        if not find_spec(package):
            raise ValueError(f"--peers: {package} is not installed: pip install {PIP_NAMES.get(package, package)}")


def make_peer(name: str, checkpoint: str, prompts: list[list[int]], new: int, dtype, device):
    return PEERS[name][1](Race(find_checkpoint(checkpoint), prompts, new, dtype, device))
