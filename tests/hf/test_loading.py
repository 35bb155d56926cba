"""Checkpoints: every spelling loads alike, and whatever cannot be run is refused in one line that says why."""

import json
import math
import os
import shutil
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from checkpoints import CONFIG, make_checkpoint, random_weights, write_fast_tokenizer, write_json
from cli.main import main
from generate import load
from hf import checkpoint, load_checkpoint
from hf.checkpoint import hf_shapes, parse_config, split_weights


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original, tmp_path):
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "checkpoint")


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def reference_logits(folder):
    """transformers' own, of the ids that `logits` reads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def logits(folder, **how):
    model, _ = load(str(folder), **how)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model.logits(model(ids, ids - 3))


def refusal(capsys, checkpoint, *more):
    """What the command line says of a checkpoint that it refuses: one line and nothing else, no traceback."""
    status = main(
        ["--checkpoint", str(checkpoint), "--prompt", "the cat", "--max-new-tokens", "9", "--no-compile", *more]
    )
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("generate.py: error: ") and len(lines[0]) < 500
    return lines[0]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    write_json(folder / "config.json", {name: value for name, value in config.items() if value is not None})


# ---- what loads alike


@pytest.mark.parametrize("index", [True, False], ids=["with an index", "without an index"])
def test_a_sharded_checkpoint_equals_a_single_file(original, tmp_path, index):
    sharded = make_checkpoint(tmp_path, shards=3)
    if not index:
        (sharded / "model.safetensors.index.json").unlink()
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert torch.equal(logits(sharded), logits(original))


def test_shards_may_be_links_as_in_the_hubs_cache(original, tmp_path):
    sharded = make_checkpoint(tmp_path / "snapshot", shards=2)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(sharded.glob("*.safetensors"))):
        file.rename(tmp_path / "blobs" / f"{i}")
        file.symlink_to(f"../blobs/{i}")
    assert torch.equal(logits(sharded), logits(original))


def test_mistrals_own_copy_of_the_weights_is_left_alone(original, folder):
    shutil.copy(folder / "tokenizer.model", folder / "consolidated.safetensors")
    assert torch.equal(logits(folder), logits(original))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"factor": 4.0}
SPELLINGS = {  # transformers 4, then 5
    "dtype": ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "rope base": ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama3": (
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    ),
    "linear": (
        {"rope_theta": 500.0, "rope_scaling": LINEAR | {"type": "linear"}},
        {"rope_parameters": LINEAR | {"rope_type": "linear", "rope_theta": 500.0}},
    ),
}


@pytest.mark.parametrize("spellings", SPELLINGS.values(), ids=SPELLINGS)
def test_a_config_of_transformers_4_means_the_same_in_5(original, folder, spellings):
    found = []
    for spelling in spellings:
        edit_config(folder, **dict.fromkeys(("torch_dtype", "dtype", "rope_theta", "rope_scaling", "rope_parameters")))
        edit_config(folder, **spelling)
        found.append(logits(folder))
    assert torch.equal(*found)
    assert not torch.equal(found[0], logits(original))


def test_the_weights_are_bf16_if_the_config_says_so_and_what_dtype_says_otherwise(folder):
    edit_config(folder, torch_dtype="bfloat16")
    found = [load(str(folder), dtype=dtype)[0].embed.weight.dtype for dtype in ("auto", "float32", "float16")]
    assert found == [torch.bfloat16, torch.float32, torch.float16]


def test_a_mistral_checkpoint_is_a_llama_under_another_name(original, folder):
    edit_config(folder, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096)
    assert torch.equal(logits(folder), logits(original))


def test_weights_stored_in_another_dtype_are_converted(original, folder):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    torch.testing.assert_close(logits(folder), logits(original), atol=0.2, rtol=0.05)


@pytest.mark.parametrize(
    "names",
    [
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": ["MISTRALFORCAUSALLM"], "model_type": None},
    ],
    ids=["no list", "an empty list", "the first converters' spelling", "no model_type"],
)
def test_the_architecture_has_two_names_of_which_one_may_be_missing_or_in_other_case(original, folder, names):
    edit_config(folder, **names)
    assert torch.equal(logits(folder), logits(original))


# ---- two sources


def test_rope_settings_that_are_there_twice_may_agree(folder):
    """In both versions' spellings, for readers of either."""
    edit_config(folder, rope_theta=500.0, rope_scaling=LINEAR | {"type": "linear"})
    once = logits(folder)
    edit_config(folder, rope_parameters=LINEAR | {"rope_type": "linear", "rope_theta": 500.0})
    assert torch.equal(logits(folder), once)


