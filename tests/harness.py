"""Plays a cache beside the naive oracle: a prompt, decode steps, later turns and rewinds.

A `Play` drives a cache with random queries, keys and values, and watches one of its layers. With an oracle, every
prefill, step, turn and rewind checks that this layer holds the same positions as the oracle, and that its attention
gives the same output. Without one it only plays, for tests of a single property. A conversation plays the other layers
too, because a turn settles and rewinds them together; a single answer leaves them out, which is three times as fast.
"""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

import kernels
from cache import Cache, CacheSize, LayerCache, Slots
from model import ModelConfig
from oracle import Oracle, kept_of_prompt, layer_decode_budget, layer_prompt_budgets, thin_keys
from scope import COMPRESSORS, FORMATS, SCORES, STRATEGIES, Format, Policy, PromptPolicy

HEAD_DIM = 8  # one word of 4-bit codes
N_LAYERS = 3
# Several groups in a head as small as this.
FEW_CHANNELS = Format(8, group=2), Format(4, group=2, minimum=True, rotated=True)
FROZEN = [name for name, strategy in STRATEGIES.items() if strategy.frozen_prompt]
SHARED = [name for name in STRATEGIES if name not in FROZEN]  # prompt and output are one pool


# What benchmarks/calibrate.py may measure: a number above 0 for each layer, with the mean 1.
shares_of_layers = st.tuples(*[st.integers(1, 9)] * N_LAYERS).map(
    lambda row: tuple(N_LAYERS * x / sum(row) for x in row)
)


@dataclass(frozen=True)
class Turn:
    """Tokens that are read, then decode steps."""

    reads: int
    steps: int


@dataclass(frozen=True)
class Setting:
    """All that decides a play. A conversation has one prompt; without turns, there may be a ragged batch of prompts."""

    policy: Policy
    prompt: PromptPolicy
    T: int  # most decode steps of an answer
    prompts: list[int]  # lengths
    steps: int  # of the answer to the prompt
    turns: list[Turn]  # that follow it
    n_kv_heads: int
    group: int  # query heads per KV head
    layer: int  # the one that is watched
    seed: int
    formats: tuple[Format, Format] = FORMATS["model"]
    questions: tuple[int, ...] = ()  # tokens of each prompt's question, 0: it has none; (): no prompt has one

    def alone(self, row: int) -> "Setting":
        """The same with one of the prompts only."""
        questions = self.questions[row : row + 1]
        return replace(self, prompts=[self.prompts[row]], questions=questions, seed=self.seed + row)


@st.composite
def settings_of_a_run(draw, policies=tuple(STRATEGIES), compressors=tuple(COMPRESSORS), rows=(1, 2)) -> Setting:
    """Prompts of any lengths, between `rows` many, and one answer of T steps."""
    T = draw(st.integers(1, 24))
    prompts = draw(st.lists(st.integers(1, 20), min_size=rows[0], max_size=rows[1]))
    return draw_setting(draw, policies, compressors, 7, T, prompts, T, [])


@st.composite
def settings_of_a_conversation(draw, policies=tuple(STRATEGIES), compressors=tuple(COMPRESSORS)) -> Setting:
    """One prompt and one to three turns. Each answer has 0 to T steps."""
    T = draw(st.integers(1, 12))
    steps = st.integers(0, T)
    turns = draw(st.lists(st.builds(Turn, st.integers(1, 5), steps), min_size=1, max_size=3))
    return draw_setting(draw, policies, compressors, 4, T, [draw(st.integers(1, 8))], draw(steps), turns)


def draw_setting(draw, policies, compressors, most: int, T: int, prompts: list, steps: int, turns: list) -> Setting:
    """most: of the heavy tokens, and of the recent ones."""
    size = st.integers(0, most)
    score, interval = draw(st.sampled_from(list(SCORES))), draw(st.sampled_from([0, 0, 1, 2, 3, 5]))
    name = draw(st.sampled_from(policies))
    interval = 0 if STRATEGIES[name].candidates else interval  # one token dies in each step
    policy = Policy(name, draw(size), draw(size), score, interval)
    budget = draw(st.integers(1, 14))
    shares = draw(shares_of_layers)
    prompt = PromptPolicy(draw(st.sampled_from(compressors)), budget, draw(st.integers(1, budget)), shares)
    n_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    layer, seed = draw(st.integers(0, N_LAYERS - 1)), draw(st.integers(0, 10**6))
    formats = draw(st.sampled_from([FORMATS["model"], *FORMATS.values(), FEW_CHANNELS]))
    questions = tuple(draw(st.integers(0, min(length, budget))) for length in prompts)
    return Setting(policy, prompt, T, prompts, steps, turns, n_kv_heads, group, layer, seed, formats, questions)


