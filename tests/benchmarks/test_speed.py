"""benchmarks/speed.py: that it runs, what it counts, and its errors. No test asserts a time."""

import ctypes
import json
import os
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine, speed
from benchmarks.machine import SHAPES, random_model, random_prompts
from benchmarks.peers import LlamaCpp, Race, make_peer
from benchmarks.speed import by_window, main, steadied
from generate import Options
from hf import load_checkpoint
from model import Llama
from scope import STRATEGIES

CPU = torch.device("cpu")
COLUMNS = {"shape", "workload", "batch", "policy", "tokens_per_s", "step_s", "append_s", "select_s"}
COLUMNS |= {
    "compile_s",
    "kv_bytes",
    "read_bytes",
    "swept_bytes",
    "floor_s",
    "step_over_floor",
}
COLUMNS |= {"speed_ratio", "bytes_ratio", "worst_point", "t", "step_s_at_t", "live_bytes_at_t"}


def quick(*argv: str) -> list[str]:
    return ["--quick", "--no-compile", *argv]


def built(policy: str, batch: int = 2, **settings):
    """A runner of the mini shape, prefilled with 24 tokens; 32 may follow."""
    model = random_model("mini", CPU, "bfloat16")
    options = Options(policy=policy, heavy=3, recent=4, max_new_tokens=32, compile=False, **settings)
    return speed.make_runner(model, random_prompts(model.config, batch, 24), policy, options)


# ---- the command


def test_quick_run_fills_every_column_for_every_policy_and_batch(tmp_path, capsys):
    file, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    assert main(quick("--json", str(file), "--plot", str(picture), "--policies", "slide", "h2o:heavy=5")) == 0
    run = json.loads(file.read_text())
    assert run["command"].startswith("python benchmarks/speed.py --quick") and run["read_bandwidth"] > 0
    assert run["versions"]["torch"] == torch.__version__ and run["cpu"] and run["threads"] == 1
    lines = run["decode"]
    expected = [(batch, policy) for batch in (1, 2) for policy in ("full", "slide", "h2o:heavy=5")]
    assert [(line["batch"], line["policy"]) for line in lines] == expected
    assert all(line.keys() == COLUMNS for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["policy", "workload", "batch"] and len(table[2].split()) < len(table[3].split())


def test_full_is_compared_with_itself_and_every_policy_reads_less(tmp_path):
    file = tmp_path / "speed.json"
    assert main(quick("--batch-sizes", "1", "--json", str(file))) == 0
    full, *others = json.loads(file.read_text())["decode"]
    assert full["speed_ratio"] == full["worst_point"] == full["bytes_ratio"] == 1 and full["select_s"] is None
    assert len(others) == 3 and all(line["bytes_ratio"] > 1 and line["select_s"] for line in others)
    for line in [full, *others]:
        assert line["floor_s"] * line["step_over_floor"] == pytest.approx(line["step_s"])
        assert line["tokens_per_s"] == pytest.approx(1 / line["step_s"])


def test_answers_that_share_a_prompt_are_timed_beside_copies_of_it(tmp_path, capsys):
    file = tmp_path / "samples.json"
    work = ["--samples", "3", "--batch-sizes", "2", "--policies", "slide", "--json", str(file)]
    assert main(quick(*work)) == 0
    full, slide = json.loads(file.read_text())["samples"]
    assert (full["policy"], slide["policy"], slide["samples"], slide["batch"]) == ("full", "slide", 3, 2)
    for line in (full, slide):
        assert line["speed_ratio"] == pytest.approx(line["copies_s"] / line["shared_s"], rel=0.5)
        assert 1 / 3 < line["kv_bytes"] / line["copies_kv_bytes"] < 1
    for flags, complaint in {
        ("--samples", "1"): "--samples is 1: it must be 2 or more",
        ("--samples", "2", "--policies", "h2o"): "samples is 2: it must be 1 where answers evict the prompt",
        ("--samples", "2", "--plot", str(tmp_path / "x.png")): "--plot draws decode steps",
    }.items():
        assert main(quick(*flags)) == 2
        assert complaint in capsys.readouterr().err


def test_eviction_is_timed_against_a_full_cache_of_as_many_slots(tmp_path, capsys):
    file = tmp_path / "eviction.json"
    work = ["--eviction", "--batch-sizes", "1", "--policies", "slide", "full:heavy=1", "--json", str(file)]
    assert main(quick(*work)) == 0
    slide, full = json.loads(file.read_text())["eviction"]
    assert slide["slots"] == 2 + 2 + 1 and full["slots"] == 32
    assert slide.keys() - full.keys() == {"select_s"}
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:4] == ["policy", "workload", "batch", "slots"]
    assert main(quick("--eviction", "--plot", str(tmp_path / "x.png"))) == 2
    assert "--plot draws decode steps" in capsys.readouterr().err
    assert main(quick("--eviction", "--policies", "full")) == 2
    assert "--eviction compares policies with full" in capsys.readouterr().err
    assert main(quick("--eviction", "--batch-sizes", "1", "--policies", "slide:heavy=0,recent=0")) == 0