def test_a_single_file_goes_before_an_index_of_others_as_in_transformers(original, folder, caplog):
    make_checkpoint(folder, seed=7, shards=2)
    assert torch.equal(logits(folder), logits(original))
    [warning] = warnings(caplog)
    assert "model.safetensors.index.json" in warning and "model.safetensors: the latter" in warning
    torch.testing.assert_close(logits(folder), reference_logits(folder), atol=1e-4, rtol=1e-4)


def test_an_index_may_name_the_single_file(original, folder, caplog):
    weight_map(dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors"))(folder)
    assert torch.equal(logits(folder), logits(original))
    assert warnings(caplog) == []


def test_a_stored_head_that_differs_from_the_embedding_is_used_as_in_transformers(original, folder, caplog):
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(folder), logits(original))
    [warning] = warnings(caplog)
    assert "tie_word_embeddings" in warning and "lm_head.weight" in warning
    torch.testing.assert_close(logits(folder), reference_logits(folder), atol=1e-4, rtol=1e-4)


def test_a_stored_head_that_is_the_embedding_is_one_tensor(folder, caplog):
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    edit_config(folder, tie_word_embeddings=True)
    model, _ = load(str(folder))
    assert model.head.weight is model.embed.weight and warnings(caplog) == []


def test_a_stop_id_that_generation_config_leaves_to_config_is_pointed_out(folder, caplog):
    """transformers 5 would run on."""
    write_json(folder / "generation_config.json", {"eos_token_id": None})
    edit_config(folder, eos_token_id=9)
    assert load(str(folder))[1].stop_ids == [2, 9]
    [warning] = warnings(caplog)
    assert "generation_config.json names no eos_token_id" in warning and "config.json is used" in warning


STOPS = {  # generation_config.json, config.json -> the stop ids; </s>, the tokenizer's eos, is 2
    "one id": ({"eos_token_id": 7}, 9, [2, 7]),
    "a list": ({"eos_token_id": [7, 5, 2]}, 9, [2, 5, 7]),
    "no generation_config.json: config.json's": (None, 9, [2, 9]),
    "not named there: config.json's": ({}, [9, 8], [2, 8, 9]),
    "named nowhere: the tokenizer's": (None, None, [2]),
}


@pytest.mark.parametrize("generation, config, wanted", STOPS.values(), ids=STOPS)
def test_stop_ids_are_the_generation_configs_and_the_tokenizers(folder, generation, config, wanted):
    edit_config(folder, eos_token_id=config)
    if generation is not None:
        write_json(folder / "generation_config.json", generation)
    assert sorted(load(str(folder))[1].stop_ids) == wanted


# ---- what is written


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 12},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["MHA", "MQA, head_dim of its own", "tied embeddings", "biases"],
)
def test_split_weights_is_the_inverse_of_load_model(tmp_path, changes):
    """Both ways: what was stored comes back under its own names, and what comes back loads as the same model."""
    folder = make_checkpoint(tmp_path, seed=5, **changes)
    stored, model = random_weights(CONFIG | changes, seed=5), load(str(folder))[0]
    split = split_weights(model)
    assert split.keys() == stored.keys()
    assert all(torch.equal(split[name], stored[name]) for name in stored)
    before = logits(folder)
    (folder / "model.safetensors").unlink()
    save_file(split, folder / "model.safetensors")
    assert torch.equal(logits(folder), before)


# ---- one rank's part


