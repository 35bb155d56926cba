"""What the speed benchmark asks of the machine: clocks, how fast it reads, how much memory a process held."""

import gc
import platform
import resource
import sys
import time
from pathlib import Path

import torch


def describe(device: torch.device) -> dict:
    """What a figure depends on beside the code. read_bandwidth, in bytes/s, is measured now."""
    on_gpu = device.type == "cuda"
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()},
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "read_bandwidth": bandwidth(device, 2**32 if on_gpu else 2**28),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s, the best of 50 passes over `size` bytes: a CPU sums them, a GPU copies one half to the other."""
    buffer = torch.ones(size // 8, dtype=torch.float64, device=device)
    half, other = buffer.chunk(2)
    work = buffer.sum if device.type == "cpu" else lambda: half.copy_(other)
    times = []
    for _ in range(50):
        start = stamp(device)
        work()
        times.append(seconds(start, stamp(device)))
    return size / min(times)


def stamp(device: torch.device):
    """A moment: of the clock, or of the GPU's queue, which the host runs ahead of."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(start, end) -> float:
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def forget_peak(device: torch.device) -> int:
    """Start the search for a GPU's peak anew; returns the bytes in use now (0 for a CPU, whose peak only grows)."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release(device: torch.device) -> None:
    """Graphs and caches of the race before, so that the next one finds the memory and torch's tables empty."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
