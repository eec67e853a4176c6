"""What an operator relies on: closed doors, no orphans, no run written over, restarts, and who is late."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from luffy.testing.processes import (
    LOOPBACK,
    LUFFY,
    alive,
    family,
    listening,
    losses,
    ranks_of,
    start,
    wait_for_step,
    wait_until,
)
from luffy.train.suspects import Report, accused, verdict


@pytest.mark.slow
def test_a_local_run_listens_on_the_loopback_alone_locks_its_folder_and_ends_with_its_launcher(small, as_arguments):
    settings = small(ranks=2, steps=100000, checkpoint_every=2)
    temporary = tempfile.TemporaryDirectory(prefix="t-", dir="/tmp")
    process = start(as_arguments(settings), TMPDIR=temporary.name)
    wait_for_step(settings["out"], 3, process)
    everyone = family(process.pid)
    addresses = listening(everyone)
    assert len(addresses) >= 3  # the store, and the ranks' own
    assert set(addresses) <= LOOPBACK

    # A second run, as torchrun would start it, is told who holds the folder; the checks are not skipped.
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    torchrun |= {"MASTER_PORT": "29713", "TORCHELASTIC_RESTART_COUNT": "0"}
    one = as_arguments(settings | {"ranks": 1})
    other = subprocess.run(
        [*LUFFY, "train", *one, "--overwrite"], capture_output=True, text=True, env=os.environ | torchrun
    )
    line = other.stderr.strip().splitlines()[-1]
    assert other.returncode == 2 and "is in use by process" in line and os.uname().nodename in line, other.stderr

    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)  # it hears nothing of its launcher's end
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not alive(everyone), 5)
    # torch itself keeps a cache there, for whoever comes next.
    wait_until(lambda: not [n for n in os.listdir(temporary.name) if not n.startswith("torchinductor")], 5)
    temporary.cleanup()
    again = subprocess.run([*LUFFY, "train", *one], capture_output=True, text=True, env=os.environ | torchrun)
    assert again.returncode == 2 and "already holds a run" in again.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_lost_rank_is_replaced_and_the_end_is_the_same_to_the_bit(small, as_arguments, tmp_path):
    settings = small(ranks=2, steps=40, checkpoint_every=4, max_restarts=1)
    process = start(as_arguments(settings))
    wait_for_step(settings["out"], 10, process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "rank 1 was ended by signal 9" in err and "restart 1 of 1, on 2 ranks, from step-" in err
    whole = settings | {"out": str(tmp_path / "whole"), "checkpoint_every": 0, "async_checkpoints": False}
    subprocess.run([*LUFFY, "train", *as_arguments(whole)], check=True, capture_output=True)
    assert losses(settings["out"]) == losses(whole["out"]) and len(losses(whole["out"])) == 40


@pytest.mark.slow
def test_a_rank_that_stops_is_named_in_one_line_soon_after_the_timeout(small, as_arguments):
    settings = small(ranks=2, steps=100000, checkpoint_every=0, timeout_seconds=4)
    process = start(as_arguments(settings))
    wait_for_step(settings["out"], 3, process)
    os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    # Within 9 s on a machine that has nothing else to do; without a heartbeat it took 40.
    assert time.monotonic() - begin < 25
    line = err.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in err
    assert line.startswith(f"luffy: error: rank 1 on {os.uname().nodename} is late: last heard of "), line
    assert "Rank 0 waited 4 s in " in line and ", step " in line
    assert "late" in Path(settings["out"], "logs", "rank-0.log").read_text()
    assert Path(settings["out"], "logs", "rank-1.log").exists()


def _report(rank, **changes):
    return Report(rank=rank, host="a", step=7, where="all_reduce", waited_seconds=10.0, hosts={"2": "b"}, **changes)


def test_the_rank_that_most_reports_miss_is_the_late_one():
    silent = [_report(0, silent={"2": 11.0}), _report(1, silent={"2": 11.2}), _report(3, silent={"2": 10.9})]
    assert "rank 2 on b is late: last heard of 11 s ago" in verdict(silent)
    # Rank 2 lives behind a cut link: it misses all others, and says so.
    cut = [*silent, _report(2, silent={"0": 11.0, "1": 11.0, "3": 11.0})]
    assert accused(cut) == "2" and "the link to it is cut" in verdict(cut)
    # The store is with rank 0, behind the cut link: rank 0 misses everyone, the others hear of nobody.
    lost = [_report(r, store_lost=True, store_rank=0) for r in (1, 2, 3)]
    assert accused([_report(0, silent={"1": 9.0, "2": 9.0, "3": 9.0}), *lost]) == "0"
    # One is alive and elsewhere.
    behind = [_report(0, behind={"1": "sleep (data/loader.py), step 7"})]
    assert "rank 1 is late: it lives, and is in sleep (data/loader.py), step 7" in verdict(behind)
    assert "a link between them is cut" in verdict([_report(0), _report(1)])


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=x"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=2 must be less"),
    ],
)
def test_a_wrong_environment_of_torchrun_is_one_line(capfd, monkeypatch, small, as_arguments, variables, words):
    from luffy.train.cli import main

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        main(["train", *as_arguments(small())])
    lines = capfd.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_overwrite_removes_the_old_run_and_nothing_else(small, tmp_path):
    from luffy.errors import UserError
    from luffy.train.options import TrainOptions
    from luffy.train.outfolder import claim_out

    out = tmp_path / "run"
    for name in ("checkpoints/step-00000009", "trace", "logs", "tensorboard", "mine"):
        (out / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "summary.json", "model.safetensors", "topics.npz", "loss.png", "own.png",
                 "mine/notes.txt", "own.txt"):  # fmt: skip
        (out / name).write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        claim_out(TrainOptions(**small()))
    with pytest.raises(UserError, match=r"--start-weights .*model.safetensors; choose another --out"):
        claim_out(TrainOptions(**small(overwrite=True, start_weights=str(out / "model.safetensors"))))
    claim_out(TrainOptions(**small(overwrite=True)))
    assert sorted(p.name for p in out.iterdir()) == ["lock.json", "mine", "own.png", "own.txt"]
    assert json.loads((out / "lock.json").read_text())["pid"] == os.getpid()
    assert (out / "mine" / "notes.txt").exists()


def test_a_restart_continues_what_this_launch_began_and_nothing_else(small, tmp_path, monkeypatch):
    from luffy.errors import UserError
    from luffy.train import outfolder
    from luffy.train.options import TrainOptions

    out, old = (
        tmp_path / "run",
        {"host": os.uname().nodename, "pid": 1, "launch": {"parent": "1-1", "run": "yesterday"}},
    )
    (out / "checkpoints" / "step-00000009").mkdir(parents=True)
    (out / "metrics.jsonl").write_text("{}")
    (out / "lock.json").write_text(json.dumps(old))
    plain, over = TrainOptions(**small()), TrainOptions(**small(overwrite=True))
    for restarted in (False, True):  # torchrun starts ranks again after a refusal too
        with pytest.raises(UserError, match="already holds a run"):
            outfolder.take_out(plain, restarted)
    assert not outfolder.take_out(over, True) and not (out / "metrics.jsonl").exists()
    (out / "metrics.jsonl").write_text("{}")
    assert outfolder.take_out(over, True) and (out / "metrics.jsonl").exists()
    assert outfolder.take_out(plain, True)
    # Rank 0 on another host of the same torchrun; and a lock that another launch has left.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "today")
    for said, ours in ((old | {"host": "other"}, True), (old, False), (old | {"launch": {"run": "today"}}, True)):
        (out / "lock.json").write_text(json.dumps(said))
        assert outfolder._is_ours(out / "lock.json") is ours


@pytest.mark.slow
def test_fine_tuning_without_transformers_is_one_line(tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"text": "a"}')
    script = (
        "import sys; sys.modules['transformers'] = None; from luffy.train.cli import main; "
        f"main(['finetune', '--model', '{tmp_path}', '--data', '{tmp_path}/chats.jsonl'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "transformers" in lines[0] and "pip install 'luffy-moe[hf]'" in lines[0]