class Watched:
    """An open file of weights that counts the numbers which are taken from it."""

    def __init__(self, handle):
        self.handle = handle
        self.taken = {}

    def keys(self):
        return self.handle.keys()

    def get_slice(self, name):
        stored = self.handle.get_slice(name)

        class Slice:
            get_shape, get_dtype = stored.get_shape, stored.get_dtype

            def __getitem__(_, index):
                part = stored[index]
                self.taken[name] = part.numel()
                return part

        return Slice()


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"vocab_size": 321}])
def test_a_rank_reads_its_own_part_of_each_tensor_and_the_parts_make_up_the_whole(tmp_path, monkeypatch, changes):
    folder = make_checkpoint(tmp_path, **changes)
    whole, watched = load_checkpoint(str(folder), "cpu", "auto")[0].state_dict(), []
    real = checkpoint.open_shard
    monkeypatch.setattr(checkpoint, "open_shard", lambda file: watched.append(Watched(real(file))) or watched[-1])
    ranks = [load_checkpoint(str(folder), "cpu", "auto", rank, 2)[0] for rank in range(2)]
    shapes = hf_shapes(parse_config(json.loads((folder / "config.json").read_text()), folder))
    kept = ("embed_tokens", "norm", "o_proj.bias", "down_proj.bias", *(["lm_head"] if "vocab_size" in changes else []))
    for taken in (handle.taken for handle in watched):
        wanted = {
            name: math.prod(shape) // (1 if any(part in name for part in kept) else 2) for name, shape in shapes.items()
        }
        assert taken == wanted
    for name, parts in ((name, [rank.state_dict()[name] for rank in ranks]) for name in whole):
        assert torch.equal(joined(name, parts, whole[name]), whole[name]), name


def joined(name, parts, whole):
    """The whole of a parameter from those of two ranks, by hand."""
    if parts[0].shape == whole.shape:
        assert torch.equal(*parts)
        return parts[0]
    if name.endswith(("wo.weight", "w_down.weight")):
        return torch.cat(parts, 1)
    rows = {"wqkv": [16, 8, 8], "w_gate_up": [24, 24], "head": [160]}[name.split(".")[-2]]  # of a rank
    pairs = zip(*(part.split(rows) for part in parts), strict=True)
    return torch.cat([half for pair in pairs for half in pair])


# ---- what is refused


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def scaling(**changes):
    return lambda folder: edit_config(folder, rope_scaling=changes)


