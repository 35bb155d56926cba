"""Text to token ids and back, through sentencepiece or the tokenizers library, and chat templates."""

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from hf.checkpoint import MOST_TOKENIZER, Fields, is_object, read_file, read_optional_json, read_text
from hf.special import AddedToken, Splitter, added_tokens, is_text, more_special, read_settings, role_texts
from scope import one_line

log = logging.getLogger("scope")

# ---- backends ---------------------------------------------------------------------------------------------

SPACE = "\u2581"  # sentencepiece writes a space as "▁"

# Two messages of protobuf one after the other are read as one: normalizer_spec (3) { add_dummy_prefix (3): false }
NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePiece:
    """tokenizer.model and the tokens that the settings add to it. The ids are those of transformers 4.

    "legacy": true puts a space before each text between two added tokens, false one before the whole text.
    """

    def __init__(self, path: Path, settings: Fields):
        from sentencepiece import SentencePieceProcessor

        self.path = path
        self.legacy = settings.flag("legacy", True)
        self.prefix = SPACE if settings.flag("add_prefix_space", True) else ""
        model = read_file(path, MOST_TOKENIZER)
        self.processor = SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(model if self.legacy else model + NO_PREFIX)
        self.size = self.processor.vocab_size()
        self.eos_id = self.processor.eos_id()
        self.roles = self.own_roles() | role_texts(settings)
        self.splitter = Splitter(self.added_tokens(settings))
        self.added = {token.id: token for token in self.splitter.tokens.values()}
        self.first, self.last = ends(self, settings)

    def own_roles(self) -> dict[str, str]:
        ids = {"bos_token": self.processor.bos_id(), "eos_token": self.eos_id, "unk_token": self.processor.unk_id()}
        return {role: self.processor.id_to_piece(i) for role, i in ids.items() if i >= 0}

    def added_tokens(self, settings: Fields) -> list[AddedToken]:
        """The model's control pieces, the tokens of the settings, and special ones that have no id of their own yet."""
        control = {self.processor.id_to_piece(i): i for i in range(self.size) if self.processor.is_control(i)}
        tokens = {text: AddedToken(text, i) for text, i in control.items()}
        tokens |= {token.content: token for token in added_tokens(settings)}
        for text in [*self.roles.values(), *more_special(settings)]:
            free = max([self.size, *(token.id + 1 for token in tokens.values())])
            i = self.processor.piece_to_id(text)
            known = self.processor.id_to_piece(i) == text  # what is not there has the id of <unk>
            tokens.setdefault(text, AddedToken(text, i if known else free))
        return list(tokens.values())

    def encode(self, text: str, bos: bool) -> list[int]:
        parts = self.splitter.split(text if self.legacy or not text else self.prefix + text.replace(SPACE, " "))
        if not self.legacy and parts[1:] and parts[0] == SPACE and is_special(parts[1]):
            parts = parts[1:]  # a special token needs no space before it
        ids = [i for part in parts for i in (self.pieces(part) if isinstance(part, str) else [part.id])]
        return [*self.first, *ids, *self.last] if bos else ids

    def pieces(self, text: str) -> list[int]:
        """Some models drop a space that a text begins with. Without legacy it counts: a text before it keeps it."""
        if self.legacy or not text.startswith((" ", SPACE)):
            return self.processor.encode(text)
        before = self.roles["unk_token"]
        return self.processor.encode(before + text)[len(self.processor.encode(before)) :]

    def decode(self, ids: list[int]) -> str:
        """Special tokens are left out, other added ones are shown."""
        seen = [i for i in ids if not self.is_hidden(i)]
        runs = groupby(seen, self.added.get)
        text = "".join(token.content * len([*run]) if token else self.processor.decode([*run]) for token, run in runs)
        # With legacy, the processor itself puts a space before each text and takes it away again.
        return text if self.legacy else text.removeprefix(" " if self.prefix else "")

    def is_hidden(self, i: int) -> bool:
        return self.added[i].special if i in self.added else i >= self.size

    def id_of(self, text: str) -> int | None:
        token = self.splitter.tokens.get(text)
        return token and token.id

    def text_of(self, i: int) -> str:
        return self.added[i].content if i in self.added else self.processor.id_to_piece(i)


