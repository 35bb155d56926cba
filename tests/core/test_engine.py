"""The engine: what must not change the tokens, what is refused, and what the compiled graphs may not do."""

import copy
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

import kernels
from cache import READ_BUCKET, Cache, CacheSize, free_memory
from checkpoints import make_checkpoint
from generate import (
    Conversation,
    Engine,
    Options,
    Request,
    find_questions,
    generate,
    padded_width,
    run,
    size_of,
)
from model import Llama, ModelConfig
from scope import SCORES, STRATEGIES

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 9, 200, 31], [7], [101, 44, 3, 250, 250, 17, 8, 90, 12]]
RUN = {"heavy": 3, "recent": 4, "max_new_tokens": 30, "compile": False, "ignore_eos": True}
every_policy = pytest.mark.parametrize("policy", STRATEGIES)
every_small_policy = pytest.mark.parametrize("policy", [name for name in STRATEGIES if name != "full"])
# A policy and a score know nothing of each other. So every policy runs with one score, and every score with a frozen
# and with a shared pool.
RANKINGS = [(policy, "cumulative") for policy in STRATEGIES]
RANKINGS += [(policy, score) for policy in ("slide", "h2o") for score in SCORES if score != "cumulative"]
every_ranking = pytest.mark.parametrize(("policy", "score"), RANKINGS)


def tokens(tiny, prompts=PROMPTS, policy="discontinuous", **changes):
    return [result.token_ids for result in generate(*tiny, prompts, policy, **RUN | changes)]


def requests(prompts):
    return [Request(i, ids, RUN["max_new_tokens"]) for i, ids in enumerate(prompts)]


# ---- what must not change the tokens


@pytest.mark.parametrize(("policy", "score"), [ranking for ranking in RANKINGS if ranking[0] != "full"])
def test_a_budget_of_the_whole_output_gives_the_full_caches_tokens(tiny, policy, score):
    assert tokens(tiny, policy=policy, score=score, heavy=300, recent=300) == tokens(tiny, policy="full")


@every_small_policy
def test_a_small_budget_changes_the_tokens(tiny, policy):
    assert tokens(tiny, policy=policy) != tokens(tiny, policy="full")


@every_policy
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "seed": 4}])
def test_a_row_of_a_ragged_batch_generates_what_it_generates_alone(tiny, policy, sampling):
    together = tokens(tiny, policy=policy, **sampling)
    for batch_size in (1, 2):
        assert tokens(tiny, policy=policy, batch_size=batch_size, **sampling) == together


@every_ranking
def test_a_batch_leaves_nothing_behind_for_the_next_one(tiny, policy, score):
    """Three batches through the same buffers: the third equals the first."""
    model, tokenizer = tiny
    options = Options(**RUN | {"policy": policy, "score": score})
    engine = Engine(model, options, tokenizer.stop_ids, size_of(PROMPTS, options))
    first, _, again = (
        [result.token_ids for result in run(engine, tokenizer, requests(prompts))]
        for prompts in (PROMPTS, [[1, 2, 3]], PROMPTS)
    )
    assert again == first == tokens(tiny, policy=policy, score=score)


@every_policy
@pytest.mark.parametrize("changes", [{}, {"compress": "snapkv", "prompt_budget": 5, "obs_window": 2}])
def test_more_prompt_slots_than_needed_change_nothing(tiny, policy, changes):
    assert tokens(tiny, policy=policy, max_context=200, **changes) == tokens(tiny, policy=policy, **changes)


# ---- questions: a window for each prompt

ASKED = ["the cat sat on the mat? a dog and a cat", "a dog? the cat", "a cat? and a dog? the mat"]
FINCH = {"compress": "finch", "prompt_budget": 8, "obs_window": 1}


@pytest.mark.parametrize("after", ["?", "a", "the c", "mat"])
def test_a_question_is_the_shortest_end_of_a_prompt_that_holds_all_text_after_the_last_delimiter(tiny, after):
    tokenizer, prompts = tiny[1], [text for text in ASKED if after in text and not text.endswith(after)]
    ids = [tokenizer.encode(text) for text in prompts]
    for text, row, n in zip(prompts, ids, find_questions(tokenizer, ids, Options(question_after=after)), strict=True):
        question = text.rpartition(after)[2]
        ends = [len(tokenizer.decode(row[:-m])) + len(question) <= len(text) for m in range(1, len(row))]
        assert n == ends.index(True) + 1