def remove(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def latin(name):
    return lambda folder: (folder / name).write_bytes('{"é": 1}'.encode("latin-1"))


def settings(**changes):
    return lambda folder: write_json(folder / "tokenizer_config.json", changes)


def weight_map(files):
    return lambda folder: write_json(folder / "model.safetensors.index.json", {"weight_map": files})


def tensors(change):
    def damage(folder):
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return damage


def rename(end, new_end):
    def change(stored):
        for name in [name for name in stored if name.endswith(end)]:
            stored[name.removesuffix(end) + new_end] = stored.pop(name)

    return tensors(change)


def adapter_alone(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    make_checkpoint(folder, shards=3)
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


def shards_from(elsewhere):
    """Whole and readable, but a download that reads files of the machine it lands on is no checkpoint."""

    def damage(folder):
        there = folder.parent / "elsewhere"
        there.mkdir()
        (folder / "model.safetensors").rename(there / "model.safetensors")
        names = load_file(there / "model.safetensors")
        file = f"{elsewhere}/model.safetensors".replace("ABSOLUTE", str(there))
        weight_map(dict.fromkeys(names, file))(folder)

    return damage


def odd_head_dim(folder):
    make_checkpoint(folder, head_dim=7)


def broken_fast_tokenizer(folder):
    write_fast_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 5000000\n"
INCOMPLETE = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}

REFUSED = {  # what is wrong -> how it comes about, and what the line must name
    "no config.json": (remove("config.json"), ["config.json", "missing"]),
    "broken JSON": (text("config.json", '{\n "a": 1,\n oops}'), ["config.json:3", "broken JSON"]),
    "a config that is no object": (text("config.json", "[1]"), ["config.json", "object", "list"]),
    "broken JSON beside the config": (text("generation_config.json", "{\n,}"), ["generation_config.json:2"]),
    "broken tokenizer settings": (text("tokenizer_config.json", "{\n,}"), ["tokenizer_config.json:2"]),
    "another architecture": (config(architectures=["GPT2LMHeadModel"]), ["config.json", "architectures", "GPT2"]),
    "no architecture": (config(architectures=None, model_type=None), ["config.json", "model_type is null", "llama"]),
    "another model_type": (config(model_type="gpt2"), ["config.json", "model_type", "gpt2", "llama"]),
    "another model_type alone": (config(architectures=None, model_type="qwen2"), ["model_type", "qwen2", "mistral"]),
    "two architectures": (config(architectures=["LlamaForCausalLM", "x"]), ["config.json", "architectures", '"x"']),
    "quantised weights": (
        config(quantization_config={"bits": 4}),
        ["config.json", "quantization_config", '"bits": 4', "quantised"],
    ),
    "GPTQ's tensors": (rename("mlp.up_proj.weight", "mlp.up_proj.qweight"), ["up_proj.qweight", "quantised"]),
    "AWQ's tensors": (rename("self_attn.q_proj.weight", "self_attn.q_proj.qzeros"), ["q_proj.qzeros", "quantised"]),
    "an adapter beside its base": (text("adapter_config.json", "{}"), ["adapter_config.json", "merge"]),
    "an adapter's weights": (text("adapter_model.safetensors", ""), ["adapter_model.safetensors", "merge"]),
    "an adapter alone": (adapter_alone, ["adapter_config.json", "merge"]),
    "another activation": (config(hidden_act="gelu"), ["config.json", "hidden_act", "gelu", "silu"]),
    "partial rotation": (config(partial_rotary_factor=0.5), ["config.json", "partial_rotary_factor", "0.5"]),
    "another rope type": (scaling(rope_type="yarn", factor=2.0), ["config.json", "rope_type", "yarn", "llama3"]),
    "a rope type that is no word": (scaling(rope_type=["linear"]), ["config.json", "rope_type", "linear"]),
    "incomplete llama3 scaling": (scaling(**INCOMPLETE), ["config.json", "low_freq_factor"]),
    "equal llama3 bands": (scaling(**LLAMA3 | {"low_freq_factor": 4.0}), ["config.json", "freq_factor", "4.0"]),
    "linear scaling by nothing": (scaling(rope_type="linear"), ["config.json", "factor"]),
    "linear scaling by zero": (scaling(rope_type="linear", factor=0), ["config.json", "factor", "0"]),
    "linear scaling by a word": (scaling(rope_type="linear", factor="4"), ["config.json", "factor", '"4"']),
    "rope settings that disagree": (
        config(rope_scaling=LINEAR | {"type": "linear"}, rope_parameters=LLAMA3),
        ["config.json", "rope_scaling", "linear", "rope_parameters", "llama3", "keep one"],
    ),
    "rope bases that disagree": (
        config(
            rope_scaling=LINEAR | {"type": "linear"}, rope_parameters=LINEAR | {"type": "linear", "rope_theta": 5.0}
        ),
        ["config.json", "10000.0", "5.0", "keep one"],
    ),
    "partial rotation in transformers 5": (
        config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        ["config.json", "partial_rotary_factor is 0.5"],
    ),
    "scaling that is no object": (config(rope_scaling="linear"), ["config.json", "rope_scaling", "linear"]),
    "a rope base that is no number": (config(rope_theta="1e4"), ["config.json", "rope_theta", '"1e4"']),
    "a rope base of zero": (config(rope_theta=0), ["config.json", "rope_theta", "0"]),
    "an epsilon that is no number": (config(rms_norm_eps="1e-5"), ["config.json", "rms_norm_eps", '"1e-5"']),
    "a size that is text": (config(hidden_size="32"), ["config.json", "hidden_size", '"32"', "whole number"]),
    "a size that is no whole number": (config(intermediate_size=48.5), ["config.json", "intermediate_size", "48.5"]),
    "a size that is true": (config(num_hidden_layers=True), ["config.json", "num_hidden_layers", "true"]),
    "no layers": (config(num_hidden_layers=0), ["config.json", "num_hidden_layers", "0"]),
    "a size that is not there": (config(vocab_size=None), ["config.json", "vocab_size", "null"]),
    "a flag that is text": (config(tie_word_embeddings="false"), ["config.json", "tie_word_embeddings", '"false"']),
    "heads in uneven groups": (config(num_key_value_heads=3), ["config.json", "num_key_value_heads is 3", "4"]),
    "an odd head_dim": (odd_head_dim, ["config.json", "head_dim", "7"]),
    "a dtype that is not there": (config(torch_dtype="int8"), ["dtype", "int8", "bfloat16"]),
    "a dtype that is no word": (config(torch_dtype=["bfloat16"]), ["dtype", "bfloat16"]),
    "a stop id that is text": (config(eos_token_id="</s>"), ["eos_token_id", "</s>"]),
    "a list of stop ids with text": (
        text("generation_config.json", '{"eos_token_id": [2, "a"]}'),
        ["eos_token_id", "a"],
    ),
    "pickled weights only": (pickle_only, ["pickled", "convert", "safetensors"]),
    "no weights": (remove("model.safetensors"), ["FOLDER", "no *.safetensors"]),
    "a missing shard": (lose_a_shard, ["model-00002-of-00003.safetensors", "missing", "download it again"]),
    "truncated weights": (truncate("model.safetensors", -100), ["model.safetensors", "truncated", "download it again"]),
    "weights of five bytes": (truncate("model.safetensors", 5), ["model.safetensors", "truncated"]),
    "an LFS pointer": (text("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "a missing tensor": (tensors(lambda t: t.pop("model.norm.weight")), ["lacks", "model.norm.weight"]),
    "fewer layers than its config": (config(num_hidden_layers=3), ["lacks", "model.layers.2.", "8 more"]),
    "more layers than its config": (config(num_hidden_layers=1), ["model.layers.1.", "config"]),
    "a bias that its config does not name": (
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)})),
        ["model.layers.0.mlp.up_proj.bias"],
    ),
    "a wrong shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        ["model.norm.weight", "[31]", "[32]", "config.json"],
    ),
    "weights that are whole numbers": (
        tensors(lambda t: t.update({"lm_head.weight": torch.ones(320, 32, dtype=torch.int8)})),
        ["lm_head.weight"],
    ),
    "a broken index": (text("model.safetensors.index.json", "{"), ["model.safetensors.index.json:1", "broken JSON"]),
    "an index without a weight_map": (text("model.safetensors.index.json", "{}"), ["index.json", "weight_map"]),
    "a weight_map that is no object": (weight_map(["model.safetensors"]), ["index.json", "weight_map"]),
    "a weight_map of numbers": (weight_map({"lm_head.weight": 1}), ["index.json", "weight_map", "1"]),
    "a shard above the checkpoint": (shards_from("../elsewhere"), ["index.json", "../elsewhere/model.safetensors"]),
    "a shard at an absolute path": (shards_from("ABSOLUTE"), ["index.json", "/elsewhere/model.safetensors"]),
    "no tokenizer": (remove("tokenizer.model"), ["tokenizer.json", "tokenizer.model"]),
    "a broken tokenizer.model": (text("tokenizer.model", "garbage"), ["tokenizer.model", "cannot be read"]),
    "an empty tokenizer.model": (text("tokenizer.model", ""), ["tokenizer.model", "cannot be read"]),
    "a broken tokenizer.json": (broken_fast_tokenizer, ["tokenizer.json", "cannot be read"]),
    "special tokens that are no object": (
        text("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ["tokenizer_config.json", "added_tokens_decoder"],
    ),
    "a bos token without its text": (
        text("tokenizer_config.json", '{"bos_token": {}}'),
        ["tokenizer_config.json", "bos_token"],
    ),
    "an id in added_tokens.json that is text": (
        text("added_tokens.json", '{"<a>": "310"}'),
        ["added_tokens.json", "<a>"],
    ),
    "a role that is a number": (
        text("special_tokens_map.json", '{"pad_token": 3}'),
        ["special_tokens_map.json", "pad_"],
    ),
    "special tokens that are a text": (
        settings(additional_special_tokens="<a>"),
        ["additional_special_tokens", "list"],
    ),
    "a flag of an added token that is text": (
        settings(added_tokens_decoder={"310": {"content": "<a>", "lstrip": "no"}}),
        ["tokenizer_config.json", "lstrip", '"no"'],
    ),
    "legacy that is text": (settings(legacy="no"), ["tokenizer_config.json", "legacy"]),
    "a dtype of zero": (config(torch_dtype=0), ["config.json", "torch_dtype is 0", "bfloat16"]),
    "rope settings of zero": (config(rope_parameters=0), ["config.json", "rope_parameters is 0", "an object"]),
    "a bos token that is an empty list": (settings(bos_token=[]), ["tokenizer_config.json", "bos_token is []"]),
    "a bos token of half a character": (settings(bos_token="\ud800"), ["tokenizer_config.json", "bos_token"]),
    "a template of zero": (settings(chat_template=0), ["tokenizer_config.json", "chat_template is 0"]),
    "add_bos_token that is text": (settings(add_bos_token="no"), ["tokenizer_config.json", 'add_bos_token is "no"']),
    "an added token without an id": (settings(added_tokens_decoder={"x": {"content": "y"}}), ["added_tokens_decoder"]),
    "an added token without its text": (settings(added_tokens_decoder={"310": {}}), ["added_tokens_decoder"]),
    "a million layers": (
        config(num_hidden_layers=10**6),
        ["config.json", "num_hidden_layers is 1000000", "21 tensors"],
    ),
    "a huge head_dim": (config(head_dim=2**30), ["self_attn.q_proj.weight", f"[{2**32}, 32]"]),
    "a huge vocabulary": (config(vocab_size=2**31 - 1), ["embed_tokens", f"[{2**31 - 1}, 32]"]),
    "a size of 400 digits": (config(hidden_size=10**400), ["config.json", "hidden_size", "2**31"]),
    "a rope base of 400 digits": (config(rope_theta=10**400), ["config.json", "rope_theta", "float32"]),
    "scaling that overflows": (scaling(rope_type="linear", factor=2e-38), ["config.json", "rope_theta", "overflow"]),
    "scaling below float32": (scaling(rope_type="linear", factor=1e-50), ["config.json", "factor is 1e-50"]),
    "deep JSON": (text("config.json", "[" * 100_000), ["config.json cannot be read"]),
    "a number of 5,000 digits": (text("generation_config.json", "9" * 5000), ["generation_config.json", "5000 digits"]),
    "settings that are no UTF-8": (latin("tokenizer_config.json"), ["tokenizer_config.json", "UTF-8"]),
    "a template that is no UTF-8": (latin("chat_template.jinja"), ["chat_template.jinja", "UTF-8"]),
    "a stop id outside the vocabulary": (config(eos_token_id=320), ["config.json", "eos_token_id is 320", "below 320"]),
    "a negative stop id": (
        text("generation_config.json", '{"eos_token_id": [2, -1]}'),
        ["generation_config.json", "-1"],
    ),
    "an index entry of nothing": (weight_map({"lm_head.weight": ""}), ["index.json", "weight_map", '""']),
    "an index entry above": (weight_map({"lm_head.weight": ".."}), ["index.json", "weight_map", '".."']),
    "a tensor in two files": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors"),
        ["model.safetensors", "lm_head.weight", "in another file as well", "keep one"],
    ),
    "escape sequences": (config(hidden_act="\x1b[2J"), ["config.json", "hidden_act", "[2J"]),
    "a name of a megabyte": (tensors(lambda t: t.update({"\x1b[2J" * 200_000: torch.zeros(1)})), ["\\x1b[2J"]),
    "a sliding window shorter than the run": (config(sliding_window=11), ["sliding window", "11", "--max-new-tokens"]),
    "fewer positions than the run": (config(max_position_embeddings=11), ["positions", "11", "--max-new-tokens"]),
}