class FastTokenizer:
    """tokenizer.json, read by the tokenizers library. Llama 3 has no other file."""

    def __init__(self, path: Path, settings: Fields):
        from tokenizers import Tokenizer as Backend

        self.path = path
        self.backend = Backend.from_str(read_text(path, MOST_TOKENIZER))
        self.backend.no_padding()
        self.backend.no_truncation()
        self.eos_id = -1  # tokenizer.json does not say which token it is
        self.roles = role_texts(settings)
        self.first, self.last = ends(self, settings)
        # transformers 4 obeys the settings in its Llama classes alone; else the file says what it adds to a text.
        kind = settings.take("tokenizer_class", "Llama", is_text, "a text")
        given = [settings.values.get(name) for name in ("add_bos_token", "add_eos_token")]
        self.obeys = "Llama" in kind and given != [None, None]

    def encode(self, text: str, bos: bool) -> list[int]:
        ids = self.backend.encode(text, add_special_tokens=bos and not self.obeys).ids
        return [*self.first, *ids, *self.last] if bos and self.obeys else ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def id_of(self, text: str) -> int | None:
        return self.backend.token_to_id(text)

    def text_of(self, i: int) -> str:
        return self.backend.id_to_token(i)


def ends(backend, settings: Fields) -> tuple[list[int], list[int]]:
    """The ids that go before and after a prompt, as add_bos_token and add_eos_token want it."""
    wanted = {"bos_token": settings.flag("add_bos_token", True), "eos_token": settings.flag("add_eos_token")}
    first, last = (backend.id_of(backend.roles.get(role, "")) if adds else None for role, adds in wanted.items())
    return [first] if first is not None else [], [last] if last is not None else []


def is_special(part) -> bool:
    return isinstance(part, AddedToken) and part.special


# ---- the tokenizer ----------------------------------------------------------------------------------------


