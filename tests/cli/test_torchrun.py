"""The command line in two processes: what one process prints and writes, once, and one line where it fails."""

import json
import signal
import subprocess
import sys

import pytest

from checkpoints import make_checkpoint
from cli.main import main
from ranked import ROOT, run_ranks
from runs import FIVE, SCRIPT, SHORT, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("torchrun")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT)]


def rows_of(path):
    """Without the statistics, which tell times and the bytes of a rank."""
    return [json.loads(line) | {"stats": None} for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("prompts") / "five.jsonl", FIVE)


def test_torchrun_gives_the_rows_of_one_process_and_prints_them_once(tiny, five, tmp_path, capsys):
    flags = ["--checkpoint", str(tiny), "--prompt-file", five, "--batch-size", "2", "--policy", "slide", *SHORT]
    assert main([*flags, "--output", str(tmp_path / "one.jsonl")]) == 0
    alone = capsys.readouterr()
    ran = subprocess.run([*TORCHRUN, *flags, "--output", tmp_path / "two.jsonl"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert rows_of(tmp_path / "two.jsonl") == rows_of(tmp_path / "one.jsonl")
    assert ran.stdout == alone.out
    assert ran.stderr.count("loading") == ran.stderr.count("policy   slide") == 1
    [bytes_of_rank, all_bytes] = (
        json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0])["stats"]["kv_bytes"]
        for name in ("two", "one")
    )
    assert "MB on each of 2 ranks" in ran.stderr and bytes_of_rank < 0.6 * all_bytes


# ---- many command lines, one after the other in the same two processes