@pytest.mark.parametrize("damage, named", REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_cannot_be_run_is_refused_in_one_line_that_names_what_is_wrong(capsys, folder, damage, named):
    damage(folder)
    line = refusal(capsys, folder).replace(str(folder), "FOLDER")  # whose own name may hold the words
    assert [word for word in named if word not in line] == [], line


@pytest.mark.parametrize(
    "name", ["config.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer.model", "model.safetensors"]
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "a device"])
def test_what_is_no_regular_file_is_not_read(capsys, folder, name, make):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    line = refusal(capsys, folder)
    assert name in line and "no regular file" in line


def test_a_file_that_is_far_too_large_is_not_parsed(capsys, folder):
    os.truncate(folder / "config.json", 2**26)
    assert "config.json has more than 32 MiB" in refusal(capsys, folder)


def test_null_is_absent(original, folder):
    empty = dict.fromkeys(("added_tokens_decoder", "bos_token", "add_bos_token", "chat_template"))
    write_json(folder / "tokenizer_config.json", empty)
    write_json(folder / "generation_config.json", {"eos_token_id": None})
    assert load(str(folder))[1].encode("the cat") == load(str(original))[1].encode("the cat")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_and_the_first_is_named(capsys, folder, value):
    tensors(lambda t: [t[f"model.layers.{i}.mlp.up_proj.weight"][3].fill_(value) for i in (0, 1)])(folder)
    line = refusal(capsys, folder)
    assert "tensor model.layers.0.mlp.up_proj.weight holds NaN or infinity" in line and "download it again" in line