class Play:
    def __init__(self, setting: Setting, with_oracle: bool = False):
        self.setting = setting
        self.with_oracle = with_oracle
        heads, group, prompts = setting.n_kv_heads, setting.group, setting.prompts
        turns = [Turn(prompts[0], setting.steps), *setting.turns]
        room = sum(turn.reads + turn.steps for turn in turns) if setting.turns else 0
        config = ModelConfig(9, 8, 8, N_LAYERS, heads * group, heads, HEAD_DIM)
        size = CacheSize(len(prompts), prompts, setting.T, room)
        self.cache = Cache(config, setting.policy, setting.prompt, size, torch.float32, setting.formats)
        self.layer = self.cache.layers[setting.layer]
        self.pairs = [(b, h) for b in range(len(prompts)) for h in range(heads)]
        self.generators: list[torch.Generator] = []  # one per row: its tokens do not depend on the other rows
        self.written: list[list[tuple]] = []  # of each row: (queries, key, value) of every position, in order
        self.oracles: dict[tuple[int, int], Oracle] = {}

    # ---- what is played; each returns the watched layer's output [B, H * G, n, HEAD_DIM]

    def prefill(self) -> torch.Tensor:
        """Start over with an empty cache, and read the prompts."""
        self.cache.reset()
        lengths = self.setting.prompts
        self.generators = [torch.Generator().manual_seed(self.setting.seed + b) for b in range(len(lengths))]
        self.written = [[] for _ in lengths]
        tokens = [self.draw(b, length) for b, length in enumerate(lengths)]
        filler = torch.full((max(lengths), *tokens[0].shape[1:]), 9.0)  # right of a shorter prompt; nobody may see it
        block = torch.stack([torch.cat((row, filler[len(row) :])) for row in tokens])
        self.cache.begin_prefill(lengths, self.setting.questions)
        output = self.attend(self.cache.prefill_attention(torch.arange(len(lengths))), block)
        self.cache.end_prefill(len(lengths))
        if self.with_oracle:
            self.oracles = self.make_oracles()
            self.compare_positions()
        return output

    def step(self, t: int) -> torch.Tensor:
        """Decode step t, counted from 1."""
        select, reads = self.cache.graph_keys[t - 1]
        now = self.cache.step_input(t, select, reads)
        output = self.attend(self.cache.layers, torch.stack([self.draw(b, 1) for b in range(len(self.written))]), now)
        for (b, h), oracle in self.oracles.items():
            self.compare_output(output, b, h, [oracle.step(t, *self.token(b, h, -1))])
        self.compare_positions()
        return output

    def settle(self, steps: int, ahead: int = 0) -> None:
        """End an answer of this many steps, of which the last `ahead` are taken back."""
        end = len(self.written[0]) - ahead
        del self.written[0][end:]
        self.cache.settle(steps, end)
        if not ahead:
            self.compare_positions()

    def answer(self, steps: int) -> None:
        for t in range(1, steps + 1):
            self.step(t)
        self.settle(steps)

    def read(self, n: int) -> torch.Tensor:
        """A later turn of n tokens."""
        start = self.cache.position
        block = self.draw(0, n)[None]
        _, attends = self.cache.begin_turn(n)
        output = self.attend(attends, block)
        self.cache.begin_output()
        for (b, h), oracle in self.oracles.items():
            self.compare_output(output, b, h, oracle.read(start, [self.token(b, h, start + i) for i in range(n)]))
        self.compare_positions()
        return output

    def snapshot(self) -> tuple:
        return self.cache.snapshot(), {pair: oracle.snapshot() for pair, oracle in self.oracles.items()}

    def rewind(self, snapshot: tuple) -> None:
        ours, theirs = snapshot
        self.cache.rewind(ours)
        del self.written[0][self.cache.position :]
        for pair, oracle in self.oracles.items():
            oracle.rewind(theirs[pair])
        self.compare_positions()

    def run(self):
        """Prefill, then every step of the first answer: yields 0 after prefill, then t after step t."""
        self.prefill()
        yield 0
        for t in range(1, self.setting.steps + 1):
            self.step(t)
            yield t

    def run_turns(self):
        """Read and answer the prompt and every turn; yields after each answer."""
        self.prefill()
        self.answer(self.setting.steps)
        yield
        for turn in self.setting.turns:
            self.read(turn.reads)
            self.answer(turn.steps)
            yield

    # ---- tokens

    def draw(self, b: int, n: int) -> torch.Tensor:
        """n more tokens of row b: queries, keys and values in one tensor [n, H * G + 2 * H, HEAD_DIM]."""
        heads, queries = self.setting.n_kv_heads, self.setting.n_kv_heads * self.setting.group
        tokens = torch.randn(n, queries + 2 * heads, HEAD_DIM, generator=self.generators[b]) * 1.5
        self.written[b] += [token.split((queries, heads, heads)) for token in tokens]
        return tokens

    def attend(self, attends, block: torch.Tensor, step=()) -> torch.Tensor:
        """block [B, n, H * G + 2 * H, HEAD_DIM] through the layers that are played -> the watched one's output."""
        heads = self.setting.n_kv_heads
        q, k, v = block.transpose(1, 2).split((heads * self.setting.group, heads, heads), dim=1)
        for other in range(N_LAYERS):
            if self.setting.turns and other != self.setting.layer:
                attends[other](q, k, v, *step)
        return attends[self.setting.layer](q, k, v, *step)

    def token(self, b: int, h: int, position: int) -> tuple:
        """What the oracle of a KV head needs of a token: (queries of the group, key, value) as lists."""
        queries, key, value = self.written[b][position]
        group = self.setting.group
        return queries[h * group : (h + 1) * group].tolist(), key[h].tolist(), value[h].tolist()

    # ---- what the cache holds

    def live(self, b: int, h: int) -> list[int]:
        """Positions held by a head of the watched layer, oldest first. One that is held twice is listed twice."""
        return sorted(p for p in self.layer.pos[b, h].tolist() if p >= 0)

    def held(self) -> list[list[int]]:
        return [self.live(*pair) for pair in self.pairs]

    def decode_budget(self) -> tuple[int, int]:
        """Heavy and recent tokens of the watched layer."""
        policy = self.setting.policy
        return layer_decode_budget(policy.name, policy.heavy, policy.recent, self.setting.layer, N_LAYERS)

    def check_slots(self) -> None:
        """No position is held twice, and every live slot holds the key and value that its position brought."""
        k, v = (kernels.decode(slots.stored, torch.float32) for slots in (self.layer.k, self.layer.v))
        for b, h in self.pairs:
            assert len(set(self.live(b, h))) == len(self.live(b, h))
            for slot, position in enumerate(self.layer.pos[b, h].tolist()):
                if position >= 0:
                    _, key, value = self.written[b][position]
                    assert torch.equal(k[b, h, slot], as_stored(self.layer.k, key[h]))
                    assert torch.equal(v[b, h, slot], as_stored(self.layer.v, value[h]))

    # ---- beside the oracle

    def make_oracles(self) -> dict[tuple[int, int], Oracle]:
        """One for each row and KV head, after prefill."""
        setting, policy, prompt = self.setting, self.setting.policy, self.setting.prompt
        oracles = {}
        for b, length in enumerate(setting.prompts):
            heads = [[self.token(b, h, p) for p in range(length)] for h in range(setting.n_kv_heads)]
            names = prompt.compress, policy.name
            budgets = layer_prompt_budgets(*names, prompt.budget, N_LAYERS, length, prompt.shares)
            question = setting.questions[b] if setting.questions else 0
            kept = kept_of_prompt(prompt.compress, budgets[setting.layer], prompt.obs_window, question, heads)
            for h, head in enumerate(heads):
                numbers = policy.name, *self.decode_budget(), setting.T, policy.interval
                formats = tuple((f.bits, f.group, f.minimum, f.rotated) for f in setting.formats)
                keys = thin_keys(head, kept[h], question or prompt.obs_window, prompt.key_channels)
                place = h, setting.n_kv_heads
                oracles[b, h] = Oracle(numbers, policy.score, place, head, kept[h], formats, keys)
        return oracles

    def compare_positions(self) -> None:
        for pair, oracle in self.oracles.items():
            assert self.live(*pair) == oracle.live

    def compare_output(self, output: torch.Tensor, b: int, h: int, wanted: list) -> None:
        """wanted: [n][group][HEAD_DIM]."""
        group = self.setting.group
        found = output[b, h * group : (h + 1) * group].transpose(0, 1)
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-4)