@dataclass
class Tokenizer:
    """A backend, the ids that end a text, and the chat template where the checkpoint has one."""

    backend: SentencePiece | FastTokenizer
    stop_ids: list[int]
    special: dict  # the texts of bos_token, eos_token and so on, for the chat template
    template: str | None
    vocab_size: int  # of the model

    def encode(self, text: str, bos: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {text[:40]!a} is no text: {one_line(error)}") from None
        with one_line_for(f"{self.backend.path} fails on the text {text[:40]!a}"):  # it may know no unknown token
            ids = self.backend.encode(text, bos)
        self.check(ids)
        return ids

    def check(self, ids: list[int]) -> None:
        """Some tokenizers know more tokens than the model: only a prompt that holds one of those is refused."""
        beyond = next((i for i in ids if i >= self.vocab_size), None)
        if beyond is not None:
            what = f"token {beyond} ({self.backend.text_of(beyond)!a})"
            raise ValueError(f"the prompt has {what}: the model knows 0 to {self.vocab_size - 1}, leave it out")
        bos = self.special.get("bos_token")
        if bos and ids[:2] == [self.backend.id_of(bos)] * 2:
            warn_once(
                f"warning: a prompt begins with {bos} twice: the tokenizer writes one itself, leave out the other"
            )

    def encode_after(self, text: str) -> list[int]:
        """The ids of a text that continues another one: no bos, and no space before its first word.

        sentencepiece puts a space before the first word of a text. So the text is encoded with a line break before it,
        whose ids are then cut off, unless the line break and the text have become one token.
        """
        start, both = self.encode("\n", bos=False), self.encode("\n" + text, bos=False)
        return both[len(start) :] if both[: len(start)] == start else self.encode(text, bos=False)

    def decode(self, ids: list[int]) -> str:
        with one_line_for(f"{self.backend.path} fails on the ids {ids[:8]}"):
            return self.backend.decode(ids)

    def stream(self) -> "TextStream":
        return TextStream(self)

    def chat_history(self, messages: list[dict] = ()) -> "ChatHistory":
        """messages: what a conversation begins with, such as the system's."""
        return ChatHistory(self, messages)

    def chat(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation. The template writes its own bos."""
        return self.encode(self.render(messages), bos=False)

    def render(self, messages: list[dict]) -> str:
        """The text of a conversation, made by the checkpoint's own template in jinja2's sandbox."""
        if self.template is None:
            raise ValueError("this checkpoint has no chat template: run it without --chat")
        from hf.template import render  # here, so that a run without --chat does not wait for jinja2

        try:
            return render(self.template, messages, self.special)
        except Exception as error:  # a template is a program: it may fail in any way a program does
            raise ValueError(f"the chat template fails: {one_line(error)}") from error


@contextmanager
def one_line_for(what: str):
    """Whatever a library raises -> ValueError. A panic in Rust is no Exception, and neither is Ctrl-C."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ValueError):  # ours say what is wrong already
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def load_tokenizer(folder: Path, raw_config: dict, vocab_size: int) -> Tokenizer:
    settings = read_settings(folder)
    backend = load_backend(folder, settings)
    own = {backend.id_of(backend.roles.get("eos_token", "")), backend.eos_id}
    stops = {*find_stops(folder, raw_config, vocab_size), *(i for i in own if i in range(vocab_size))}
    return Tokenizer(backend, sorted(stops), backend.roles, read_template(folder, settings), vocab_size)


@cache
def warn_once(line: str) -> None:
    log.warning(line)


def find_stops(folder: Path, raw_config: dict, vocab_size: int) -> list[int]:
    """eos_token_id of generation_config.json, or of config.json where that names none."""
    generation = Fields(read_optional_json(folder / "generation_config.json"), folder / "generation_config.json")
    source = generation
    if generation.values.get("eos_token_id") is None:
        source = Fields(raw_config, folder / "config.json")
        if generation.values and raw_config.get("eos_token_id") is not None:  # transformers 5 would never stop
            log.warning("warning: %s names no eos_token_id: that of config.json is used", generation.path)

    def holds(value) -> bool:
        ids = value if isinstance(value, list) else [value]
        return all(type(i) is int and 0 <= i < vocab_size for i in ids)

    given = source.take("eos_token_id", [], holds, f"a token id below {vocab_size} or a list of them")
    return given if isinstance(given, list) else [given]


def load_backend(folder: Path, settings: Fields) -> SentencePiece | FastTokenizer:
    """tokenizer.json comes first: where both files are there, it is the one that knows the chat tokens."""
    for name, backend in (("tokenizer.json", FastTokenizer), ("tokenizer.model", SentencePiece)):
        if (folder / name).exists():
            with one_line_for(f"{folder / name} cannot be read"):
                return backend(folder / name, settings)
    raise ValueError(f"checkpoint {folder} has no tokenizer.json and no tokenizer.model")


def read_template(folder: Path, settings: Fields) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)

    def is_entry(entry) -> bool:
        return is_object(entry) and is_text(entry.get("name")) and is_text(entry.get("template"))

    def holds(value) -> bool:
        return value is None or is_text(value) or isinstance(value, list) and all(map(is_entry, value))

    template = settings.take("chat_template", None, holds, "a text or a list of named texts")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class TextStream:
    """Turns token ids into text as soon as it is whole: a character split over tokens waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer):
        self.decode = tokenizer.decode
        self.ids: list[int] = []
        self.start = 0  # ids[start:shown] are decoded again, as context: their text is out already
        self.shown = 0

    def push(self, ids: list[int], last: bool = False) -> str:
        """Add ids; returns the new text, or "" where it ends inside a character. last: nothing follows."""
        self.ids += ids
        old, new = self.decode(self.ids[self.start : self.shown]), self.decode(self.ids[self.start :])
        if (new == old or new.endswith("\ufffd")) and not last:
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return new[len(old) :]


# ---- conversations in the words of a chat template ----------------------------------------------------------


class ChatHistory:
    """The messages of a conversation, and for each turn the ids that the model has not read yet."""

    def __init__(self, tokenizer: Tokenizer, messages: list[dict] = ()):
        self.tokenizer = tokenizer
        self.messages = list(messages)
        self.text = ""  # what the template has made of all messages so far
        self.stop: int | None = None  # the token that ended the last answer

    def add_question(self, text: str) -> tuple[list[int], bool]:
        """The ids to read before the answer, and whether they continue what was read before.

        False: they are the whole conversation. It is the first turn, or the template has changed earlier turns.
        """
        self.messages.append({"role": "user", "content": text})
        before, self.text = self.text, self.tokenizer.render(self.messages)
        new = self.new_text(before) if before else None
        if new is None:
            return self.tokenizer.encode(self.text, bos=False), False
        return without_stop(self.tokenizer, self.tokenizer.encode_after(new), self.stop), True

    def add_answer(self, text: str, stop: int | None) -> None:
        """stop: the stop token that ended the answer; None: the answer reached its longest length."""
        self.messages.append({"role": "assistant", "content": text})
        self.stop = stop

    def new_text(self, before: str) -> str | None:
        """The part of the template's text that follows the last answer; None: earlier turns are no longer the same."""
        answer = self.messages[-2]["content"].strip()  # as most templates print it
        rest = self.text.removeprefix(before)
        start = rest.find(answer)
        if not self.text.startswith(before) or start < 0 or rest[:start].strip():
            return None
        return rest[start + len(answer) :]


def without_stop(tokenizer: Tokenizer, ids: list[int], stop: int | None) -> list[int]:
    """What a template puts after an answer, less the stop token that the model has already written itself."""
    if stop is None or stop not in ids:
        return ids
    end = ids.index(stop)
    return ids if tokenizer.decode(ids[:end]).strip() else ids[end + 1 :]
