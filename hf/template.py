"""Chat templates: strangers' programs, run in jinja2's sandbox and bounded in time, memory and output."""

import json
import sys
import time
import tracemalloc
from datetime import datetime

import torch.distributed as dist
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10
MOST_TEXT = 2**24  # characters; no context of a model holds as many
MOST_MEMORY = 2**28  # bytes


class Generation(Extension):
    """{% generation %} marks the assistant's words for training. Here it is its body and no more."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses the two operators of which a single one could run for ever: 'x' * 10**12 and 9**9**9."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator: str, left, right):
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > MOST_TEXT:
            raise TemplateError(f"{operator} makes too large a value")
        return super().call_binop(context, operator, left, right)


def render(text: str, messages: list[dict], special: dict) -> str:
    """The text of a conversation: what the template `text` makes of its messages."""

    def refuse(message: str):
        raise TemplateError(message)

    jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    jinja.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    jinja.filters["tojson"] = to_json
    template = jinja.from_string(text)
    given = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
    return bounded(lambda: join_pieces(template.generate(given | special)))


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own filter writes for HTML; this one has the arguments of transformers'."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def join_pieces(pieces) -> str:
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > MOST_TEXT:
            raise TemplateError(f"it writes more than {MOST_TEXT} characters")
    return "".join(kept)


def bounded(work):
    """Calls work() and watches each line that it runs.

    jinja2 turns a template into Python, so loops that write nothing and macros that call each other are lines as well.
    A signal would need the main thread, and a process of its own 0.1 s for each prompt. What is not bounded is one
    filter or method that makes something huge at once: the memory is looked at between lines.
    """
    end = time.monotonic() + SECONDS
    tracer, traced = sys.gettrace(), tracemalloc.is_tracing()
    tracemalloc.start()
    most = tracemalloc.get_traced_memory()[0] + MOST_MEMORY

    def watch(frame, event, argument):
        if time.monotonic() > end:
            raise TemplateError(f"it runs for longer than {SECONDS} s")
        if tracemalloc.get_traced_memory()[0] > most:
            raise TemplateError(f"it takes more than {MOST_MEMORY >> 20} MiB")
        return watch

    sys.settrace(watch)
    try:
        return work()
    finally:
        sys.settrace(tracer)
        if not traced:
            # Under torchrun a thread of gloo may be waiting for this one, to free a message. CPython 3.11 crashed where
            # the tracing ended while that thread was in an allocation, so let it go first.
            if dist.is_available() and dist.is_initialized():
                time.sleep(0.02)
            tracemalloc.stop()