@pytest.mark.slow
def test_a_compiled_run(tmp_path):
    file = tmp_path / "speed.json"
    work = ["--quick", "--workload", "8+4", "--batch-sizes", "1", "--policies", "full", "--json", str(file)]
    assert main(work) == 0
    assert json.loads(file.read_text())["decode"][0]["compile_s"] > 0


@pytest.mark.slow
def test_prefill_runs_every_compressor_in_a_child(tmp_path, monkeypatch):
    file = tmp_path / "prefill.json"
    asked = []
    child = speed.run_child

    def one_child(arguments, compressor, tokens):  # a real process for one, the same work in here for the others
        asked.append(compressor)
        if compressor == "h2o":
            return child(arguments, compressor, tokens)
        return speed.prefill_once(arguments, compressor, tokens)

    monkeypatch.setattr(speed, "run_child", one_child)
    assert main(quick("--prefill", "96", "--json", str(file))) == 0
    lines = json.loads(file.read_text())["prefill"]
    assert asked == [line["compressor"] for line in lines] == speed.TIMED
    columns = {"shape", "prompt", "compressor", "prefill_s", "ratio", "peak_bytes", "scores_bytes"}
    assert all(line.keys() == columns and line["peak_bytes"] > 1e7 for line in lines)
    assert lines[0]["ratio"] == 1 and lines[0]["scores_bytes"] == 4 * 96 * 96 * 4


@pytest.mark.slow
@pytest.mark.parametrize("work, said", [(int, "invalid literal"), (os._exit, "terminated abruptly")])
def test_a_failing_child_is_one_line(work, said, monkeypatch, capsys):
    monkeypatch.setattr(speed, "prefill_once", partial(fail, work))
    assert main(quick("--prefill", "96")) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("speed.py: error: prefill of 96 tokens, full: ") and said in last


@pytest.mark.slow
def test_compile_time_is_that_of_a_cold_child_for_each_depth(tmp_path, capsys):
    file = tmp_path / "depths.json"
    assert (
        main(["--quick", "--batch-sizes", "1", "--depths", "1", "2", "--policies", "slide", "--json", str(file)]) == 0
    )
    one, two = json.loads(file.read_text())["depths"]
    assert (one["layers"], two["layers"]) == (1, 2) and one["graphs"] == two["graphs"] == 2
    assert one["compile_ratio"] == 1 and two["compile_ratio"] == two["compile_s"] / one["compile_s"]
    assert min(one["compile_s"], one["cpu_s"]) > 1, "not cold"
    assert "CPU ratio" in capsys.readouterr().out.splitlines()[0]


MINI = ["--checkpoint", "checkpoints/mini", "--workload", "24+12", "--batch-sizes", "1", "--policies", "slide"]


