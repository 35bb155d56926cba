"""Text to token ids and back, through sentencepiece or the tokenizers library, and chat templates."""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf.checkpoint import MOST_TOKENIZER, Fields, is_object, read_file, read_optional_json, read_text
from scope import one_line

# ---- backends ---------------------------------------------------------------------------------------------


class SentencePiece:
    """tokenizer.model. Special tokens in a text become single ids, as in transformers."""

    def __init__(self, path: Path, added: dict[str, int], add_bos: bool):
        from sentencepiece import SentencePieceProcessor

        self.path = path
        self.processor = SentencePieceProcessor()
        self.processor.LoadFromSerializedProto(read_file(path, MOST_TOKENIZER))  # model_proto= would take nothing
        pieces = range(self.processor.vocab_size())
        self.special = {self.processor.id_to_piece(i): i for i in pieces if self.processor.is_control(i)}
        self.special |= added
        self.eos_id = self.processor.eos_id()
        self.bos = [self.processor.bos_id()] if add_bos else []
        self.vocab_size = max([len(pieces), *(i + 1 for i in self.special.values())])

    def encode(self, text: str, bos: bool) -> list[int]:
        pattern = "|".join(re.escape(piece) for piece in sorted(self.special, key=len, reverse=True))
        ids = [i for i in self.bos if bos and i >= 0]
        for part in re.split(f"({pattern})", text) if pattern else [text]:
            ids += [self.special[part]] if part in self.special else self.processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        special = set(self.special.values())
        return self.processor.decode([i for i in ids if i not in special and i < self.processor.vocab_size()])

    def id_of(self, piece: str) -> int | None:
        return self.special.get(piece)


class FastTokenizer:
    """tokenizer.json, read by the tokenizers library. Llama 3 has no other file."""

    def __init__(self, path: Path, added: dict[str, int], add_bos: bool):  # the file itself says both
        from tokenizers import Tokenizer as Backend

        self.path = path
        self.backend = Backend.from_str(read_text(path, MOST_TOKENIZER))
        self.backend.no_padding()
        self.backend.no_truncation()
        self.vocab_size = max(self.backend.get_vocab().values(), default=-1) + 1  # there may be holes
        self.eos_id = -1  # tokenizer.json does not say which token it is

    def encode(self, text: str, bos: bool) -> list[int]:
        return self.backend.encode(text, add_special_tokens=bos).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def id_of(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)


# ---- the tokenizer ----------------------------------------------------------------------------------------


@dataclass
class Tokenizer:
    """A backend, the ids that end a text, and the chat template where the checkpoint has one."""

    backend: SentencePiece | FastTokenizer
    stop_ids: list[int]
    special: dict  # the texts of bos_token and eos_token, for the chat template
    template: str | None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {text[:40]!a} is no text: {one_line(error)}") from None
        with one_line_for(f"{self.backend.path} fails on the text {text[:40]!a}"):  # it may know no unknown token
            return self.backend.encode(text, bos)

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
        return ChatHistory(self, list(messages))

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
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def load_tokenizer(folder: Path, raw_config: dict, vocab_size: int) -> Tokenizer:
    settings = Fields(read_optional_json(folder / "tokenizer_config.json"), folder / "tokenizer_config.json")
    backend = load_backend(folder, settings)
    if backend.vocab_size > vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {backend.vocab_size} tokens, the model only {vocab_size}")
    special = {name: special_text(settings, name) for name in ("bos_token", "eos_token")}
    stops = {*find_stops(folder, raw_config, vocab_size), backend.id_of(special["eos_token"]), backend.eos_id}
    return Tokenizer(backend, sorted(stops - {None, -1}), special, read_template(folder, settings))


def find_stops(folder: Path, raw_config: dict, vocab_size: int) -> list[int]:
    """eos_token_id of generation_config.json, or of config.json where that names none."""
    generation = Fields(read_optional_json(folder / "generation_config.json"), folder / "generation_config.json")
    named = generation.values.get("eos_token_id") is not None
    source = generation if named else Fields(raw_config, folder / "config.json")

    def holds(value) -> bool:
        ids = value if isinstance(value, list) else [value]
        return all(type(i) is int and 0 <= i < vocab_size for i in ids)

    given = source.take("eos_token_id", [], holds, f"a token id below {vocab_size} or a list of them")
    return given if isinstance(given, list) else [given]


def load_backend(folder: Path, settings: Fields) -> SentencePiece | FastTokenizer:
    """tokenizer.json comes first: where both files are there, it is the one that knows the chat tokens."""
    added, add_bos = added_tokens(settings), settings.flag("add_bos_token", True)
    for name, backend in (("tokenizer.json", FastTokenizer), ("tokenizer.model", SentencePiece)):
        if (folder / name).exists():
            with one_line_for(f"{folder / name} cannot be read"):
                return backend(folder / name, added, add_bos)
    raise ValueError(f"checkpoint {folder} has no tokenizer.json and no tokenizer.model")


def added_tokens(settings: Fields) -> dict[str, int]:
    """added_tokens_decoder: {"310": {"content": "<|turn|>"}} -> {"<|turn|>": 310}."""

    def holds(given) -> bool:
        return is_object(given) and all(
            re.fullmatch("[0-9]{1,9}", i) and is_object(token) and is_text(token.get("content")) and token["content"]
            for i, token in given.items()
        )

    given = settings.take("added_tokens_decoder", {}, holds, 'an object of ids and {"content": TEXT}')
    return {token["content"]: int(i) for i, token in given.items()}


def is_text(value) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # JSON can hold half a character


def special_text(settings: Fields, name: str) -> str:
    def text(token):
        return token.get("content") if is_object(token) else token

    return text(settings.take(name, "", lambda token: is_text(text(token)), "a text"))


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

    def __init__(self, tokenizer: Tokenizer, messages: list[dict]):
        self.tokenizer = tokenizer
        self.messages = messages
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
