"""The command line of generate.py: flags, one run over many prompts, or a conversation."""

import argparse
import hashlib
import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace

import generate
from cli import ranks
from cli.output import Printer, RowFile, check_outputs, silence_stdout
from cli.program import Parser, note, run_program
from cli.prompts import Prompt, encode, read_prompts, read_turns, with_system
from cli.trace import Trace
from generate import Conversation, Engine, Options, Request, Result, Stats, check_run, find_questions, place_of, size_of


def main(argv: list[str] | None = None) -> int:
    generate.log.setLevel(logging.INFO if ranks.RANK == 0 else logging.CRITICAL)
    logging.basicConfig(format="%(message)s", handlers=None if sys.stderr else [logging.NullHandler()])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    if ranks.RANK:
        silence_stdout()
    return ranks.leave(run_program("generate.py", lambda: run_command(parse_arguments(argv))))


def run_command(arguments: argparse.Namespace) -> None:
    options = Options(**{entry.name: getattr(arguments, entry.name) for entry in fields(Options)})
    ranks.join()
    converses = ranks.from_first(lambda: is_conversation(arguments))
    (run_chat if converses else run_prompts)(arguments, options)


def is_conversation(arguments: argparse.Namespace) -> bool:
    one_turn = arguments.prompt is not None and not sys.stdin.isatty()
    return arguments.chat and arguments.prompt_file is None and not arguments.stdin and not one_turn


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    about = generate.__doc__.split("\n")[0]
    parser = Parser("generate.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = parser.add_argument_group("what to continue (default: the bundled model's demo prompt)")
    source.add_argument("stdin", nargs="?", metavar="-", help="read one prompt from standard input")
    source.add_argument("--prompt", metavar="TEXT", help="one prompt")
    rows = '.txt: one prompt; .jsonl: in each line {"prompt": TEXT}, {"prompt_ids": [...]} or {"messages": [...]}'
    source.add_argument("--prompt-file", metavar="FILE", help=rows + '; a row may have "id" and "max_new_tokens"')
    source.add_argument("--chat", action="store_true", help="apply the chat template; without a prompt, converse")
    source.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    result = parser.add_argument_group("where the results go (generated text: standard output)")
    result.add_argument("--output", metavar="FILE.jsonl", help="one line per prompt: token ids, text, statistics")
    result.add_argument("--resume", action="store_true", help="keep the rows of --output, answer the other prompts")
    result.add_argument("--overwrite", action="store_true", help="replace the rows of --output")
    result.add_argument(
        "--trace", metavar="FILE.npz", help="the positions in all slots after every step; for small runs"
    )
    settings = parser.add_argument_group("settings")
    for entry in fields(Options):
        kind = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"action": "append", "metavar": "TEXT"}}
        how = kind.get(type(entry.default), {"type": type(entry.default)})
        default = list(entry.default) if type(entry.default) is tuple else entry.default
        settings.add_argument("--" + entry.name.replace("_", "-"), default=default, **how, **entry.metadata)
    arguments = parser.parse_args(argv)
    if arguments.stdin not in (None, "-"):
        raise ValueError(f"unexpected {arguments.stdin[:80]!r}: a prompt follows --prompt, and - is standard input")
    if sum(given is not None for given in (arguments.stdin, arguments.prompt, arguments.prompt_file)) > 1:
        raise ValueError("give one of --prompt, --prompt-file and -, not several")
    return arguments


# ---- many prompts -----------------------------------------------------------------------------------------


