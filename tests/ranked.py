"""Starts processes as torchrun does, and what they run: the same cases as one process, so that both can be compared.

`python tests/ranked.py FOLDER` is one rank. It writes FOLDER/rank0.json, or what its number is: case -> result.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
import torch.distributed as dist
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from generate import Conversation, Engine, Options, generate, load, size_of  # noqa: E402
from scope import COMPRESSORS, FORMATS, SCORES, STRATEGIES  # noqa: E402

# ---- processes --------------------------------------------------------------------------------------------


def run_ranks(command, n_ranks: int = 2, said: str = "") -> list[tuple[int, str, str]]:
    """Each rank's exit status, standard output and standard error. command(rank): what follows `python`; said: to rank
    0's standard input. As in torchrun, the store that the ranks meet at is not theirs and outlives them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks), "OMP_NUM_THREADS": "1"}

    def run(rank: int) -> tuple[int, str, str]:
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        heard = said if rank == 0 else "this is rank 0's to read"
        how = {"env": env, "input": heard, "capture_output": True, "text": True, "timeout": 240}
        ran = subprocess.run([sys.executable, *map(str, command(rank))], **how)
        return ran.returncode, ran.stdout, ran.stderr

    with ThreadPoolExecutor(n_ranks) as pool:
        return list(pool.map(run, range(n_ranks)))


# ---- what one process and each rank run ---------------------------------------------------------------------

RAGGED = [[5, 9, 200, 31, 8, 77, 150, 6, 90, 41, 12], [7], [101, 44, 3, 250, 250, 17, 8, 90, 12, 33, 201, 14, 66, 2, 9]]
RUN = {"heavy": 3, "recent": 4, "max_new_tokens": 16, "compile": False, "ignore_eos": True}
COMPRESSED = {"prompt_budget": 5, "obs_window": 2}
RUNS = {policy: {"policy": policy} for policy in STRATEGIES}
RUNS |= {f"{score}, {policy}": {"policy": policy, "score": score} for policy in ("slide", "h2o") for score in SCORES}
RUNS |= {f"compress {name}": {"compress": name} | COMPRESSED for name in COMPRESSORS}
RUNS |= {f"as {name}": {"policy": "h2o", "kv_format": name} for name in FORMATS}
RUNS["one row at a time"] = {"batch_size": 1, "compress": "adakv"} | COMPRESSED
RUNS["question"] = {"compress": "finch", "questions": [3, 1, 4]} | COMPRESSED
RUNS["fewer channels"] = {"compress": "snapkv", "key_channels": 0.5} | COMPRESSED
RUNS["hot"] = {"policy": "slide", "temperature": 1.2, "top_k": 60, "top_p": 0.9, "seed": 3}
RUNS["samples"] = RUNS["hot"] | COMPRESSED | {"samples": 3, "compress": "adakv", "top_k": 8}
TALKS = {policy: {"policy": policy} for policy in ("slide", "discontinuous", "h2o", "streaming")}
TALKS["adakv"] = {"policy": "slide", "compress": "adakv", "score": "sampled"} | COMPRESSED
TALKS["packed"] = {"policy": "h2o", "kv_format": "k8v4"}


def answers(model, tokenizer, shares: str, **settings) -> list[list[int]]:
    settings = RUN | settings | {"layer_shares": shares}
    return [result.token_ids for result in generate(model, tokenizer, RAGGED, **settings)]


def talk(model, tokenizer, **settings) -> list:
    """Tokens, and the tokens held, of four answers: to the context, to a turn, to the next, and to that one again."""
    chat = Conversation(model, tokenizer, RAGGED[0], **RUN | settings, max_context=100)
    results = [chat.answer()]
    chat.read([9, 44, 12])
    results.append(chat.answer())
    snapshot = chat.mark()
    chat.read([70, 3])
    results.append(chat.answer())
    chat.rewind(snapshot)
    chat.read([70, 3])
    results.append(chat.answer())
    return [[result.token_ids, result.stats.live_peak] for result in results]


