"""What the speed benchmark runs on: the machine, and models of random weights, because speed needs no training."""

import gc
import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch

from hf.checkpoint import find_dtype
from model import Llama, ModelConfig


def describe(device: torch.device) -> dict:
    """What a figure depends on beside the code. read_bandwidth, in bytes/s, is measured now."""
    on_gpu, info = device.type == "cuda", Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()},
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "read_bandwidth": bandwidth(device, 2**32 if on_gpu else 2**28),
    }


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s, the best of 50 passes over `size` bytes: a CPU sums them, a GPU copies one half to the other."""
    buffer = torch.ones(size // 8, dtype=torch.float64, device=device)
    half, other = buffer.chunk(2)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        if device.type == "cpu":
            buffer.sum()
        else:
            half.copy_(other)
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return size / min(times)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status, peak = Path("/proc/self/status"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.exists() else "")  # `peak`: the parent's, if higher
    return peak if sys.platform == "darwin" else 1024 * int(own[1] if own else peak)


def release(device: torch.device) -> None:
    """Graphs and caches of the race before, so that the next one finds the memory and torch's tables empty."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


LONGEST = 131072  # positions; no table of them is stored, so they cost nothing
SHAPES = {  # vocabulary, hidden, intermediate, layers, query heads, KV heads, head_dim
    "mini": ModelConfig(301, 128, 384, 4, 4, 2, 32, max_positions=LONGEST),
    "cpu": ModelConfig(4096, 512, 1408, 8, 8, 8, 64, max_positions=LONGEST),
    "cpu-gqa": ModelConfig(4096, 512, 1408, 8, 8, 2, 64, max_positions=LONGEST),
    "smollm2": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, max_positions=LONGEST, tie_embeddings=True),  # 135M
    "1b": ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, max_positions=LONGEST, tie_embeddings=True),
    "8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, max_positions=LONGEST),
}


def random_model(shape: str, device: torch.device, dtype: str) -> Llama:
    """A model of this shape with torch's initial weights, made in `dtype` on the device: no memory is taken twice."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(find_dtype(dtype, {}))
    try:
        with torch.device(device):
            model = Llama(SHAPES[shape])
    finally:
        torch.set_default_dtype(default)
    return model.to(device).eval().requires_grad_(False)


def random_prompts(config: ModelConfig, batch: int, tokens: int) -> list[list[int]]:
    return torch.randint(config.vocab_size, (batch, tokens)).tolist()
