"""Find a checkpoint, read its config.json and its weights. Whatever is wrong with it is a ValueError of one line."""

import json
import math
import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Llama, ModelConfig
from scope import one_line, require

# ---- finding the files ------------------------------------------------------------------------------------

HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
             "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip


def find_checkpoint(name: str) -> Path:
    """The directory of a checkpoint. A hub id (owner/name) is downloaded into the hub's own cache first."""
    if name and Path(name).is_dir():
        return Path(name)
    if name and Path(name).exists():
        raise ValueError(f"checkpoint {name} is a file: give the directory that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"checkpoint {name}: no such directory, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download  # here, so that a local checkpoint does not wait for the import

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # no network, no login, no such repository, a full disk: they share no base class
        raise ValueError(f"checkpoint {name}: no such directory, and the hub says: {one_line(error)}") from error


def find_device(name: str) -> torch.device:
    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "cpu")
    known = ["cpu", *(["cuda"] if cuda else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    require(name in known, "device", repr(name), "one that is here: " + ", ".join(known))
    return torch.device(name)


def find_dtype(name: str, raw_config: dict) -> torch.dtype:
    """The torch dtype of this name; "auto" is the one that the config names, or float32."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        name = raw_config.get("dtype") or raw_config.get("torch_dtype") or "float32"  # transformers 5, transformers 4
    require(isinstance(name, str) and name in known, "dtype", repr(name), "one of " + ", ".join(known))
    return known[name]


# ---- JSON -------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a checkpoint in Hugging Face format has it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:1: a JSON object is expected, not {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


class Fields:
    """A JSON object whose values are checked as they are read. ValueError names the file, the field and the remedy."""

    def __init__(self, values: dict, path: Path):
        self.values = values
        self.path = path

    def take(self, name: str, default, holds, wanted: str):
        value = default if self.values.get(name) is None else self.values[name]
        if not holds(value):
            raise ValueError(f"{self.path}: {name} is {json.dumps(value)[:80]}: {wanted} is needed")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        return self.take(name, default, lambda x: type(x) is int and x > 0, "a whole number above 0")

    def number(self, name: str, default: float | None = None) -> float:
        return self.take(name, default, lambda x: type(x) in (int, float) and 0 < x < math.inf, "a number above 0")

    def flag(self, name: str) -> bool:
        return self.take(name, False, lambda x: type(x) is bool, "true or false")

    def only(self, name: str, default, *known) -> None:
        wanted = " or ".join(map(json.dumps, known)) + " (nothing else is supported)"
        self.take(name, default, lambda x: x in known, wanted)


# ---- config.json ------------------------------------------------------------------------------------------


def parse_config(raw: dict, path: Path) -> ModelConfig:
    """config.json as transformers 4 or 5 write it -> ModelConfig. ValueError names the field that is not supported."""
    given = Fields(raw, path)
    given.only("architectures", None, ["LlamaForCausalLM"], ["MistralForCausalLM"])
    given.only("quantization_config", None, None)
    given.only("hidden_act", "silu", "silu")
    given.only("partial_rotary_factor", 1.0, 1.0)
    n_heads = given.size("num_attention_heads")
    rope = parse_rope(given)
    config = ModelConfig(
        vocab_size=given.size("vocab_size"),
        hidden_size=given.size("hidden_size"),
        intermediate_size=given.size("intermediate_size"),
        n_layers=given.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=given.size("num_key_value_heads", n_heads),
        head_dim=given.size("head_dim", given.size("hidden_size") // n_heads),
        norm_eps=given.number("rms_norm_eps", 1e-6),
        max_positions=given.size("max_position_embeddings", 2048),
        sliding_window=given.size("sliding_window") if raw.get("sliding_window") is not None else None,
        rope_theta=rope.number("rope_theta", given.number("rope_theta", 10000.0)),
        rope_scale=partial(ROPE_SCALINGS[rope.values["rope_type"]][0], rope.values),
        tie_embeddings=given.flag("tie_word_embeddings"),
        attention_bias=given.flag("attention_bias"),
        mlp_bias=given.flag("mlp_bias"),
    )
    if config.head_dim % 2:
        raise ValueError(f"{path}: head_dim is {config.head_dim}: an even number is needed, RoPE turns pairs")
    if config.n_heads % config.n_kv_heads:
        raise ValueError(f"{path}: num_key_value_heads is {config.n_kv_heads}: a divisor of {config.n_heads} is needed")
    return config


def parse_rope(config: Fields) -> Fields:
    """The RoPE settings (rope_parameters in transformers 5, rope_scaling in 4), with the numbers of their type."""
    name = "rope_parameters" if config.values.get("rope_parameters") else "rope_scaling"
    rope = Fields(config.take(name, {}, lambda x: isinstance(x, dict), "an object"), config.path)
    kind = rope.take("type", "default", lambda x: isinstance(x, str), "a word")
    rope.values = {"rope_type": kind} | rope.values
    wanted = " or ".join(ROPE_SCALINGS) + " (no other is implemented)"
    rope.take("rope_type", None, lambda x: x in list(ROPE_SCALINGS), wanted)
    _, needs = ROPE_SCALINGS[rope.values["rope_type"]]
    numbers = {need: rope.number(need) for need in needs}
    low, high = numbers.get("low_freq_factor", 0), numbers.get("high_freq_factor", 1)
    if low >= high:
        raise ValueError(f"{config.path}: low_freq_factor is {low}: it must be below high_freq_factor, which is {high}")
    return rope


def scale_linear(scaling: dict, inv_freq: Tensor) -> Tensor:
    return inv_freq / scaling["factor"]


def scale_llama3(scaling: dict, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, and those between are blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]


# rope_type in config.json -> the function that scales, and the fields of rope_scaling that it needs
ROPE_SCALINGS = {
    "default": (lambda scaling, inv_freq: inv_freq, ()),
    "linear": (scale_linear, ("factor",)),
    "llama3": (
        scale_llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}


# ---- weights: our parameter names, and the tensors of Hugging Face that are stacked into each ---------------

HF_NAMES = {
    "embed": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "head": ["lm_head"],
    "attention_norm": ["input_layernorm"],
    "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.wo": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "mlp.w_gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.w_down": ["mlp.down_proj"],
}


def hf_pieces(name: str, shape: torch.Size, config: ModelConfig) -> list[tuple[str, tuple]]:
    """The tensors, with their shapes, that are stacked into our parameter `name` of this shape.

    "layers.2.mlp.w_gate_up.weight" is made of "model.layers.2.mlp.gate_proj.weight" and "...up_proj.weight".
    """
    module, kind = name.rsplit(".", 1)
    layer = re.match(r"layers\.\d+\.", module)
    prefix, module = (f"model.{layer[0]}", module[layer.end() :]) if layer else ("", module)
    if name == "head.weight" and config.tie_embeddings:
        module = "embed"
    parts = HF_NAMES[module]
    rows = [shape[0] // len(parts)] * len(parts)
    if module == "attention.wqkv":
        rows = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    return [(f"{prefix}{part}.{kind}", (n, *shape[1:])) for part, n in zip(parts, rows, strict=True)]


def load_model(folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Llama:
    with torch.device("meta"):  # shapes only: no memory is taken twice
        model = Llama(config)
    stored = open_weights(folder)
    pieces = {name: hf_pieces(name, tensor.shape, config) for name, tensor in model.state_dict().items()}
    check_names(stored, [piece for parts in pieces.values() for piece, _ in parts], folder, config)
    weights = {}
    for name, parts in pieces.items():
        tensors = [read_weight(stored[piece], piece, shape, dtype) for piece, shape in parts]
        weights[name] = torch.cat(tensors).to(device) if len(tensors) > 1 else tensors[0].to(device)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.to(device).eval().requires_grad_(False)


def split_weights(model: Llama) -> dict[str, Tensor]:
    """A model's weights under Hugging Face's names: the inverse of `load_model`."""
    weights = {}
    for name, tensor in model.state_dict().items():
        pieces = hf_pieces(name, tensor.shape, model.config)
        parts = tensor.split([shape[0] for _, shape in pieces])
        weights.update({piece: part.contiguous() for (piece, _), part in zip(pieces, parts, strict=True)})
    return weights


def open_weights(folder: Path) -> dict:
    """Tensor name -> the open safetensors file that holds it. No other kind of file is ever read."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in read_weight_map(index)})
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(list(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth"))
        why = "only pickled weights, which can run code: convert them to safetensors" if pickled else "no *.safetensors"
        raise ValueError(f"checkpoint {folder} has {why}")
    stored = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except FileNotFoundError:
            raise ValueError(f"{file} is missing: the checkpoint is incomplete, download it again") from None
        except (SafetensorError, OSError) as error:
            why = f"{one_line(error)}; download it again (a Git LFS pointer: git lfs pull)"
            raise ValueError(f"{file} is truncated or no safetensors file: {why}") from None
        stored.update(dict.fromkeys(handle.keys(), handle))
    return stored


def read_weight_map(index: Path) -> set[str]:
    """The file names in the index of a sharded checkpoint. Names that lead out of its directory are refused."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        given = json.dumps(where)[:80]
        raise ValueError(f"{index}: weight_map is {given}: an object of tensor and file names is needed")
    for file in where.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: weight_map names {json.dumps(file)}: a file beside the index is needed")
    return set(where.values())


def check_names(stored: dict, expected: list[str], folder: Path, config: ModelConfig) -> None:
    """Refuse tensors that are missing, and tensors that the config does not account for."""
    missing = [name for name in expected if name not in stored]
    known = {*expected, "lm_head.weight"} if config.tie_embeddings else set(expected)
    extra = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    for names, verdict in ((missing, "lacks"), (extra, "has what its config does not name:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"checkpoint {folder} {verdict} tensor {names[0]}{more}")


def read_weight(handle, name: str, shape: tuple, dtype: torch.dtype) -> Tensor:
    stored = tuple(handle.get_slice(name).get_shape())
    if stored != shape:
        raise ValueError(f"tensor {name} is {list(stored)}, but config.json makes it {list(shape)}")
    tensor = handle.get_tensor(name)
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"tensor {name} holds {tensor.dtype}: quantised weights are not supported")
    return tensor.to(dtype)