def test_each_row_of_a_batch_has_its_own_question_and_generates_what_it_generates_alone(tiny):
    """Found after a text, given in tokens, in a batch, alone, or in a conversation: all the same."""
    numbers = find_questions(tiny[1], [tiny[1].encode(text) for text in ASKED], Options(question_after="?"))
    assert len(set(numbers)) == 3
    found = tokens(tiny, ASKED, question_after="?", **FINCH)
    assert found == [
        row.token_ids for row in generate(*tiny, ASKED, "discontinuous", questions=numbers, **RUN, **FINCH)
    ]
    assert found == tokens(tiny, ASKED, question_after="?", batch_size=1, **FINCH) != tokens(tiny, ASKED, **FINCH)
    chat = Conversation(*tiny, ASKED[0], "discontinuous", question_after="?", **RUN, **FINCH)
    assert chat.answer().token_ids == found[0]


@pytest.mark.parametrize(
    ("questions", "complaint"),
    [
        ([1, 2], "questions is [1, 2]: it must be 3 numbers, one for each prompt"),
        ([1, 2, -1], "question 2 is -1: it must be 0 to 8"),
        ([9, 1, 1], "question 0 is 9: it must be 0 to 8: all of them stay, so they are part of prompt_budget"),
        ([1, 1.0, 1], "question 1 is 1.0"),
    ],
)
def test_questions_that_do_not_fit_are_refused(tiny, questions, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        generate(*tiny, ASKED, questions=questions, **RUN, **FINCH)


def test_few_widths_occur_and_none_is_much_wider_than_the_prompt():
    widths = [padded_width(n) for n in range(1, 8193)]
    assert all(n <= width <= max(n + 7, n * 9 / 8) for n, width in enumerate(widths, 1)) and len(set(widths)) < 80


def test_prompts_of_other_lengths_are_prefilled_in_the_same_shape(tiny, monkeypatch):
    seen, real = set(), kernels.causal_attention
    monkeypatch.setattr(kernels, "causal_attention", lambda q, k, v: (seen.add(q.shape), real(q, k, v))[1])
    tokens(tiny, [[5] * 65, [5] * 70, [5] * 72], batch_size=1)
    assert len(seen) == 1


BLOCKS = {  # lengths of prompts -> rows and width of each block that is read
    (7, 300, 8, 6): [(3, 8), (1, 320)],
    (5, 5, 5, 5, 9): [(4, 8), (1, 16)],
    (20, 90, 9): [(1, 24), (1, 96), (1, 16)],
}


@pytest.mark.parametrize(("lengths", "blocks"), BLOCKS.items())
def test_a_short_prompt_does_not_pay_for_a_long_one_in_its_batch(tiny, monkeypatch, lengths, blocks):
    """Prompts of one width are read together. Rows that fill up a short batch are copied, not read."""
    seen, forward = [], Llama.forward
    watched = lambda model, x, *rest: (seen.append(tuple(x.shape)), forward(model, x, *rest))[1]  # noqa: E731
    monkeypatch.setattr(Llama, "forward", watched)
    tokens(tiny, [[5] * n for n in lengths], batch_size=4)
    assert [shape for shape in seen if shape[1] > 1] == blocks


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_a_run_in_one_line_that_names_the_token(tiny, sampling, value):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    third = tokens(tiny, policy="full", **sampling)[1][2]
    model.embed.weight[third, 0] = value  # so reading it gives logits that are none
    with pytest.raises(ValueError, match=r"prompt \d: the logits of token \d+ are not finite"):
        tokens((model, tokenizer), policy="full", **sampling)


@pytest.mark.parametrize("policy", [name for name, strategy in STRATEGIES.items() if strategy.grows])
@pytest.mark.parametrize("sizes", [(8192, 1024, 32768), (300, 4000, 9000), (768, 256, 4096), (1, 1, 9)])
def test_a_run_has_at_most_eight_graphs_and_reads_little_that_is_empty(policy, sizes):
    heavy, recent, T = sizes
    config = ModelConfig(8, 8, 8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2)
    options = Options(policy=policy, heavy=heavy, recent=recent, max_new_tokens=T)
    with torch.device("meta"):
        cache = Cache(config, *options.rules(), CacheSize(1, [9], T), torch.float32)
    assert len(set(cache.graph_keys)) <= 8
    n_slots = cache.slots[1][0]
    for used, (_, reads) in zip(cache.slots_at, cache.graph_keys, strict=True):
        assert used <= reads <= min(n_slots, used + max(READ_BUCKET, n_slots / 4 + 1))


def test_a_process_may_compile_any_number_of_settings(tiny, monkeypatch):
    """torch stops at 8 graphs of one function, and counts those that are gone."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend="eager", fullgraph=True, dynamic=False))
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setattr(torch._dynamo.config, name, 3)
    torch._dynamo.reset()
    for heavy in range(1, 4):
        settings = {"heavy": heavy, "compile": True, "max_new_tokens": 12}
        assert tokens(tiny, **settings) == tokens(tiny, **settings | {"compile": False})


def test_compiling_says_which_graph_of_how_many_and_how_long_it_may_take(tiny, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    with caplog.at_level("INFO", "scope"):
        [result, *_] = generate(*tiny, PROMPTS, "slide", **RUN | {"compile": True})
    first, second = (line for line in caplog.messages if line.startswith("compiling"))
    assert first == "compiling graph 1 of 2 (append step, 8 decode slots) ..."
    assert re.fullmatch(r"compiling graph 2 of 2 \(select .*\); \d+ s so far, about \d+ s to go \.\.\.", second)
    assert result.stats.eager_step_s > 0


def test_a_cache_that_does_not_fit_is_refused_with_the_batch_that_does(tiny, monkeypatch):
    need = tokens_bytes(tiny, batch_size=3)
    monkeypatch.setattr("generate.free_memory", lambda device: need * 0.7)
    with pytest.raises(ValueError, match=r"the KV cache takes .* GB are free: lower --batch-size to 2"):
        tokens(tiny, batch_size=3)
    assert tokens(tiny, batch_size=2)
    monkeypatch.setattr("generate.free_memory", lambda device: 10)
    with pytest.raises(ValueError, match="lower --max-new-tokens, or shorten the prompt"):
        tokens(tiny, batch_size=1)


def tokens_bytes(tiny, **settings):
    return next(generate(*tiny, PROMPTS, "discontinuous", **RUN | settings)).stats.kv_bytes


def test_the_memory_of_this_machine_is_known_where_linux_says_it():
    free = free_memory(torch.device("cpu"))
    assert free > 10**7 and (free < 10**15 or not Path("/proc/meminfo").exists())


def test_generate_takes_options_too(tiny):
    """Options in the place of the policy's name; further settings change them."""
    options = Options(policy="slide", **RUN)
    [by_options] = generate(*tiny, PROMPTS[:1], options, heavy=2)
    [by_name] = generate(*tiny, PROMPTS[:1], "slide", **RUN | {"heavy": 2})
    assert by_options.token_ids == by_name.token_ids
    assert (by_options.stats.policy, by_options.stats.heavy) == ("slide", 2) and options.heavy == 3
    with pytest.raises(ValueError, match="heavy is -1"):
        generate(*tiny, PROMPTS, options, heavy=-1)


@pytest.mark.parametrize(
    ("prompts", "settings", "complaint"),
    [
        ([], {}, "there are no prompts: give at least one"),
        ([[5], []], {}, "prompt 1 is empty: give it at least one token"),
        ([[320]], {}, "prompt 0 has token id 320: the vocabulary is 0 to 319"),
        ([[5] * 483], {}, "prompt 0 ends at token 483 and 30 may follow, the model has 512 positions: "
                          "lower --max-new-tokens or shorten the prompt"),
        ([[5]], {"max_context": 513}, "max_context is 513: it must be at most the model's 512 positions"),
        ([[5] * 9], {"max_context": 8}, "a prompt of 9 tokens needs 9 slots, max_context is 8: "
                                        "raise --max-context, or shorten the prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_when_generate_is_called(tiny, prompts, settings, complaint):
    """Not when the first result is taken."""
    with pytest.raises(ValueError) as refusal:
        generate(*tiny, prompts, **RUN | settings)
    assert str(refusal.value) == complaint


def test_a_prompt_may_use_up_the_models_positions(tiny):
    [result] = generate(*tiny, [[5] * 482], **RUN)
    assert len(result.token_ids) == 30


def test_an_engine_declares_all_of_its_state_when_it_is_made(tiny):
    model, tokenizer = tiny
    options = Options(**RUN)
    engine = Engine(model, options, tokenizer.stop_ids, size_of(PROMPTS, options))
    declared = set(vars(engine))
    list(run(engine, tokenizer, requests(PROMPTS)))
    assert set(vars(engine)) == declared


def test_a_stop_token_ends_a_row_and_only_that_row(tiny):
    model, tokenizer = tiny
    free = tokens(tiny)
    stop = next(t for t in free[0][3:] if t not in free[1])
    stopping = replace(tokenizer, stop_ids=[stop])
    results = list(generate(model, stopping, PROMPTS[:2], **RUN | {"ignore_eos": False}))
    assert results[0].token_ids == free[0][: free[0].index(stop) + 1]
    assert results[1].token_ids == free[1]
    assert [r.finish_reason for r in results] == ["stop", "length"]
    assert results[0].text == tokenizer.decode(results[0].token_ids[:-1])


def test_streamed_text_is_the_text_of_the_result(tiny):
    streamed = dict.fromkeys(range(3), "")

    def on_text(index, piece):
        streamed[index] += piece

    results = list(generate(*tiny, PROMPTS, on_text=on_text, **RUN))
    assert [streamed[r.index] for r in results] == [r.text for r in results]


def test_a_run_reports_its_own_memory_and_that_of_the_full_cache(tiny):
    [slide] = generate(*tiny, PROMPTS[:1], "slide", **RUN)
    [full] = generate(*tiny, PROMPTS[:1], "full", **RUN)
    assert slide.stats.decode_slots == 3 + 4 + 1
    assert full.stats.decode_slots == 30
    assert slide.stats.kv_bytes < slide.stats.kv_bytes_full == full.stats.kv_bytes == full.stats.kv_bytes_full
    assert slide.stats.steps == 29
    assert slide.stats.tokens_per_s == pytest.approx(29 / slide.stats.decode_s)


# ---- sampling


def frequencies(tiny, **sampling):
    """How often each token is drawn first, by 400 prompts that are all the same."""
    settings = RUN | {"max_new_tokens": 1, "batch_size": 400, "temperature": 1.0} | sampling
    drawn = [r.token_ids[0] for r in generate(*tiny, [PROMPTS[0]] * 400, "full", **settings)]
    return torch.bincount(torch.tensor(drawn), minlength=320) / 400


def probabilities(tiny, temperature=1.0):
    model, _ = tiny
    ids = torch.tensor([PROMPTS[0]])
    logits = model.logits(model(ids, torch.arange(ids.shape[1])[None]))[0, -1]
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_sampling_follows_the_models_distribution(tiny, temperature):
    wanted = probabilities(tiny, temperature)
    chance = 0.8 * (wanted * (1 - wanted) / 400).sqrt().sum()  # mean absolute error of 400 fair draws
    assert (frequencies(tiny, temperature=temperature) - wanted).abs().sum() < 1.3 * chance


def test_top_k_and_top_p_cut_the_tail(tiny):
    prob, order = probabilities(tiny).sort(descending=True)
    assert set(frequencies(tiny, top_k=3).nonzero().flatten().tolist()) <= set(order[:3].tolist())
    kept = int((prob.cumsum(0) - prob < 0.5).sum())
    assert set(frequencies(tiny, top_p=0.5).nonzero().flatten().tolist()) <= set(order[:kept].tolist())
    assert frequencies(tiny, top_k=1)[order[0]] == 1 == frequencies(tiny, top_p=1e-6)[order[0]]


def test_the_seed_and_the_prompts_index_decide_the_draw(tiny):
    hot = {"temperature": 2.0}
    assert tokens(tiny, seed=1, **hot) == tokens(tiny, seed=1, **hot) != tokens(tiny, seed=2, **hot)
    one, two = tokens(tiny, [PROMPTS[0]] * 2, **hot)
    assert one != two


# ---- the compiled graphs


def run_steps(engine, prompts):
    """All decode steps of one batch, as lists of tokens."""
    first = engine.prefill(prompts, list(range(len(prompts))))
    return [first.tolist()] + [engine.decode(t).tolist() for t in range(1, engine.options.max_new_tokens)]


def engine_for(model, **changes):
    options = Options(**RUN | {"compile": True} | changes)
    return Engine(model, options, [], size_of(PROMPTS, options))


@pytest.mark.parametrize(
    ("capability", "bits", "head_dim", "width"),
    [
        ("AVX512", 16, 32, 512),
        ("AVX512", 8, 64, 512),
        ("AVX512", 4, 128, 512),
        ("AVX512", 4, 64, 256),
        ("AVX2", 16, 128, 256),
        ("AVX2", 4, 64, 256),
        ("NO AVX", 16, 64, None),
    ],
)
def test_vectors_are_as_wide_as_the_words_of_a_head(monkeypatch, capability, bits, head_dim, width):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert kernels.compiler_options(bits, head_dim)["cpp.simdlen"] == width


ANSWER = """
import sys
from generate import generate, load
model, tokenizer = load(sys.argv[1])
[result] = generate(model, tokenizer, [[1, 2, 3, 4, 5]], "slide", heavy=4, recent=4, max_new_tokens=24, ignore_eos=True)
print(result.token_ids)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU with AVX-512")
def test_a_cpu_without_avx512_may_share_the_cache_of_graphs(tmp_path):
    """Code for vectors of 16 lanes in vectors of 8 would be wrong, and PyTorch itself does not tell the two apart."""
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=1, head_dim=64)
    shared = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "graphs")}
    command = [sys.executable, "-c", ANSWER, str(folder)]
    answers = [
        subprocess.check_output(command, env=shared | changes, cwd=ROOT, text=True)
        for changes in ({}, {"ATEN_CPU_CAPABILITY": "avx2"})
    ]
    assert answers[0] == answers[1]


COMPILED = [each for each in RANKINGS if "cumulative" in each or "slide" in each]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "score"), COMPILED)
def test_compiled_equals_eager_and_nothing_recompiles_after_warm_up(shallow, policy, score):
    eager = run_steps(engine_for(shallow[0], policy=policy, score=score, compile=False), PROMPTS)
    engine = engine_for(shallow[0], policy=policy, score=score)
    other_lengths = [ids + [1, 2, 3] for ids in reversed(PROMPTS)]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert run_steps(engine, PROMPTS) == eager
        run_steps(engine, other_lengths)
        assert run_steps(engine_for(shallow[0], policy=policy, score=score), PROMPTS) == eager  # another engine


@pytest.mark.slow
def test_sampling_compiles_to_the_same_tokens(shallow):
    hot = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    eager = run_steps(engine_for(shallow[0], compile=False, **hot), PROMPTS)
    assert run_steps(engine_for(shallow[0], **hot), PROMPTS) == eager


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "kv_format"), [("slide", "int8"), ("h2o", "k8v4"), ("slide", "int4")])
def test_compiled_equals_eager_in_every_format(wide, policy, kv_format):
    kept = {"policy": policy, "kv_format": kv_format}
    engine = engine_for(wide, **kept)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert run_steps(engine, PROMPTS) == run_steps(engine_for(wide, compile=False, **kept), PROMPTS)
        again = run_steps(engine, [ids + [1, 2, 3] for ids in PROMPTS])
    assert again != run_steps(engine_for(wide, compile=False, policy=policy), [ids + [1, 2, 3] for ids in PROMPTS])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "kv_format", "bits"),
    [("slide", "model", 16), ("h2o", "model", 16), ("slide", "int8", 8), ("h2o", "int4", 4)],
)
def test_no_graph_holds_a_copy_of_the_cache(wide, policy, kv_format, bits):
    """A scattered write that was not turned back into one in place would allocate a buffer of the cache's size, and so
    would codes that are unpacked before they are multiplied."""
    engine = engine_for(wide, policy=policy, kv_format=kv_format, compile=False)
    smallest = min(slots.codes.numel() for layer in engine.cache.layers for slots in (layer.k, layer.v))
    how = kernels.compiler_options(bits, head_dim=64)
    engine.decode_step = torch.compile(engine.decode_step, fullgraph=True, dynamic=False, options=how)
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache():
        for key in sorted(set(engine.cache.graph_keys)):
            engine.reset()
            _, [code] = run_and_get_code(engine.decode, 1, key)
            sizes = [
                [int(n) for n in re.findall(r"\d+", found)]
                for found in re.findall(r"empty_strided_cpu\(\((.*?)\)", code)
            ]
            assert sizes, "no buffer found: the pattern no longer fits the generated code"
            assert max(torch.Size(size).numel() for size in sizes) < smallest


# ---- a new score


NEW_SCORE = '''
def best_ever(score: Tensor, prob: Tensor, age: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The most attention that any one step has given."""
    return score.maximum(prob)


SCORES = {
    "best_ever": Score(best_ever),'''


def test_a_new_score_is_one_function_and_one_table_line(tmp_path):
    assert len(NEW_SCORE.strip().splitlines()) <= 15
    for file in ("scope.py", "cache.py", "kernels.py", "model.py", "generate.py"):
        shutil.copy(ROOT / file, tmp_path)
    for folder in ("hf", "cli"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / "scope.py").read_text()
    assert source.count("\nSCORES = {") == 1
    (tmp_path / "scope.py").write_text(source.replace("\nSCORES = {", NEW_SCORE))
    checkpoint = make_checkpoint(tmp_path / "tiny")
    command = f"--checkpoint {checkpoint} --prompt cat --policy slide --heavy 3 --recent 3 --ignore-eos --no-compile"
    command += " --max-new-tokens 30 --score {score} --trace {score}.npz"
    both = [command.format(score=score).split() for score in ("cumulative", "best_ever")]
    runs = f"import sys, cli.main; sys.exit(any([cli.main.main(argv) for argv in {both}]))"
    ran = subprocess.run([sys.executable, "-c", runs], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    old, new = (np.load(tmp_path / f"{score}.npz")["pos"] for score in ("cumulative", "best_ever"))
    assert (old != new).any()
