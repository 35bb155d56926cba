"""Other programs that decode the same checkpoint, for `speed.py --peers`. The project needs none of them.

Each one decodes greedily and has `decode(t)`, `wait()` and `compile_s`, like generate.Engine. It is made prefilled.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor

from hf.checkpoint import find_checkpoint


@dataclass(frozen=True)
class Race:
    """What every peer is given: the folder, the prompts [B, M], how many tokens follow, and where it runs."""

    folder: Path
    prompts: list[list[int]]
    new: int
    dtype: torch.dtype
    device: torch.device
    gguf: str | None  # the same weights as llama.cpp reads them


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
    """llama.cpp through llama-cpp-python, one prompt, with as many threads as torch has."""

    compile_s = 0.0

    def __init__(self, race: Race):
        from llama_cpp import Llama

        (prompt,), threads = race.prompts, torch.get_num_threads()
        size = {"n_ctx": len(prompt) + race.new, "n_threads": threads, "n_threads_batch": threads}
        self.model = Llama(race.gguf, verbose=False, **size)
        self.model.eval(prompt)

    def decode(self, t: int) -> None:
        self.model.eval([self.model.sample(temp=0.0)])

    def wait(self) -> None:
        pass  # eval returns when the logits are there


PEERS: dict[str, tuple[str, Callable]] = {  # name -> the package it needs, how it is made
    "transformers-static": ("transformers", lambda race: Transformers(race, static=True)),
    "transformers-dynamic": ("transformers", lambda race: Transformers(race, static=False)),
    "llama.cpp": ("llama_cpp", LlamaCpp),
}
INSTALL = {"transformers": "transformers", "llama_cpp": "llama-cpp-python"}


def check_peers(names: list[str], checkpoint: str | None, gguf: str | None, batch_sizes: list[int]) -> None:
    """Refuse, in one line, what a peer lacks."""
    if names and not checkpoint:
        raise ValueError(f"--peers {' '.join(names)}: they read a checkpoint, so give --checkpoint too")
    for package in (PEERS[name][0] for name in names):
        if not find_spec(package):
            raise ValueError(f"--peers: {package} is not installed: pip install {INSTALL[package]}")
    if "llama.cpp" in names and not (gguf and Path(gguf).is_file()):
        raise ValueError(f"--gguf is {gguf}: llama.cpp needs the same weights as a GGUF file (docs/results.md)")
    if "llama.cpp" in names and batch_sizes != [1]:
        raise ValueError(f"--batch-sizes is {batch_sizes}: with llama.cpp it must be 1")


def make_peer(name: str, checkpoint: str, prompts: list[list[int]], new: int, dtype, device, gguf: str | None):
    return PEERS[name][1](Race(find_checkpoint(checkpoint), prompts, new, dtype, device, gguf))