# ---- the state of a whole cache


def as_stored(slots: Slots, x: torch.Tensor) -> torch.Tensor:
    """One key or value [HEAD_DIM] as these slots give it back."""
    return kernels.decode(slots.encode(x[None, None, None]), torch.float32)[0, 0, 0]


def bits(layer: LayerCache) -> list[torch.Tensor]:
    """What lies in the slots of K and V, [B, H, n_slots, n] int32 each: as float32, two equal words may be NaN."""
    return [slots.codes.view(torch.int32) for slots in (layer.k, layer.v)]


def visible_state(cache: Cache) -> tuple[list[torch.Tensor], tuple]:
    """All that a later step or turn can see: dead slots count as empty, whatever they hold."""
    snapshot = cache.snapshot()
    tensors = [cache.lengths.clone(), snapshot.kept]
    for layer in cache.layers:
        live = layer.pos >= 0
        decoded = [kernels.decode(slots.stored, torch.float32) for slots in (layer.k, layer.v)]
        tensors += [layer.pos.clone(), *(x * live[..., None] for x in decoded)]
        if layer.prompt_is_evictable:
            tensors.append(layer.score * live)
    return tensors, (snapshot.position, snapshot.used)


def assert_same_state(one: tuple, other: tuple) -> None:
    assert one[1] == other[1]
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
