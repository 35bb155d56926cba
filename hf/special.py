"""What the settings files say of tokens: which ones are added, how a text is cut at them, and which roles they have."""

import re
from dataclasses import dataclass
from pathlib import Path

from hf.checkpoint import Fields, is_object, read_optional_json

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands."""

    content: str
    id: int
    special: bool = True  # False: shown in decoded text
    lstrip: bool = False  # swallows the white space before it
    rstrip: bool = False  # and after it
    single_word: bool = False  # a token only where no letter or digit is next to it

    def pattern(self) -> str:
        text = re.escape(self.content)
        # The letter before it is looked at last: a pattern that begins with its text is searched four times as fast.
        return rf"{text}(?<!\w{text})(?!\w)" if self.single_word else text


class Splitter:
    """Cuts a text at its added tokens; of two that begin at one place, the longer one counts."""

    def __init__(self, tokens: list[AddedToken]):
        self.tokens = {token.content: token for token in tokens}
        longest_first = sorted(tokens, key=lambda token: -len(token.content))
        self.pattern = re.compile("(" + ("|".join(token.pattern() for token in longest_first) or "(?!)") + ")")

    def split(self, text: str) -> list[str | AddedToken]:
        parts: list = self.pattern.split(text)  # texts at even places, added tokens at odd ones
        for i in range(1, len(parts), 2):
            parts[i] = self.tokens[parts[i]]
            if parts[i].lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
            if parts[i].rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
        return [part for part in parts if part]


# ---- the files --------------------------------------------------------------------------------------------


def read_settings(folder: Path) -> Fields:
    """tokenizer_config.json. Where it lists no added tokens, two older files beside it do, as in transformers."""
    settings = read_fields(folder / "tokenizer_config.json")
    if settings.values.get("added_tokens_decoder") is None:
        older = read_fields(folder / "special_tokens_map.json")
        settings.values |= role_texts(older)
        settings.values["additional_special_tokens"] = more_special(settings) + more_special(older)
        settings.values["added_tokens_decoder"] = read_added(folder / "added_tokens.json", special_texts(settings))
    return settings


def read_fields(path: Path) -> Fields:
    return Fields(read_optional_json(path), path)


def read_added(path: Path, special: list[str]) -> dict[str, dict]:
    """added_tokens.json, {"<|turn|>": 310}, in the form of added_tokens_decoder."""
    added = read_fields(path)
    for text in added.values:
        added.take(text, None, lambda i: type(i) is int and 0 <= i < 10**9, "a token id")
    return {str(i): {"content": text, "special": text in special} for text, i in added.values.items()}


def added_tokens(settings: Fields) -> list[AddedToken]:
    """added_tokens_decoder: {"310": {"content": "<|turn|>", "lstrip": true}} -> its tokens."""

    def holds(given) -> bool:
        return is_object(given) and all(
            re.fullmatch("[0-9]{1,9}", i) and is_object(token) and is_text(token.get("content")) and token["content"]
            for i, token in given.items()
        )

    given = settings.take("added_tokens_decoder", {}, holds, 'an object of ids and {"content": TEXT}')
    return [parse_token(int(i), Fields(token, settings.path)) for i, token in given.items()]


def parse_token(i: int, given: Fields) -> AddedToken:
    flags = {name: given.flag(name) for name in ("special", "lstrip", "rstrip", "single_word")}
    return AddedToken(given.values["content"], i, **flags)


def special_texts(settings: Fields) -> list[str]:
    return [*role_texts(settings).values(), *more_special(settings)]


def role_texts(settings: Fields) -> dict[str, str]:
    """The roles that have a token: {"bos_token": "<s>", "eos_token": "</s>"}."""
    texts = {role: token_text(settings.take(role, "", is_token, "a text")) for role in ROLES}
    return {role: text for role, text in texts.items() if text}


def more_special(settings: Fields) -> list[str]:
    def holds(value) -> bool:
        return isinstance(value, list) and all(map(is_token, value))

    tokens = settings.take("additional_special_tokens", [], holds, "a list of texts")
    return [text for text in map(token_text, tokens) if text]


def token_text(token):
    return token.get("content") if is_object(token) else token


def is_token(value) -> bool:
    return is_text(token_text(value))


def is_text(value) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # JSON can hold half a character
