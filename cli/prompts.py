"""Where prompts come from: flags, standard input, files of text and files of rows."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.program import note
from generate import MINI, Options
from scope import one_line

ROW_FILES = (".jsonl", ".ndjson")  # a JSON object in each line; .json is one object or a list of them
KINDS = {"prompt": str, "prompt_ids": list, "messages": list}  # the field of a row that holds its prompt -> its type


@dataclass(frozen=True)
class Prompt:
    content: str | list  # a text, token ids, or the messages of a chat
    is_chat: bool = False
    id: object = None  # a row's own name, which comes back in --output
    max_new_tokens: int | None = None  # None: --max-new-tokens


def read_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts that the command line names."""
    if arguments.prompt is not None:
        return [Prompt(arguments.prompt)]
    if arguments.stdin:
        return [Prompt(sys.stdin.read().removesuffix("\n").removesuffix("\r"))]  # the line break that `echo` adds
    if arguments.prompt_file is None and arguments.checkpoint != Options.checkpoint:
        raise ValueError("there is no prompt: give --prompt TEXT, --prompt-file FILE, or - for standard input")
    if arguments.prompt_file is not None:
        return read_file(Path(arguments.prompt_file))
    demo = read_file(MINI / "demo.txt")
    note("\n" + demo[0].content)  # the demo shows what it answers
    return demo


def read_file(path: Path) -> list[Prompt]:
    """One prompt, or the rows of a file that holds rows."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {path} cannot be read: {one_line(error)}") from None
    if path.suffix.lower() in ROW_FILES:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [parse_row(parse_json(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines]
    if path.suffix.lower() == ".json":
        rows = parse_json(text, str(path))
        rows = rows if isinstance(rows, list) else [rows]
        return [parse_row(row, f"{path}, row {i}") for i, row in enumerate(rows)]
    return [Prompt(text)]


def parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise ValueError(f"{where}: broken JSON: {what}") from None


def parse_row(row, where: str) -> Prompt:
    """{"prompt": ...}, {"prompt_ids": ...} or {"messages": ...}, with "id" and "max_new_tokens" where there are any.

    A field that we do not know is refused: to drop a "temperature" without a word would give other results than asked.
    """
    found = [name for name in KINDS if isinstance(row, dict) and name in row]
    if len(found) != 1 or not isinstance(row[found[0]], KINDS[found[0]]):
        one = '{"prompt": TEXT}, {"prompt_ids": [ID, ...]} or {"messages": [...]}'
        raise ValueError(f"{where}: one of {one} is expected")
    if unknown := sorted(row.keys() - {found[0], "id", "max_new_tokens"}):
        fields = f'"{found[0]}", "id" and "max_new_tokens"'
        raise ValueError(f"{where}: {unknown[0]!r} is no field of a prompt: a row may have {fields}")
    content, most = row[found[0]], row.get("max_new_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f"{where}: max_new_tokens is {json.dumps(most)[:80]}: it must be 1 or more")
    if found[0] == "messages" and not (content and all(map(is_message, content))):
        raise ValueError(f'{where}: messages must be a list of {{"role": TEXT, "content": TEXT}}')
    return Prompt(content, found[0] == "messages", row.get("id"), most)


def is_message(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """The messages after --system's, unless they begin with one of their own."""
    has_one = messages and messages[0]["role"] == "system"
    return messages if system is None or has_one else [{"role": "system", "content": system}, *messages]


def encode(prompt: Prompt, tokenizer, chat: bool, system: str | None) -> list[int]:
    """chat: a text is the only message of a user."""
    if prompt.is_chat:
        return tokenizer.chat(with_system(prompt.content, system))
    if isinstance(prompt.content, list):
        return prompt.content
    if chat:
        return tokenizer.chat(with_system([{"role": "user", "content": prompt.content}], system))
    return tokenizer.encode(prompt.content)


def read_turns(first: str | None) -> Iterator[str]:
    """The user's side of a conversation: a --prompt, then one line a turn. An empty line is no turn."""
    if first is not None:
        yield first
    while True:
        print("> " if sys.stdin.isatty() else "", end="", file=sys.stderr, flush=True)
        try:
            text = input()
        except EOFError:
            return
        if text.strip():
            yield text