def run_prompts(arguments: argparse.Namespace, options: Options) -> None:
    """Answer the given prompts: text to standard output, rows to --output, a summary to standard error."""
    rows = ranks.from_first(lambda: [asdict(prompt) for prompt in read_prompts(arguments)])
    prompts = [Prompt(**row) for row in rows]
    if arguments.system is not None and not (arguments.chat or any(prompt.is_chat for prompt in prompts)):
        raise ValueError("--system is a chat's: add --chat")
    if arguments.trace and ranks.N_RANKS > 1:
        raise ValueError(f"--trace records all heads, and each of {ranks.N_RANKS} ranks has its own: run one process")
    inputs = inputs_of(arguments) | {"--prompt-file": arguments.prompt_file}
    ranks.from_first(lambda: check_outputs({"--output": arguments.output, "--trace": arguments.trace}, inputs))
    output = row_file(arguments.output, arguments.resume, arguments.overwrite)
    model, tokenizer = generate.load(options.checkpoint, options.device, options.dtype)
    ids = [encode(prompt, tokenizer, arguments.chat, arguments.system) for prompt in prompts]
    check_run(model.config, ids, options)
    questions = find_questions(tokenizer, ids, options)
    requests = [request_of(i, prompt, ids[i], questions[i], options) for i, prompt in enumerate(prompts)]
    trace = Trace(arguments.trace, options, model, ids) if arguments.trace else None
    identity = identity_of(options, model)
    with ranks.entered(output):
        digests = [digest(request) for request in requests]
        done = {tuple(pair) for pair in ranks.from_first(lambda: sorted(output.finished(identity, digests)))}
        samples = range(options.samples)
        wanted = {(request.index, sample) for request in requests for sample in samples}
        if done:
            note(f"{len(wanted & done)} of {len(wanted)} answers have a row in {arguments.output} already")
        missing = [request for request in requests if any((request.index, sample) not in done for sample in samples)]
        if not missing:
            return
        engine = Engine(model, options, tokenizer.stop_ids, size_of(ids, options))
        answers = [request.index * options.samples + sample for request in missing for sample in samples]
        printer = Printer(answers, goes_on=arguments.output is not None)
        batches: dict[int, Stats] = {}
        for result in generate.run(engine, tokenizer, missing, printer.print_piece, trace or generate.no_callback):
            if (result.index, result.sample) not in done:
                output.write(row_of(result, identity, requests[result.index], prompts[result.index].id))
            printer.end_answer()
            batches[id(result.stats)] = result.stats
    if trace:
        trace.save()
    note(summary(list(batches.values())))
    printer.close()


def row_file(path: str | None, resume: bool = False, overwrite: bool = False) -> RowFile:
    """--output. Rank 0 has it; what another rank writes goes nowhere."""
    with ranks.all_or_none(ranks.N_RANKS):
        return RowFile(path, resume, overwrite) if ranks.RANK == 0 else RowFile(None)


def inputs_of(arguments: argparse.Namespace) -> dict[str, str | None]:
    """What every run reads."""
    return {"--checkpoint": place_of(arguments.checkpoint), "--layer-shares": arguments.layer_shares or None}


def request_of(index: int, prompt: Prompt, ids: list[int], question: int, options: Options) -> Request:
    most = prompt.max_new_tokens or options.max_new_tokens
    if most > options.max_new_tokens:
        least = f"--max-new-tokens is {options.max_new_tokens} and sizes the cache: raise it to {most}"
        raise ValueError(f"prompt {index} wants max_new_tokens {most}, {least}")
    return Request(index, ids, most, question)


NO_MATTER = {
    "device",
    "compile",
    "batch_size",
    "max_context",
    "samples",
}  # fields of Options that change no token in float32


def identity_of(options: Options, model) -> dict:
    """What decides the tokens of a row, beside its prompt: --resume goes on under the same alone."""
    settings = {name: value for name, value in asdict(options).items() if name not in NO_MATTER}
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    shares = options.rules()[1].shares  # not the name of their file
    return settings | {"dtype": dtype, "stop": list(options.stop), "layer_shares": list(shares)}


def digest(request: Request) -> str:
    """Of a prompt and of how long its answer may be."""
    return hashlib.sha256(json.dumps([request.ids, request.max_new_tokens]).encode()).hexdigest()[:16]


def row_of(result: Result, settings: dict, request: Request, name=None) -> dict:
    """One line of --output. name: what the prompt's own row is called."""
    named = {} if name is None else {"id": name}
    return named | asdict(result) | {"settings": settings, "prompt_digest": digest(request)}


def summary(batches: list[Stats]) -> str:
    """The statistics of a run, for a person."""
    s = batches[-1]
    prefill, decode = sum(b.prefill_s for b in batches), sum(b.decode_s for b in batches)
    packed = "" if s.kv_format == Options.kv_format else f" in {s.kv_format}"
    packed += f", {s.samples} answers to each prompt" if s.samples > 1 else ""
    packed += f" on each of {s.n_ranks} ranks" if s.n_ranks > 1 else ""
    every = f", a selection every {s.interval} steps" if s.interval else ""
    return (
        f"\npolicy   {s.policy}: heavy {s.heavy} + recent {s.recent} generated tokens per KV head, "
        f"score {s.score}{every}\n"
        f"cache    {s.prompt_slots} prompt + {s.decode_slots} decode slots, {s.kv_bytes / 1e6:.2f} MB{packed}: "
        f"{s.kv_bytes / s.kv_bytes_full:.0%} of the full cache's {s.kv_bytes_full / 1e6:.2f} MB\n"
        f"time     prefill {prefill:.2f} s, compile {s.compile_s:.1f} s, decode {decode:.2f} s{payoff(batches)}\n"
        f"speed    {tokens_of(batches):.0f} tokens in decode steps, {tokens_of(batches) / decode:.1f} tokens/s"
    )


