"""Find a checkpoint, read its config.json and its weights. Whatever is wrong with it is a ValueError of one line."""

import json
import logging
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from model import Llama, ModelConfig
from scope import one_line, require

# ---- finding the files ------------------------------------------------------------------------------------

HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
             "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json",
             "special_tokens_map.json", "chat_template.jinja", "adapter_config.json"]  # fmt: skip


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


def refuse_adapter(folder: Path) -> None:
    """The base without its adapter is another model."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: adapters are not applied: merge it into its base model or remove it")


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
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as people type them
    field = "dtype"
    if name == "auto":
        named = [key for key in ("dtype", "torch_dtype") if raw_config.get(key) is not None]  # transformers 5, then 4
        field, name = (f"config.json: {named[0]}", raw_config[named[0]]) if named else (field, "float32")
    name = short.get(name, name) if isinstance(name, str) else name
    require(isinstance(name, str) and name in known, field, repr(name)[:80], "one of " + ", ".join(known))
    return known[name]


# ---- files and JSON ---------------------------------------------------------------------------------------

MOST_JSON = 2**25  # bytes; the largest index of shards that we know has 9 MB
MOST_TOKENIZER = 2**28  # bytes; 35 MB


def read_file(path: Path, most: int) -> bytes:
    """At most so many bytes of a regular file: a pipe would wait for ever, and a device may have no end."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a checkpoint in Hugging Face format has it") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    if len(content) > most:
        raise ValueError(f"{path} has more than {most >> 20} MiB: it is no such file, download it again")
    return content


def read_text(path: Path, most: int = MOST_JSON) -> str:
    content = read_file(path, most)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is no UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> dict:
    text = read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a number of 5,000 digits, 100,000 open brackets
        raise ValueError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:1: a JSON object is expected, not {type(value).__name__}")
    return value


def is_object(value) -> bool:
    return isinstance(value, dict)


