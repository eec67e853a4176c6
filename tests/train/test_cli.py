"""The command line as a person meets it: mistakes are one line and status 2, a kill loses nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luffy.errors import UserError
from luffy.testing.processes import ranks_of, start, wait_for_step
from luffy.train.checkpoint_files import list_checkpoints
from luffy.train.cli import main
from luffy.train.launch import choose_device
from luffy.train.metrics import read_metrics


def _mistake(capfd, *arguments, after_progress=False):
    """The one line of a mistake; only work that really began may have shown its progress before it."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert after_progress or len(lines) == 1, lines
    assert lines[-1].startswith("luffy: error: ")
    assert sum("error" in line for line in lines) == 1
    return lines[-1]


def test_a_mistake_names_the_option_and_the_mend(capfd, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for arguments, words in (
        (["--recipe", "magic"], ("--recipe 'magic'", "vanilla_dedup")),
        (["--model", "gpt9"], ("--model 'gpt9'", "moe-gpt2-tiny")),
        (["--no-such-option"], ("--no-such-option",)),
        (["--steps", "many"], ("--steps", "many")),
        (["--ranks", "3"], ("--experts 8", "multiple of 3")),
        (["--ranks", "4", "--batch-size", "6"], ("--batch-size 6",)),
        (["--ranks", "4", "--ep-size", "3"], ("--ep-size 3",)),
        (["--top-k", "9"], ("--top-k 9",)),
        (["--sequence-length", "300"], ("--sequence-length 300", "--max-sequence-length")),
        (["--data", str(tmp_path / "nowhere")], ("--data", "nowhere")),
        (["--backend", "nccl", "--device", "cpu"], ("--backend nccl",)),
        (["--memory-length", "8"], ("--memory-length",)),
        (["--resume", "--overwrite"], ("--resume", "--overwrite")),
        (["--timeout-seconds", "0"], ("--timeout-seconds 0",)),
        (["--seed", str(10**30)], ("--seed 1000",)),
        (["--min-ranks", "3"], ("--min-ranks 3", "--ranks 1")),
    ):
        line = _mistake(capfd, "train", *out, *arguments)
        assert all(word in line for word in words), line


@pytest.mark.slow
def test_mistakes_that_only_the_ranks_can_see_are_one_line_too(capfd, tmp_path, small, as_arguments):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    line = _mistake(capfd, "train", *as_arguments(small(data=str(empty), ranks=2)), after_progress=True)
    assert "--data" in line and "empty" in line


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(small, as_arguments, tmp_path, capfd):
    settings = small(ranks=2, steps=30, checkpoint_every=4, seed=3)
    process = start(as_arguments(settings))
    wait_for_step(settings["out"], 11, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    seen = len(read_metrics(Path(settings["out"], "metrics.jsonl")))
    assert 11 <= seen < 30
    # From here on in this process, whose ranks are forked from one server: a command loads torch for seconds.
    main(["train", *as_arguments(settings | {"resume": True})])
    whole = settings | {"out": str(tmp_path / "whole"), "checkpoint_every": 0}
    main(["train", *as_arguments(whole)])
    assert (tmp_path / "whole" / "report.html").exists()
    resumed = [(r["step"], r["loss"]) for r in read_metrics(Path(settings["out"], "metrics.jsonl"))]
    assert resumed == [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    # A finished folder is not silently written over.
    line = _mistake(capfd, "train", *as_arguments(settings), after_progress=True)
    assert "--resume" in line and "--overwrite" in line


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down_with_its_cause(small, as_arguments):
    settings = small(ranks=2, steps=100000, checkpoint_every=0)
    process = start(as_arguments(settings))
    wait_for_step(settings["out"], 2, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert process.returncode == 1
    assert "was ended by signal 9" in err.strip().splitlines()[-1], err
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_being_stopped_is_one_line_and_leaves_no_rank_behind(small, as_arguments):
    settings = small(ranks=2, steps=100000, checkpoint_every=0)
    process = start(as_arguments(settings))
    wait_for_step(settings["out"], 2, process)
    ranks = ranks_of(process.pid)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    last = err.splitlines()[-1]
    line = re.fullmatch(r"luffy: stopped by SIGTERM after step (\d+), which is saved; .*--resume.*", last)
    assert line, err
    assert list_checkpoints(Path(settings["out"], "checkpoints"))[-1].name == f"step-{int(line[1]):08d}"
    assert "Traceback" not in err and "hread" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_it_joins_a_world_of_torchrun(small, as_arguments):
    settings = small(steps=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "luffy.train.cli"]
    done = subprocess.run([*command, "train", *as_arguments(settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "report" in done.stdout
    assert len(read_metrics(Path(settings["out"], "metrics.jsonl"))) == 2


def test_a_full_disk_keeps_the_last_checkpoint(small, as_arguments, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "none", disk]).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        settings = small(out=str(disk / "run"), ranks=2, steps=8, checkpoint_every=2, keep_checkpoints=50)
        line = _mistake(capfd, "train", *as_arguments(settings), after_progress=True)
        assert "--out" in line and ("No space left" in line or "full" in line)
        assert list(Path(settings["out"], "checkpoints").glob("step-0000000?"))
        assert not list(Path(settings["out"], "checkpoints").glob("*.tmp"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_nccl_with_more_ranks_than_gpus_is_refused_and_auto_shares_the_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--backend nccl: 4 ranks but 2 GPUs; use --ranks 2"):
        choose_device("cuda", "nccl", 4)
    assert choose_device("auto", "auto", 4) == ("cuda", "gloo")
    assert choose_device("auto", "auto", 2) == ("cuda", "nccl")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU"):
        choose_device("cuda", "auto", 1)
    assert choose_device("auto", "auto", 4) == ("cpu", "gloo")