def test_a_checkpoint_runs_beside_a_peer_that_is_counted_like_the_full_cache(tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "speed.json"
    assert main(quick(*MINI, "--peers", "transformers-dynamic", "--json", str(file))) == 0
    full, slide, peer = json.loads(file.read_text())["decode"]
    assert [each["shape"] for each in (full, slide, peer)] == ["checkpoints/mini"] * 3
    assert peer["policy"] == "transformers-dynamic" and peer["compile_s"] == 0
    assert peer["floor_s"] == full["floor_s"] and peer["step_s"] != full["step_s"] and peer.keys() == full.keys()


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["transformers-static", "transformers-dynamic"])
def test_a_peer_says_what_the_full_cache_says(peer):
    pytest.importorskip("transformers")
    model, prompts = load_checkpoint("checkpoints/mini", "cpu", "float32")[0], [[1, 5, 9, 33, 20, 7]]
    options = Options(policy="full", max_new_tokens=12, compile=False, ignore_eos=True)
    ours = speed.make_runner(model, prompts, "full", options).engine
    theirs = make_peer(peer, "checkpoints/mini", prompts, 12, torch.float32, CPU)
    for t in range(1, 12):
        assert theirs.token.flatten().tolist() == ours.token.tolist()
        ours.decode(t)
        theirs.decode(t)


class CountingLlamaCpp:
    """Stands in for the package llama_cpp, which has to be compiled where it is installed: the likeliest next token is
    how many it has read."""

    llama_token = ctypes.c_int32

    def Llama(self, path: str, **settings):
        self.settings, self.read = {"path": path} | settings, 0
        return SimpleNamespace(ctx=self, n_vocab=lambda: 20)

    def llama_batch_get_one(self, tokens, n: int):
        assert len(tokens) == n
        return list(tokens)

    def llama_decode(self, ctx, batch: list[int]) -> int:
        self.read += len(batch)
        return int(self.read > self.settings["n_ctx"])

    def llama_get_logits_ith(self, ctx, i: int):
        assert i == -1, "not the last token's"
        self.logits = (ctypes.c_float * 20)(*(float(token == self.read) for token in range(20)))
        return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_reads_the_prompt_and_then_its_own_tokens_one_by_one(tmp_path, monkeypatch):
    library = CountingLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    race = Race(tmp_path, [[1, 5, 9]], 12, torch.bfloat16, CPU)
    with pytest.raises(ValueError, match=r"\.gguf files is 0 in .*: it must be one, say from llama.cpp's convert"):
        LlamaCpp(race)
    (tmp_path / "weights.gguf").touch()
    peer = LlamaCpp(race)
    threads = torch.get_num_threads()
    wanted = {"path": str(tmp_path / "weights.gguf"), "n_ctx": 15, "n_threads": threads, "n_threads_batch": threads}
    assert wanted.items() <= library.settings.items()
    for t in range(1, 13):
        assert peer.token.tolist() == [t + 2]
        peer.decode(t)
        peer.wait()
    with pytest.raises(ValueError, match="llama.cpp could not decode 1 tokens: llama_decode returned 1"):
        peer.decode(13)
    with pytest.raises(ValueError, match="--batch-sizes is 2: it must be 1 for llama.cpp"):
        LlamaCpp(replace(race, prompts=[[1, 5], [3, 4]]))