SEVERAL = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT)!r}]
from cli import ranks
from cli.main import main
ranks.leave = lambda status: status  # the group stays: to join it again there would have to be another store
for number, (argv, env) in enumerate(json.loads(sys.argv[1])):
    os.environ.update(env)
    print("--", number, main(argv), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def several(tiny, chatty, five, tmp_path_factory):
    """Folder, and name -> for each rank (exit status, what it said)."""
    folder = tmp_path_factory.mktemp("several")
    mqa = make_checkpoint(folder / "mqa", num_key_value_heads=1)
    (folder / "only0").symlink_to(tiny)
    (folder / "full.jsonl").write_text("precious\n")
    one = ["--checkpoint", tiny, "--prompt", "cat", *SHORT]
    resume = ["--checkpoint", tiny, "--prompt-file", five, *SHORT, "--output", folder / "resumed.jsonl"]
    command_lines = {
        "flag": lambda rank: ["--no-such-flag"],
        "nowhere": lambda rank: [*one, "--checkpoint", "nowhere"],
        "missing on rank 1": lambda rank: [*one, "--checkpoint", folder / f"only{rank}"],
        "heads": lambda rank: [*one, "--checkpoint", mqa],
        "trace": lambda rank: [*one, "--trace", folder / "trace.npz"],
        "rows": lambda rank: [*one, "--output", folder / "full.jsonl"],
        "prompts": lambda rank: [*SHORT, "--checkpoint", tiny, "--prompt-file", folder / "no.txt"],
        "device": lambda rank: [*one, "--device", "cuda:1"],
        "all": lambda rank: resume,
        "resume": lambda rank: [*resume, "--resume"],
        "chat": lambda rank: [*SHORT, "--checkpoint", chatty, "--chat", "--output", folder / "chat.jsonl"],
        "memory": lambda rank: one,  # the last: it leaves its environment behind
    }
    env = {("memory", 1): {"LOCAL_WORLD_SIZE": str(10**15)}}  # so many ranks seem to share the machine
    listed = [
        json.dumps([([*map(str, of(rank))], env.get((name, rank), {})) for name, of in command_lines.items()])
        for rank in range(2)
    ]
    ended = run_ranks(lambda rank: ["-c", SEVERAL, listed[rank]], said="the cat\na dog\n")
    assert [status for status, _, _ in ended] == [0, 0], ended
    found = {}
    for number, name in enumerate(command_lines):
        found[name] = [part_of(said, number) for _, _, said in ended]
    return folder, found


def part_of(said: str, number: int) -> tuple[int, list[str]]:
    """The exit status of a command line, and its lines without those that say what is loaded."""
    before, _, after = said.partition(f"-- {number} ")
    lines = before.split(f"-- {number - 1} ")[-1].splitlines()[number > 0 :]
    return int(after.split("\n")[0]), [line for line in lines if not line.startswith("loading ")]


ERROR = "generate.py: error: "
REFUSED = {
    "flag": "unknown --no-such-flag (see --help)",
    "nowhere": "checkpoint nowhere: no such directory, and not a hub id (owner/name)",
    "missing on rank 1": "rank 1: checkpoint {folder}/only1: no such directory, and not a hub id (owner/name)",
    "heads": "1 KV heads and 48 channels of the MLP cannot be shared out evenly to 2 ranks: start one of 1",
    "trace": "--trace records all heads, and each of 2 ranks has its own: run one process",
    "rows": "--output {folder}/full.jsonl has rows: --resume goes on with them, --overwrite replaces them",
    "prompts": "prompt file {folder}/no.txt cannot be read: [Errno 2] No such file or directory: '{folder}/no.txt'",
    "device": "device is 'cuda:1': it must be auto, cpu or cuda: each rank has its own",
    "memory": "the KV cache takes 0.0 GB per rank and 0.0 GB are free: lower --max-new-tokens, or shorten the prompt",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_on_all_ranks_or_on_one_ends_all_with_one_line_of_rank_0(several, name):
    folder, found = several
    assert found[name] == [(2, [ERROR + REFUSED[name].format(folder=folder)]), (2, [])]
    assert (folder / "full.jsonl").read_text() == "precious\n" and not (folder / "trace.npz").exists()


def test_only_rank_0_knows_which_rows_are_there_to_resume(several, five, tiny, capsys):
    folder, found = several
    assert [status for status, _ in found["all"] + found["resume"]] == [0] * 4
    assert found["resume"][0][1] == [f"5 of 5 answers have a row in {folder}/resumed.jsonl already"]
    assert found["resume"][1] == (0, [])
    path = folder / "resumed.jsonl"
    whole = rows_of(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    flags = ["--checkpoint", str(tiny), "--prompt-file", five, *SHORT, "--output", str(path), "--resume"]
    assert main(flags) == 0  # one process goes on with what two have written
    assert "2 of 5 answers have a row" in capsys.readouterr().err
    assert rows_of(path) == whole


def test_the_turns_of_a_chat_reach_all_ranks_from_standard_input(several, chatty, monkeypatch, capsys):
    folder, found = several
    assert [status for status, _ in found["chat"]] == [0, 0]
    assert len([line for line in found["chat"][0][1] if "slots are left" in line]) == 2 and not found["chat"][1][1]
    with open(folder / "turns.txt", "w+") as file:
        file.write("the cat\na dog\n")
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", file)
        alone = folder / "alone.jsonl"
        assert main([*SHORT, "--checkpoint", str(chatty), "--chat", "--output", str(alone)]) == 0
    assert rows_of(folder / "chat.jsonl") == rows_of(alone) and len(rows_of(alone)) == 2


# ---- a rank that is lost on the way

LOST = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}]
import generate
from cli.main import main

decode = generate.Engine.decode

def fail_on_rank_1(engine, t, *rest):
    if t == 3 and os.environ["RANK"] == "1":
        {{what}}
    return decode(engine, t, *rest)

generate.Engine.decode = fail_on_rank_1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("what", "status", "said", "said_by_rank_0"),
    [
        ("raise ValueError('only here')", 2, "generate.py: rank 1: error: only here\n", ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero", ""),
        ("os._exit(9)", 9, "", "generate.py: error: another rank has ended: "),
    ],
    ids=["mistake", "crash", "killed"],
)
def test_of_a_rank_that_fails_alone_on_the_way_one_rank_says_why(tiny, what, status, said, said_by_rank_0):
    flags = ["--checkpoint", tiny, "--prompt", "cat", *SHORT]
    [first, second] = run_ranks(lambda rank: ["-c", LOST.format(what=what), *flags])
    assert second[:2] == (status, "") and said in second[2]
    more = first[2].removeprefix(f"loading {tiny}\n")
    assert first[0] == 1 and more.startswith(said_by_rank_0) and more.count("\n") == bool(said_by_rank_0)


def test_ctrl_c_ends_torchrun_and_all_ranks(tiny):
    long = ["--no-compile", "--ignore-eos", "--max-new-tokens", "400"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*TORCHRUN, "--checkpoint", str(tiny), "--prompt", "the cat", *long], **pipes)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and said.count("generate.py: interrupted") == 1
    assert "[rank" not in said  # how torch marks a rank's traceback