def tokens_of(batches: list[Stats]) -> float:
    return sum(b.tokens_per_s * b.decode_s for b in batches)


def payoff(batches: list[Stats]) -> str:
    """After how many steps compiling has paid off: compile_s over what a compiled step saves."""
    steps, decode = sum(b.steps for b in batches), sum(b.decode_s for b in batches)
    s = batches[-1]
    if not (s.compile_s and steps):
        return ""
    saved = s.eager_step_s - decode / steps  # seconds a step
    if saved <= 0:
        return "; compiling saves nothing here: use --no-compile"
    after = round(s.compile_s / saved)
    short = "" if steps >= after else ": for so short a run, --no-compile is faster"
    return f"\n         compiling pays off after {after} steps, this run had {steps}{short}"


# ---- a conversation ---------------------------------------------------------------------------------------


def run_chat(arguments: argparse.Namespace, options: Options) -> None:
    """Hold a conversation, one line a turn, until the end of input. Each turn reads only what is new."""
    if arguments.trace:
        raise ValueError("--trace records one run: with --chat, give the prompt with --prompt-file")
    if options.samples > 1:
        raise ValueError("--samples: a conversation goes on from one answer; give the prompt with --prompt-file")
    if arguments.resume:
        raise ValueError("--resume: a conversation cannot be resumed; give --output another file, or --overwrite")
    ranks.from_first(lambda: check_outputs({"--output": arguments.output}, inputs_of(arguments)))
    output = row_file(arguments.output, overwrite=arguments.overwrite)
    model, tokenizer = generate.load(options.checkpoint, options.device, options.dtype)
    tokenizer.chat([{"role": "user", "content": ""}])  # refuses now if there is no template
    history, conversation = tokenizer.chat_history(with_system([], arguments.system)), None
    if sys.stdin.isatty():
        stops = "stops an answer, Ctrl-D ends" if ranks.N_RANKS == 1 else "or Ctrl-D ends"
        note(f"One line is one turn. Ctrl-C {stops} the conversation.")
    turns = read_turns(arguments.prompt)  # only rank 0 takes one
    with ranks.entered(output):
        for number, text in enumerate(iter(lambda: ranks.from_first(lambda: next(turns, None)), None)):
            ids, continues = history.add_question(text)
            if continues:
                conversation.read(ids)
            else:
                if conversation:
                    generate.log.info("the chat template changes earlier turns: the conversation is read again")
                conversation = None  # frees its cache before the next one is allocated
                conversation = Conversation(model, tokenizer, ids, options)
            printer = Printer([0])
            with stopping_at_ctrl_c() as stop_asked:
                result = conversation.answer(lambda _, piece, to=printer: to.print_piece(0, piece), stop_asked)
            request = Request(number, ids, options.max_new_tokens)
            output.write(row_of(replace(result, index=number), identity_of(options, model), request))
            printer.end_answer()
            stopped_itself = result.token_ids[-1] in tokenizer.stop_ids and not options.ignore_eos
            history.add_answer(result.text, result.token_ids[-1] if stopped_itself else None)
            note(short_summary(result, conversation))


@contextmanager
def stopping_at_ctrl_c() -> Iterator:
    """Gives a function that says whether Ctrl-C was pressed; pressed twice, it interrupts as always.

    Of several ranks none may stop alone, and to agree would be one more message in each step: there it interrupts.
    """
    if ranks.N_RANKS > 1:
        yield generate.no_callback
        return
    pressed = []

    def press(*_) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def short_summary(result: Result, conversation: Conversation) -> str:
    """The statistics of one turn."""
    s, room = result.stats, conversation.engine.cache.room(conversation.engine.steps)
    compiled = f", compile {s.compile_s:.1f} s" if s.compile_s and not result.index else ""
    ended = ", stopped by Ctrl-C" if result.finish_reason == "interrupted" else ""
    made = f"{len(result.token_ids)} tokens, {s.tokens_per_s:.1f}/s, prefill {s.prefill_s:.2f} s{compiled}{ended}"
    return f"[{made}; {max(room, 0)} of {conversation.options.max_context} slots are left]"
