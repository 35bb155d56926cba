"""Train the mini model from scratch: python checkpoints/mini/train.py (one seed, one sitting, one core is enough).

The texts come from problems.py. The model, its file format and the decoding of held-out prompts are the engine's own;
everything else is here, in the order in which it happens.
"""

import argparse
import io
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from problems import (  # noqa: E402
    MAX_LABEL,
    Problem,
    Question,
    make_problem,
    make_questions,
    prompt_text,
    read_results,
    vocabulary,
)

from generate import generate  # noqa: E402
from hf import load_checkpoint  # noqa: E402
from hf.checkpoint import split_weights  # noqa: E402
from hf.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from model import Llama, ModelConfig  # noqa: E402

UNK, BOS, EOS, PAD = range(4)
IGNORE = -100  # targets that cross_entropy skips


# ---------------------------------------------------------------- curriculum


@dataclass(frozen=True)
class Bucket:
    """One batch shape: `batch` rows of `length` tokens, each one problem of k_min..k_max questions."""

    k_min: int
    k_max: int
    length: int
    batch: int


@dataclass(frozen=True)
class Stage:
    steps: int
    weights: tuple[int, ...]  # how often each of BUCKETS is drawn


BUCKETS = (Bucket(1, 10, 320, 12), Bucket(8, 20, 640, 6), Bucket(16, 32, 1024, 4), Bucket(24, 40, 1344, 3))
STAGES = (
    Stage(800, (1, 0, 0, 0)),
    Stage(1000, (1, 3, 0, 0)),
    Stage(1800, (1, 2, 4, 0)),
    Stage(2200, (1, 1, 3, 3)),
)
TOTAL_STEPS = sum(stage.steps for stage in STAGES)
MUON_LR, ADAM_LR, WARMUP_STEPS, DECAY_FROM, LAST_LR = 0.012, 2e-3, 50, 0.5, 0.02
LOG_EVERY, EVAL_EVERY, EVAL_KS = 25, 500, (8, 16, 24, 30)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.eval_only:
        evaluate_checkpoint(args)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        train_tokenizer(args.out)
        write_configs(args.out)
        train(args)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line instead of the whole usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the checkpoint (default: this one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint in --out, train nothing")
    parser.add_argument("--k", type=int, default=16, help="questions per held-out prompt (default: 16)")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts (default: 64)")
    parser.add_argument("--min-distance", type=int, default=1, help="references go back this many answers or more")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="evaluate computing in it")
    args = parser.parse_args()
    check_args(parser, args)
    return args


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is usable here")
    if not 1 <= args.k <= MAX_LABEL:
        parser.error(f"--k {args.k}: a prompt holds 1 to {MAX_LABEL} questions")
    for name in ("threads", "prompts", "min_distance"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.eval_only and not (args.out / "model.safetensors").is_file():
        parser.error(f"--eval-only: {args.out} holds no model.safetensors")
    if not args.eval_only and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: not a folder")


# ---------------------------------------------------------------- training


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pieces, rng, progress = load_pieces(args.out), Random(f"train {args.seed}"), Progress()
    config = mini_config(pieces)
    model, tokenizer = Llama(config).to(args.device), load_tokenizer(args.out, {}, config.vocab_size)
    optimizers = make_optimizers(model)
    # One compiled graph per bucket. Inductor's online softmax is slow on a CPU.
    step_loss = torch.compile(answer_loss, dynamic=False, options={"online_softmax": False})
    for step, bucket in enumerate(schedule(args.seed), start=1):
        set_learning_rates(optimizers, learning_rate_factor(step))
        batch = make_batch(pieces, rng, bucket)
        loss = step_loss(model, *(t.to(args.device) for t in batch))
        loss.backward()
        update(model, optimizers)
        progress.count(step, loss, tokens=batch[0].numel())
        if step % EVAL_EVERY == 0 or step == TOTAL_STEPS:
            progress.evaluate(model, tokenizer, args.seed)
            save_weights(model, args.out)


def answer_loss(model: Llama, tokens: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """tokens, positions, targets [B, S] -> mean cross-entropy over the targets that are not IGNORE."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden = model(tokens, positions, [blocked_attention] * model.config.n_layers)
        logits = model.logits(hidden)  # [B, S, vocab]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Causal attention, a block of queries at a time against its prefix: on a CPU twice as fast to train as SDPA."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, n_heads, S, head_dim]
    q = q * q.shape[-1] ** -0.5
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)  # [B, n_heads, block, end]
        visible = torch.arange(start, end, device=q.device)[:, None] >= torch.arange(end, device=q.device)
        probs = torch.where(visible, scores.float(), -1e9).softmax(-1).to(v.dtype)
        outputs.append(probs @ v[:, :, :end])
    return torch.cat(outputs, dim=2)


def make_optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, adjust_lr_fn="original")
    return [muon, torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0)]


def update(model: Llama, optimizers: list[torch.optim.Optimizer]) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]


def learning_rate_factor(step: int) -> float:
    """Linear warm-up, a plateau, then a linear decay over the rest of the run."""
    decay = (TOTAL_STEPS - step) / (TOTAL_STEPS * (1 - DECAY_FROM))
    return min(1.0, step / WARMUP_STEPS, LAST_LR + (1 - LAST_LR) * decay)


def schedule(seed: int):
    """Yield the bucket of every step."""
    rng = Random(f"buckets {seed}")
    for stage in STAGES:
        yield from rng.choices(BUCKETS, stage.weights, k=stage.steps)


# ---------------------------------------------------------------- data


def make_batch(pieces, rng: Random, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
    """-> tokens, positions, targets, each [batch, length]; rows are padded on the right."""
    rows = [make_row(pieces, rng, bucket) for _ in range(bucket.batch)]
    return tuple(torch.tensor(columns) for columns in zip(*rows, strict=True))


def make_row(pieces, rng: Random, bucket: Bucket) -> tuple[list[int], list[int], list[int]]:
    """Draw problems until one fits. With lines dropped it must fill four fifths of the row, to waste little."""
    dropping = rng.random() < 0.7
    while True:
        tokens, positions, targets = make_sample(pieces, rng, rng.randint(bucket.k_min, bucket.k_max), dropping)
        padding = bucket.length - len(tokens)
        if 0 <= padding <= (bucket.length // 5 if dropping else bucket.length):
            return tokens + [PAD] * padding, positions + [0] * padding, targets + [IGNORE] * padding


def make_sample(pieces, rng: Random, n_questions: int, dropping: bool) -> tuple[list[int], list[int], list[int]]:
    """One problem -> tokens, positions, targets, whole or with some of its answer lines left out.

    Half of the prompts list their questions in shuffled order, half begin at another label than 1.
    """
    first_label = rng.choice((1, rng.randint(1, MAX_LABEL + 1 - n_questions)))
    questions = make_questions(rng, n_questions, reference_rate=rng.uniform(0.2, 0.6), first_label=first_label)
    order = rng.sample(questions, n_questions) if rng.random() < 0.5 else questions
    prompt = [BOS] + pieces.encode(prompt_text(questions, order))
    lines = pieces.encode([q.solution() for q in questions])
    lines[-1].append(EOS)
    return join_lines(prompt, lines, kept_lines(rng, questions) if dropping else [True] * n_questions)


def kept_lines(rng: Random, questions: list[Question]) -> list[bool]:
    """Line dropping: each line is left out with the same probability u, but never one that a kept line refers to."""
    u = rng.uniform(0.1, 0.9)
    kept = [rng.random() >= u for _ in questions]
    for i in reversed(range(len(questions))):
        if kept[i] and questions[i].reference is not None:
            kept[questions[i].reference - questions[0].label] = True
    return kept


def join_lines(prompt: list[int], lines: list[list[int]], kept: list[bool]) -> tuple[list[int], list[int], list[int]]:
    """Tokens keep the positions they have in the whole text. Not trained: the prompt, and a label right after a gap."""
    tokens, positions, targets = list(prompt), list(range(len(prompt))), [IGNORE] * len(prompt)
    position = len(prompt)
    for i, line in enumerate(lines):
        if kept[i]:
            after_gap = i > 0 and not kept[i - 1]
            tokens += line
            positions += range(position, position + len(line))
            targets += [line[0], IGNORE if after_gap else line[1], *line[2:]]  # a line begins "Answer", "_<label>"
        position += len(line)
    return tokens[:-1], positions[:-1], targets[1:]


# ---------------------------------------------------------------- evaluation


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """Free-running greedy accuracy of the weights as they lie on disk."""
    model, tokenizer = load_checkpoint(str(args.out), args.device, args.dtype)
    problems = held_out(args.prompts, args.k, args.seed, args.min_distance)
    print(f"K={args.k}, {args.prompts} prompts, {args.dtype}: {accuracy_text(model, tokenizer, problems)}")


def held_out(n_prompts: int, k: int, seed: int, min_distance: int = 1) -> list[Problem]:
    """Problems made from seeds that no training sample uses, with their questions in natural order."""
    return [make_problem(f"held-out {seed} {i}", k, min_distance=min_distance) for i in range(n_prompts)]


def accuracy_text(model: Llama, tokenizer: Tokenizer, problems: list[Problem]) -> str:
    """The model answers greedily and evicts nothing."""
    longest = max(len(tokenizer.encode(problem.answer)) for problem in problems) + 10
    settings = {"max_new_tokens": longest, "batch_size": 32, "compile": False}
    answers = generate(model, tokenizer, [problem.prompt for problem in problems], "full", **settings)
    plain, references = [], []  # one bool per question: answered right
    for problem, answer in zip(problems, answers, strict=True):
        results = read_results(answer.text)
        for label, (value, is_reference) in enumerate(zip(problem.expected, problem.is_reference, strict=True), 1):
            (references if is_reference else plain).append(results.get(label) == value)
    named = {"all": plain + references, "plain": plain, "cross-reference": references}
    return ", ".join(f"{name} {100 * sum(h) / max(len(h), 1):.2f} % of {len(h)}" for name, h in named.items())


class Progress:
    """Prints step, loss, tokens per second and time left, and held-out accuracy now and then."""

    def __init__(self):
        self.start = self.mark = time.time()
        self.losses, self.tokens, self.total_tokens = [], 0, 0  # the first two since the last line

    def count(self, step: int, loss: Tensor, tokens: int) -> None:
        self.losses.append(loss.item())
        self.tokens += tokens
        if step % LOG_EVERY == 0:
            self.line(step)

    def line(self, step: int) -> None:
        now = time.time()
        self.total_tokens += self.tokens
        mean, speed = sum(self.losses) / len(self.losses), self.tokens / (now - self.mark)
        minutes_left = (now - self.start) / step * (TOTAL_STEPS - step) / 60
        counts = f"{self.total_tokens / 1e6:.2f} M tokens, {speed:.0f} tokens/s"
        print(f"step {step}/{TOTAL_STEPS}: loss {mean:.4f}, {counts}, {minutes_left:.1f} min left", flush=True)
        self.losses, self.tokens, self.mark = [], 0, now

    def evaluate(self, model: Llama, tokenizer: Tokenizer, seed: int) -> None:
        for k in EVAL_KS:
            print(f"  held out, K={k}: {accuracy_text(model, tokenizer, held_out(8, k, seed))}", flush=True)
        self.mark = time.time()


# ---------------------------------------------------------------- files


def train_tokenizer(out: Path) -> None:
    """One piece per word, label and number; single ASCII characters for any other text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(chr, range(32, 127)),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        hard_vocab_limit=False,
        user_defined_symbols=[word.replace(" ", "\u2581") for word in vocabulary()],  # how pieces spell a space
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        **{"unk_id": UNK, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "minloglevel": 2},
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())


def load_pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def mini_config(pieces: sentencepiece.SentencePieceProcessor) -> ModelConfig:
    return ModelConfig(
        vocab_size=pieces.vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        max_positions=4096,
        rope_theta=5e5,
    )


def write_configs(out: Path) -> None:
    write_json(out / "config.json", config_json(mini_config(load_pieces(out))))
    write_json(out / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    (out / "demo.txt").write_text(held_out(1, 16, seed=0)[0].prompt)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def config_json(config: ModelConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_positions,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


def save_weights(model: Llama, out: Path) -> None:
    """Write the weights in bfloat16 under Hugging Face's names."""
    weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in split_weights(model).items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