def fail(work, *_):
    work("x" if work is int else 1)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--workload", "1024"], "--workload is 1024: it must be PROMPT+NEW"),
        (["--workload", "8+1"], "--workload is 8+1"),
        (["--workload", "-8+8"], "--workload"),
        (["--policies", "slid"], "unknown policy 'slid': choose from full, slide"),
        (["--policies", "slide:heavy=x"], "setting heavy=x"),
        (["--policies", "slide:heavy=-1"], "heavy is -1"),
        (["--batch-sizes", "2", "0"], "--batch-sizes: 0 is not 1 or more"),
        (["--threads", "0"], "--threads: 0 is not 1 or more"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--shape", "9b"], "invalid choice: '9b'"),
        (["--prefill", "40"], "--prefill is 40: it must be more than --prompt-budget 40"),
        (["--prefill", "96", "--prompt-budget", "16"], "obs_window is 32"),
        (["--prefill", "96", "--plot", "a.png"], "--plot draws decode steps"),
        (["--depths", "2", "--plot", "a.png"], "--plot draws decode steps"),
        (["--depths", "2"], "--depths times the compiler"),
        (["--checkpoint", "checkpoints/mini", "--prefill", "96"], "--checkpoint goes neither"),
        (
            ["--peers", "transformers-static"],
            "--peers transformers-static: they read a checkpoint, so give --checkpoint too",
        ),
        (["--peers", "vllm"], "invalid choice: 'vllm'"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json"),
        (["--plot", "a.txt"], "--plot is a.txt"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_before_anything_runs(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(speed, "random_model", None)
    monkeypatch.setattr(speed, "run_child", None)
    assert main(quick(*argv)) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


# ---- what it counts


@pytest.mark.parametrize("policy", STRATEGIES)
@pytest.mark.parametrize("compress", ["full", "pyramidkv"])
def test_live_bytes_are_those_of_the_tokens_that_each_step_attends_to(policy, compress):
    runner = built(policy, compress=compress, prompt_budget=16, obs_window=4)
    cache = runner.engine.cache
    counted = []
    for t in range(1, 32):
        runner.step(t)
        evicted = int(cache.plan[t - 1, :, 2].sum()) * 2 * 2  # rows x KV heads: alive while the step attended
        tokens = sum(int((layer.pos >= 0).sum()) for layer in cache.layers) + evicted
        counted.append(tokens * 2 * 32 * 2)  # K and V, head_dim, bfloat16
    assert speed.live_bytes(cache) == counted
    assert len(runner.seconds) == len(runner.groups()) == 31


@pytest.mark.parametrize("policy", ["full", "slide", "adaptive", "pyramidinfer"])
def test_swept_bytes_hold_the_live_ones_and_are_no_more_than_what_is_allocated(policy):
    cache = built(policy).engine.cache
    allocated = sum(layer.k.codes.nbytes + layer.v.codes.nbytes for layer in cache.layers)
    swept = speed.swept_bytes(cache)
    assert all(a <= b <= allocated for a, b in zip(speed.live_bytes(cache), swept, strict=True))
    assert policy != "full" or set(swept) == {allocated}


def test_steps_of_every_policy_are_all_run_in_order_and_in_turns(monkeypatch):
    ran = []
    runners = [speed.Runner(name, None, None) for name in "abc"]
    monkeypatch.setattr(speed.Runner, "step", lambda self, t: ran.append((self.name, t)))
    speed.take_turns(runners, 20)
    assert {name: [t for n, t in ran if n == name] for name in "abc"} == dict.fromkeys("abc", list(range(1, 21)))
    assert [ran[i][0] for i in (0, 24, 48)] == ["a", "b", "c"]


def test_weights_of_a_step_leave_out_the_table_of_embeddings_but_not_a_tied_head():
    model = built("full").engine.model
    stored = sum(weight.nbytes for weight in model.parameters())
    assert speed.weight_bytes(model) == stored - model.embed.weight.nbytes
    model.head.weight = model.embed.weight
    assert speed.weight_bytes(model) == sum(weight.nbytes for weight in model.parameters())


def test_hiccups_vanish_and_select_steps_do_not():
    groups = [(i // 5, i % 5 == 4, 64) for i in range(10)]
    times = [1, 1, 99, 1, 3, 2, 2, 2, 2, 4]
    assert steadied(times, groups) == [1, 1, 1, 1, 3, 2, 2, 2, 2, 4]
    assert by_window(steadied(times, groups), groups) == [7 / 5, 12 / 5]


def parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_shapes_are_those_of_the_models_they_are_named_after():
    with torch.device("meta"):
        counts = {name: parameters(Llama(config)) for name, config in SHAPES.items()}
    assert counts["1b"] == 1_235_814_400 and counts["8b"] == 8_030_261_248


def test_the_machine_is_described_without_paths():
    about = machine.describe(CPU)
    assert about["gpu"] is None and about["read_bandwidth"] > 1e8 and "/" not in json.dumps(about)
