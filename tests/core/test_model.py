"""The model's logits beside a plain reference: published formulas, loops over heads, Hugging Face's own tensors."""

import math
from functools import partial

import pytest
import torch
import transformers

from checkpoints import CONFIG, make_checkpoint, random_weights, write_json
from generate import load
from hf.checkpoint import scale_llama3
from model import ModelConfig, rope_frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "MHA": {"num_key_value_heads": 4},
    "GQA": {"num_key_value_heads": 2},
    "MQA": {"num_key_value_heads": 1},
    "no num_key_value_heads: MHA": {"num_key_value_heads": None},
    "no head_dim: hidden_size / heads": {"head_dim": None},
    "head_dim of its own": {"head_dim": 12},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "another norm epsilon": {"rms_norm_eps": 0.1},
    "another rope base": {"rope_theta": 100.0},
    "linear rope scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "Llama 3.1 rope scaling": {
        "rope_scaling": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 128}
    },
    "everything at once": {
        "num_key_value_heads": 1,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
IDS = torch.randint(0, CONFIG["vocab_size"], (40,), generator=torch.Generator().manual_seed(1))


def our_logits(folder, ids=IDS, dtype="float32", first_position=0):
    model, _ = load(str(folder), "cpu", dtype)
    with torch.no_grad():
        return model.logits(model(ids[None], first_position + torch.arange(len(ids))[None]))[0]


# ---- the reference


def reference(weights, config, ids):
    """Logits [S, vocab] in float64."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    group = heads // (config["num_key_value_heads"] or heads)
    width = config["head_dim"] or hidden // heads
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()

    def linear(name, x):
        y = x @ weights[f"{name}.weight"].double().T
        return y + weights[f"{name}.bias"].double() if f"{name}.bias" in weights else y

    def norm(name, x):
        size = x.pow(2).mean(-1, keepdim=True).add(config["rms_norm_eps"]).sqrt()
        return x / size * weights[f"{name}.weight"].double()

    x = weights["model.embed_tokens.weight"][ids].double()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = norm(f"{prefix}.input_layernorm", x)
        q, k, v = (linear(f"{prefix}.self_attn.{name}_proj", h).split(width, dim=-1) for name in "qkv")
        mixed = []
        for head in range(heads):
            query, key, value = turn(q[head], config, width), turn(k[head // group], config, width), v[head // group]
            attention = (query @ key.T / math.sqrt(width)).masked_fill(~causal, -math.inf).softmax(-1)
            mixed.append(attention @ value)
        x = x + linear(f"{prefix}.self_attn.o_proj", torch.cat(mixed, -1))
        h = norm(f"{prefix}.post_attention_layernorm", x)
        gate = linear(f"{prefix}.mlp.gate_proj", h)
        x = x + linear(f"{prefix}.mlp.down_proj", gate * gate.sigmoid() * linear(f"{prefix}.mlp.up_proj", h))
    x = norm("model.norm", x)
    return linear("model.embed_tokens" if config["tie_word_embeddings"] else "lm_head", x)


def turn(x, config, width):
    """RoPE [S, width]: channels i and i + width / 2 are one complex number, turned by position * frequency."""
    frequencies = torch.tensor([frequency(config, 2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = torch.arange(len(x))[:, None] * frequencies
    z = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), -1)


def frequency(config, exponent):
    """One channel pair's, scaled as Llama 3.1's release describes it: by wavelength, in three bands."""
    plain, scaling = config["rope_theta"] ** -exponent, config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "linear":
        return plain / scaling["factor"]
    if scaling.get("rope_type") != "llama3":
        return plain
    context, low, high = (
        scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelength = 2 * math.pi / plain
    if wavelength < context / high:
        return plain
    if wavelength > context / low:
        return plain / scaling["factor"]
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * plain / scaling["factor"] + smooth * plain


# ---- what must hold


@every_variant
def test_logits_equal_the_plain_reference(tmp_path, changes):
    wanted = reference(random_weights(CONFIG | changes, seed=3), CONFIG | changes, IDS)
    found = our_logits(make_checkpoint(tmp_path, seed=3, **changes))
    torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=1e-4)


@every_variant
def test_logits_equal_those_of_transformers(tmp_path, changes):
    folder = make_checkpoint(tmp_path, seed=3, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(IDS[None]).logits[0]
    torch.testing.assert_close(our_logits(folder), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "rope" in name or "epsilon" in name])
def test_a_constant_of_the_config_changes_the_logits_of_the_same_weights(tmp_path, name):
    """Else the comparisons above would prove nothing for it: a field that both sides ignore would pass."""
    plain = our_logits(make_checkpoint(tmp_path / "plain"))
    assert (our_logits(make_checkpoint(tmp_path / "varied", **VARIANTS[name])) - plain).abs().max() > 0.01


def test_the_frequencies_of_llama_3_1_itself_equal_the_published_formula():
    scaling = LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    scale = partial(scale_llama3, scaling)
    found = rope_frequencies(ModelConfig(9, 8, 8, 1, 1, 1, 128, rope_theta=500000.0, rope_scale=scale))
    published = {"rope_theta": 500000.0, "rope_scaling": scaling}
    wanted = torch.tensor([frequency(published, 2 * i / 128) for i in range(64)])
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-4)


def test_only_the_distance_between_tokens_matters(tmp_path):
    folder = make_checkpoint(tmp_path)
    torch.testing.assert_close(our_logits(folder, first_position=300), our_logits(folder), atol=2e-3, rtol=1e-3)


def test_a_later_token_changes_no_earlier_logits(tmp_path):
    folder = make_checkpoint(tmp_path)
    torch.testing.assert_close(our_logits(folder, IDS[:25]), our_logits(folder)[:25])


def test_bfloat16_weights_keep_float32_frequencies_and_give_float32_logits(tmp_path):
    folder = make_checkpoint(tmp_path)
    model, _ = load(str(folder), "cpu", "bfloat16")
    exact, rounded = our_logits(folder), our_logits(folder, dtype="bfloat16")
    assert model.embed.weight.dtype == torch.bfloat16 and model.inv_freq.dtype == rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_embeddings_are_one_tensor_in_memory(tmp_path, dtype):
    model, _ = load(str(make_checkpoint(tmp_path, tie_word_embeddings=True)), "cpu", dtype)
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def test_a_tied_checkpoint_may_store_a_head_of_its_own(tmp_path):
    """Fine-tuning has untied some; what was trained is what counts, as in transformers 5."""
    tied = make_checkpoint(tmp_path, tie_word_embeddings=False)
    config = {name: value for name, value in CONFIG.items() if name != "tie_word_embeddings"}
    write_json(tied / "config.json", config | {"tie_word_embeddings": True})
    wanted = reference(random_weights(CONFIG, seed=0), CONFIG | {"tie_word_embeddings": False}, IDS)
    torch.testing.assert_close(our_logits(tied).double(), wanted, atol=2e-4, rtol=1e-4)