def read_optional_json(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def shown(value) -> str:
    try:
        return json.dumps(value)[:200]
    except RecursionError:  # it was parsed with a few frames more to spare
        return f"a deeply nested {type(value).__name__}"


class Fields:
    """A JSON object whose values are checked as they are read. ValueError names the file, the field and the remedy."""

    def __init__(self, values: dict, path: Path):
        self.values = values
        self.path = path

    def take(self, name: str, default, holds, wanted: str):
        value = default if self.values.get(name) is None else self.values[name]
        if not holds(value):
            raise ValueError(f"{self.path}: {name} is {shown(value)}: {wanted} is needed")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        return self.take(
            name, default, lambda x: type(x) is int and 0 < x < 2**31, "a whole number from 1 to 2**31 - 1"
        )

    def number(self, name: str, default: float | None = None) -> float:
        holds, wanted = lambda x: type(x) in (int, float) and TINY <= x <= HUGE, "a number above 0 that fits in float32"
        return self.take(name, default, holds, wanted)

    def flag(self, name: str, default: bool = False) -> bool:
        return self.take(name, default, lambda x: type(x) is bool, "true or false")

    def only(self, name: str, default, *known) -> None:
        wanted = " or ".join(map(json.dumps, known)) + " (nothing else is supported)"
        self.take(name, default, lambda x: x in known, wanted)


# ---- config.json ------------------------------------------------------------------------------------------


def parse_config(raw: dict, path: Path) -> ModelConfig:
    """config.json as transformers 4 or 5 write it -> ModelConfig. ValueError names the field that is not supported."""
    given = Fields(raw, path)
    check_architecture(given)
    if raw.get("quantization_config") is not None:
        raise quantised(f"{path}: quantization_config is {shown(raw['quantization_config'])}")
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


MODELS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def check_architecture(given: Fields) -> None:
    """`architectures`, in any case of its letters. Where the list is missing, model_type says the same."""
    spelt = {name.lower(): name for name in MODELS.values()}
    listed = given.values.get("architectures") or None
    if isinstance(listed, list):
        listed = [spelt.get(str(name).lower(), name) for name in listed]
    names = Fields(given.values | {"architectures": listed}, given.path)
    names.only("architectures", [MODELS["llama"]], *([name] for name in MODELS.values()))
    names.only("model_type", "llama" if listed else None, *MODELS)


def quantised(what: str) -> ValueError:
    return ValueError(f"{what}: quantised weights are not supported, take the checkpoint that they were made from")


def parse_rope(config: Fields) -> Fields:
    """The RoPE settings (rope_parameters in transformers 5, rope_scaling in 4), with the numbers of their type."""
    old, new = (read_rope(config, name) for name in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise ValueError(f"{config.path}: rope_scaling is {shown(old)}, rope_parameters {shown(new)}: keep one of them")
    rope = Fields(new or old or {"rope_type": "default"}, config.path)
    rope.only("partial_rotary_factor", 1.0, 1.0)
    wanted = " or ".join(ROPE_SCALINGS) + " (no other is implemented)"
    rope.take("rope_type", None, lambda x: x in list(ROPE_SCALINGS), wanted)
    _, needs = ROPE_SCALINGS[rope.values["rope_type"]]
    numbers = {need: rope.number(need) for need in needs}
    low, high = numbers.get("low_freq_factor", 0), numbers.get("high_freq_factor", 1)
    if low >= high:
        raise ValueError(f"{config.path}: low_freq_factor is {low}: it must be below high_freq_factor, which is {high}")
    return rope


def read_rope(config: Fields, name: str) -> dict:
    """The settings in this field. Older files say "type" for rope_type and have rope_theta beside the field."""
    rope = Fields(dict(config.take(name, {}, is_object, "an object")), config.path)
    if not rope.values:
        return {}
    kind = rope.take("type", "default", lambda x: isinstance(x, str), "a word")
    rope.values.pop("type", None)
    return {"rope_type": kind, "rope_theta": config.values.get("rope_theta")} | rope.values


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

log = logging.getLogger("scope")

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
    """The tensors, with their shapes, that are stacked into our parameter `name` of this shape. Of a rank's parameter
    they are the shapes of its parts.

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


LONG_LOAD = 10**9  # bytes of weights from which on reading them shows its progress


def load_model(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype, rank: int = 0, n_ranks: int = 1
) -> Llama:
    """config: of the whole model, and so are the checks; what is read and built is this rank's part."""
    stored = open_weights(folder)
    config = untie(config, stored, folder)
    check_weights(stored, folder, config)  # first: a model larger than its file could fill the memory
    config = config.for_rank(rank, n_ranks)
    with torch.device("meta"):  # shapes only: no memory is taken twice
        model = Llama(config)
    if not (model.inv_freq * config.max_positions).isfinite().all():
        raise ValueError(f"{folder / 'config.json'}: rope_theta and its scaling overflow float32: correct them")
    weights, shapes = {}, model.state_dict()
    is_small = sum(tensor.numel() for tensor in shapes.values()) * dtype.itemsize < LONG_LOAD
    for name, tensor in tqdm(shapes.items(), "reading weights", disable=is_small or rank > 0, unit=" tensors"):
        pieces = hf_pieces(name, tensor.shape, config)
        tensors = [read_tensor(stored, piece, shape, rank, dtype, folder) for piece, shape in pieces]
        weights[name] = torch.cat(tensors).to(device) if len(tensors) > 1 else tensors[0].to(device)
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.tie_head()
    return model.to(device).eval().requires_grad_(False)


def untie(config: ModelConfig, stored: dict, folder: Path) -> ModelConfig:
    """A tied config whose files hold an output head of its own: it is used, as in transformers 5."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if not config.tie_embeddings or not all(name in stored for name in names):
        return config
    embed, head = (stored[name].get_tensor(name) for name in names)
    if torch.equal(embed, head.to(embed.dtype)):
        return config
    log.warning("warning: %s: tie_word_embeddings is true, but its lm_head.weight differs: that is used", folder)
    return replace(config, tie_embeddings=False)


def read_tensor(stored: dict, name: str, shape: tuple, rank: int, dtype: torch.dtype, folder: Path) -> Tensor:
    part = read_part(stored[name].get_slice(name), shape, rank)
    tensor = part.to(dtype).contiguous()
    if not is_finite(tensor):
        what = f"checkpoint {folder}: tensor {name} holds NaN or infinity"
        narrow = dtype == torch.float16 and is_finite(part)
        raise ValueError(f"{what} in float16: give --dtype float32" if narrow else f"{what}: download it again")
    return tensor


def read_part(stored, shape: tuple, rank: int) -> Tensor:
    """The part of this shape of a tensor in a file: where the file's is longer, part number `rank`.

    Of a q_proj of [64, 32] the shape [16, 32] on rank 2 is rows 32 to 47; of an o_proj of [32, 64] the shape [32, 16]
    is columns 32 to 47. A norm has the same length in both, so each rank reads all of it.
    """
    starts = [rank * n if n < whole else 0 for n, whole in zip(shape, stored.get_shape(), strict=True)]
    part = stored[tuple(slice(start, start + n) for start, n in zip(starts, shape, strict=True))]
    # The part is a view: without a copy the process would keep all of the tensor that it was cut from.
    return part if list(shape) == stored.get_shape() else part.clone(memory_format=torch.contiguous_format)


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
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = sorted(folder / name for name in read_weight_map(index))
        if single.exists() and files != [single]:
            log.warning("warning: %s names other weights than %s: the latter are read", index, single.name)
            files = [single]  # as in transformers
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = any(list(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth"))
        why = "only pickled weights, which can run code: convert them to safetensors" if pickled else "no *.safetensors"
        raise ValueError(f"checkpoint {folder} has {why}")
    stored = {}
    for file in files:
        handle = open_shard(file)
        twice = stored.keys() & handle.keys()
        if twice:
            raise ValueError(f"{file}: tensor {min(twice)} is in another file as well: keep one of them")
        stored.update(dict.fromkeys(handle.keys(), handle))
    return stored


def open_shard(file: Path):
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is no regular file")
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the checkpoint is incomplete, download it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        why = f"{one_line(error)}; download it again (a Git LFS pointer: git lfs pull)"
        raise ValueError(f"{file} is truncated or no safetensors file: {why}") from None


def read_weight_map(index: Path) -> set[str]:
    """The file names in the index of a sharded checkpoint. Names that lead out of its directory are refused."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: weight_map is {shown(where)}: an object of tensor and file names is needed")
    for file in where.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            wanted = "a .safetensors file beside the index is needed"
            raise ValueError(f"{index}: weight_map names {shown(file)}: {wanted}")
    return set(where.values())


QUANTISED = {"qweight", "qzeros", "scales", "g_idx", "absmax", "weight_scale", "weight_packed"}  # GPTQ, AWQ and others


def check_weights(stored: dict, folder: Path, config: ModelConfig) -> None:
    """Compare the names, shapes and dtypes in the files with what the config implies. Nothing of its size is built."""
    if config.n_layers > len(stored):
        have = f"the checkpoint holds {len(stored)} tensors, too few for so many layers"
        raise ValueError(f"{folder / 'config.json'}: num_hidden_layers is {config.n_layers}: {have}")
    expected = hf_shapes(config)
    check_names(stored, list(expected), folder, config)
    for name, wanted in expected.items():
        tensor = stored[name].get_slice(name)
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != wanted:
            raise ValueError(f"{folder}: tensor {name} is {list(shape)}, but config.json makes it {list(wanted)}")
        if dtype not in ("F64", "F32", "BF16", "F16"):
            raise ValueError(f"{folder}: tensor {name} holds {dtype}: quantised weights are not supported")


def hf_shapes(config: ModelConfig) -> dict[str, tuple]:
    """The shapes of all tensors under Hugging Face's names, from the numbers of the config alone."""
    hidden, middle, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (middle, hidden), "up_proj": (middle, hidden), "down_proj": (hidden, middle)}
    layer = {f"{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    for name, parts, bias in (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)):
        layer |= {f"{name}.{part}.weight": shape for part, shape in parts.items()}
        layer |= {f"{name}.{part}.bias": shape[:1] for part, shape in parts.items() if bias}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(config.n_layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return shapes if config.tie_embeddings else shapes | {"lm_head.weight": (vocab, hidden)}


def check_names(stored: dict, expected: list[str], folder: Path, config: ModelConfig) -> None:
    """Refuse tensors that are missing, and tensors that the config does not account for."""
    packed = next((name for name in stored if name.rsplit(".", 1)[-1] in QUANTISED), None)
    if packed:
        raise quantised(f"checkpoint {folder} has tensor {packed}")
    missing = [name for name in expected if name not in stored]
    known = {*expected, "lm_head.weight"} if config.tie_embeddings else set(expected)
    extra = [name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")]
    for names, verdict in ((missing, "lacks"), (extra, "has what its config does not name:")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"checkpoint {folder} {verdict} tensor {names[0]}{more}")


def is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(end) for end in tensor.aminmax())  # NaN is both ends: one fast pass, no memory