def test_weights_that_float16_is_too_narrow_for_are_refused_with_the_remedy(capsys, folder):
    tensors(lambda t: t["model.norm.weight"].fill_(1e5))(folder)
    line = refusal(capsys, folder, "--dtype", "float16")
    assert "model.norm.weight" in line and "give --dtype float32" in line
    load(str(folder))


def test_the_positions_and_the_sliding_window_may_be_used_up(folder):
    edit_config(folder, max_position_embeddings=12, sliding_window=12)
    status = main(["--checkpoint", str(folder), "--prompt", "the cat", "--max-new-tokens", "9", "--no-compile"])
    assert status == 0


@pytest.mark.parametrize(
    "name, named",
    {
        "no/such/directory": ["no/such/directory", "no such directory"],
        "nowhere": ["nowhere", "no such directory", "hub id"],
        "../nowhere": ["../nowhere", "no such directory"],
        "": ["no such directory"],
    }.items(),
)
def test_a_directory_that_is_not_there_is_refused_without_asking_the_hub(capsys, monkeypatch, name, named):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=AssertionError))
    line = refusal(capsys, name)
    assert all(word in line for word in named), line


def test_a_file_is_no_checkpoint(capsys, folder):
    line = refusal(capsys, folder / "model.safetensors")
    assert "model.safetensors is a file: give the directory" in line