class Messages(TorchDispatchMode):
    """Counts the collectives that run in it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name, *_ = str(function).split(".")
        if namespace == "_c10d_functional" and name != "wait_tensor":
            self.found[name] += 1
        return function(*args, **kwargs or {})

    def __enter__(self):
        self.found = Counter()
        return super().__enter__()


def count_messages(model, **settings) -> dict[str, dict]:
    """Of prefill, of an append step and of a select step."""
    options = Options(**RUN | settings)
    engine = Engine(model, options, [], size_of(RAGGED, options))
    found = {}
    with Messages() as messages:
        engine.prefill(RAGGED[2:], [0])
    found["prefill"] = messages.found
    for t in range(1, options.max_new_tokens):
        with Messages() as messages:
            engine.decode(t)
        kind = "select" if engine.cache.graph_keys[t - 1][0] else "append"
        assert found.setdefault(kind, messages.found) == messages.found
    return found


def sizes_of(model) -> dict:
    """Numbers of each parameter and of its memory, and the bytes of K and V."""
    numbers = {name: [p.numel(), p.untyped_storage().nbytes() // p.itemsize] for name, p in model.named_parameters()}
    options = Options(**RUN)
    engine = Engine(model, options, [], size_of(RAGGED, options))
    return {
        "weights": numbers,
        "kv": sum(b.nbytes for layer in engine.cache.layers for b in (layer.k.codes, layer.v.codes)),
    }


def compiled(model, **settings) -> dict:
    """Tokens of eager and of compiled steps, and what the generated code of each graph holds."""
    options = Options(**RUN | settings)
    engine = Engine(model, options, [], size_of(RAGGED, options))
    found = {"eager": steps(engine), "messages": [], "largest": 0}
    codes = []  # of the graphs; a graph from the caches would come without it
    no_caches = inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False)
    with patch.object(GraphLowering, "save_output_code", codes.append), no_caches[0], no_caches[1]:
        engine = Engine(model, Options(**RUN | settings | {"compile": True}), [], size_of(RAGGED, options))
    for code in codes:
        calls = [code.count(f"{name}.default(") for name in ("all_reduce_", "all_gather_into_tensor")]
        found["messages"].append(calls)
        sizes = re.findall(r"empty_strided_cpu\(\((.*?)\)", code)
        numbers = [torch.Size(map(int, re.findall(r"\d+", size))).numel() for size in sizes]
        found["largest"] = max(found["largest"], *numbers)
    with torch.compiler.set_stance("fail_on_recompile"):
        found["compiled"] = steps(engine)
    slots = [slots.codes.numel() for layer in engine.cache.layers for slots in (layer.k, layer.v)]
    return found | {"smallest buffer of the cache": min(slots)}


def steps(engine) -> list[list[int]]:
    """The tokens of all steps."""
    first = engine.prefill(RAGGED, [0, 1, 2])
    return [first.tolist()] + [engine.decode(t).tolist() for t in range(1, engine.options.max_new_tokens)]


def run_cases(folder: Path, with_compiler: bool) -> dict:
    model, tokenizer = load(str(folder / "biased"))
    shares = str(folder / "shares.json")
    found = {name: answers(model, tokenizer, shares, **settings) for name, settings in RUNS.items()}
    found |= {f"talk {name}": talk(model, tokenizer, **settings) for name, settings in TALKS.items()}
    tied, uneven = (load(str(folder / name)) for name in ("tied", "uneven"))
    found |= {"tied": answers(*tied, shares), "uneven": answers(*uneven, shares)}
    found |= {f"sizes {name}": sizes_of(each[0]) for name, each in (("tied", tied), ("biased", (model,)))}
    kinds = {"slide": {"policy": "slide", "score": "sampled"}, "h2o": {"policy": "h2o", "interval": 4}}
    kinds["adakv"] = {"policy": "slide", "compress": "adakv"} | COMPRESSED
    found |= {f"messages {name}": count_messages(model, **settings) for name, settings in kinds.items()}
    found["messages uneven"] = count_messages(uneven[0])
    if with_compiler:
        # Nothing but the prompt's number of tokens may stay, so each step selects: one graph, which appends too.
        found["compiled"] = compiled(tied[0], policy="h2o", score="sampled", heavy=0, recent=0)
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = run_cases(Path(sys.argv[1]), with_compiler=True)
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
