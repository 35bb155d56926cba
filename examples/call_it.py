"""Generate with the bundled model under two policies, and compare what they hold: python examples/call_it.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from generate import generate, load  # noqa: E402

# 1. Load a checkpoint. This is the bundled one; a folder in Hugging Face format or a hub id works as well.
model, tokenizer = load("checkpoints/mini")

# 2. A prompt is a text or a list of token ids. This one asks 16 questions; some refer to an earlier answer.
prompt = (ROOT / "checkpoints" / "mini" / "demo.txt").read_text()

# 3. Generate. `generate` yields one result per prompt. compile=False starts at once and decodes slower.
for name in ("full", "discontinuous"):
    [result] = generate(model, tokenizer, [prompt], name, heavy=128, recent=64, max_new_tokens=512, compile=False)

    # 4. The result has the text, the token ids, and statistics of the run.
    print(f"{name}: {len(result.token_ids)} tokens, finished by {result.finish_reason}")
    print(f"  {result.text.splitlines()[-1]}")
    print(f"  {result.stats.decode_slots} decode slots per KV head, {result.stats.kv_bytes:,} bytes of KV cache")