@pytest.mark.parametrize(
    "flag, value", [("--device", "cuda:77"), ("--device", "abacus"), ("--dtype", "int8"), ("--dtype", "")]
)
def test_a_device_or_dtype_that_is_not_there_is_refused(capsys, original, flag, value):
    line = refusal(capsys, original, flag, value)
    assert repr(value) in line and ("cpu" if flag == "--device" else "bfloat16") in line


# ---- the hub

REPOSITORY = [  # files of the three repositories that the README names
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("model.safetensors", "model-00001-of-00004.safetensors", "model.safetensors.index.json", "chat_template.jinja"),
    *("added_tokens.json", "special_tokens_map.json", "adapter_config.json"),
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "training_args.bin"),
    *("consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth", "original/tokenizer.model"),
    *("original/params.json", "onnx/model.onnx", "model.gguf", "tf_model.h5", "flax_model.msgpack", "model.pt"),
    *("README.md", "LICENSE", ".gitattributes", "eval_results.json", "modeling_custom.py"),
]


def test_a_hub_id_is_downloaded_but_only_the_files_that_are_read(monkeypatch, original):
    download = Mock(return_value=str(original))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _ = load("owner/some-Model-1.1B")
    assert model.config.vocab_size == CONFIG["vocab_size"]
    [call] = download.call_args_list
    fetched = list(filter_repo_objects(REPOSITORY, allow_patterns=call.kwargs["allow_patterns"]))
    assert (call.args, fetched) == (("owner/some-Model-1.1B",), REPOSITORY[:12])


HUB_ERRORS = {
    "offline": OfflineModeIsEnabled("offline mode is enabled"),
    "not in the cache": LocalEntryNotFoundError("cannot find the files\nand cannot reach the hub"),
    "login": GatedRepoError("401 Client Error.\n\nAccess to model is restricted", response=Mock(headers={})),
    "a proxy that refuses": HTTPError("407 Proxy Authentication Required"),
    "a download that breaks off": RuntimeError("Data processing error: CAS service error"),
    "a full disk": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("error", HUB_ERRORS.values(), ids=HUB_ERRORS)
def test_what_the_hub_answers_is_passed_on_in_one_line(capsys, monkeypatch, error):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    line = refusal(capsys, "owner/model")
    assert "owner/model" in line and " ".join(str(error).split()) in line


def test_ctrl_c_during_a_download_is_no_error_of_the_hub(capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=KeyboardInterrupt))
    assert main(["--checkpoint", "owner/model", "--prompt", "x"]) == 130
    assert capsys.readouterr().err.split() == ["generate.py:", "interrupted"]


def test_device_and_dtype_are_refused_before_a_checkpoint_is_looked_for(capsys):
    for flags, named in ((["--device", "tpu"], "'tpu'"), (["--dtype", "float8"], "'float8'")):
        assert main(["--checkpoint", "no-such/checkpoint", "--prompt", "x", *flags]) == 2
        said = capsys.readouterr().err
        assert named in said and "hub" not in said


@pytest.mark.parametrize(("short", "dtype"), {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.items())
def test_short_names_of_dtypes_are_understood(original, short, dtype):
    assert load(str(original), dtype=short)[0].embed.weight.dtype == getattr(torch, dtype)


def test_a_long_load_shows_its_progress(capsys, original, monkeypatch):
    load(str(original))
    assert "reading weights" not in capsys.readouterr().err
    monkeypatch.setattr("hf.checkpoint.LONG_LOAD", 1)
    load(str(original))
    assert "reading weights: 100%" in capsys.readouterr().err
