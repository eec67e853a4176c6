"""A lab from beginning to end: what its command sees, whose status it passes on, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from luffy.lab.namespace import inside
from luffy.lab.place import VARIABLE
from luffy.lab.processes import _environment, processes_of_labs
from luffy.testing.processes import last_step, wait_for_step, wait_until
from luffy.train.metrics import read_metrics

LINKS = ["--ranks", "2", "--link", "200mbit"]
# `sh` starts a child and waits for it: the lab knows the one and has to find the other.
SLEEPERS = ["--", "sh", "-c", "sleep 1000 & wait"]


def processes_of(lab: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, identity in processes_of_labs().items() if identity.startswith(f"{lab.pid}-")]


def namespaces_of(lab: subprocess.Popen[str]) -> set[str]:
    """The rank namespaces of a running lab, such as `net:[4026532001]`."""
    texts = (_environment(pid).get(VARIABLE) for pid in processes_of(lab))
    paths = next(json.loads(text)["namespaces"] for text in texts if text)
    return {os.readlink(path) for path in paths}


def held_namespaces() -> set[str]:
    """Every network namespace that a process is in or holds open: the others are gone."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for link in [Path(f"/proc/{pid}/ns/net"), *_files(pid)]:
            try:
                found.add(os.readlink(link))
            except OSError:
                continue
    return found


def _files(pid: str) -> list[Path]:
    try:
        return [Path(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def started(lab: subprocess.Popen[str], count: int) -> set[str]:
    """Wait for that many processes in a lab; its namespaces."""
    wait_until(lambda: len(processes_of(lab)) >= count or lab.poll() is not None)
    assert lab.poll() is None, lab.communicate()[1]
    return namespaces_of(lab)


def assert_nothing_is_left(lab: subprocess.Popen[str], namespaces: set[str]) -> None:
    assert processes_of(lab) == []
    assert len(namespaces) == 2 and not namespaces & held_namespaces()


def test_a_command_runs_on_every_rank_with_torchruns_environment(start_lab):
    script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
    lab = start_lab(
        "--ranks", "4", "--nodes", "2", "--link", "1gbit", "--inter-link", "200mbit", "--", "sh", "-c", script
    )
    out, err = lab.communicate(timeout=60)
    assert lab.returncode == 0, err
    expected = [f"{rank} {rank % 2} 4 2 10.77.0.1 29500" for rank in range(4)]
    assert sorted(out.splitlines()) == expected
    # What the links give stands before the command's own words, one row a class of link.
    assert "2 x 2 ranks" in err and "1 Gbit/s" in err and "200 Mbit/s" in err
    assert processes_of(lab) == []


def test_the_status_of_the_command_is_passed_on_and_a_failing_rank_is_named(start_lab):
    begin = time.monotonic()
    lab = start_lab(*LINKS, "--", "sh", "-c", "test $RANK = 1 && exit 7; sleep 1000")
    _, err = lab.communicate(timeout=60)
    assert lab.returncode == 7
    assert err.strip().splitlines()[-1] == (
        "luffy: error: rank 1 of the command ended with status 7; the other ranks were stopped"
    )
    assert time.monotonic() - begin < 30
    assert processes_of(lab) == []


def test_a_killed_rank_takes_the_job_down_with_its_cause(start_lab):
    lab = start_lab(*LINKS, *SLEEPERS)
    namespaces = started(lab, 4)
    shells = sorted(int(pid) for pid in Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split())
    os.kill(shells[1], signal.SIGKILL)
    _, err = lab.communicate(timeout=30)
    assert lab.returncode == 128 + signal.SIGKILL
    assert "rank 1 of the command was ended by signal 9" in err.strip().splitlines()[-1]
    assert_nothing_is_left(lab, namespaces)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_stopped_leaves_nothing_behind(start_lab, number):
    lab = start_lab(*LINKS, *SLEEPERS)
    namespaces = started(lab, 4)
    assert namespaces <= held_namespaces()
    lab.send_signal(number)
    _, err = lab.communicate(timeout=30)
    assert lab.returncode > 128
    assert err.strip().splitlines()[-1] == "luffy: error: stopped" and "Traceback" not in err
    assert_nothing_is_left(lab, namespaces)


def test_being_stopped_while_it_measures_leaves_nothing_behind(start_lab):
    lab = start_lab("--ranks", "2", "--link", "200mbit", "--", "true")
    wait_until(lambda: len(Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()) >= 4)
    lab.send_signal(signal.SIGTERM)
    _, err = lab.communicate(timeout=30)
    assert lab.returncode == 130
    assert err.strip().splitlines() == ["luffy: error: stopped"]


def test_what_survives_a_kill_is_swept_by_the_next_lab(start_lab):
    lab = start_lab(*LINKS, *SLEEPERS)
    namespaces = started(lab, 4)
    lab.kill()
    lab.wait()
    # The kernel ends the lab's own children; what those had started is orphaned, and keeps its namespace alive.
    wait_until(lambda: len(processes_of(lab)) == 2)
    other = start_lab(*LINKS, *SLEEPERS)
    kept = started(other, 4)
    assert processes_of(lab) == []
    assert not (namespaces - kept) & held_namespaces()  # the kernel gives the numbers of those that are gone again
    # A lab that lives is not touched by the next one's sweep.
    third = start_lab(*LINKS, "--", "true")
    assert third.communicate(timeout=60)[1].count("left running") == 0 and third.returncode == 0
    assert len(processes_of(other)) == 4 and kept <= held_namespaces()
    other.terminate()
    assert "ended what 1 lab before this one had left running" in other.communicate(timeout=30)[1]
    assert_nothing_is_left(other, kept)


@pytest.mark.slow
def test_a_training_runs_behind_the_links_and_its_summary_says_so(start_lab, tiny, tmp_path):
    shape = ["--ranks", "4", "--nodes", "2", "--link", "200mbit", "--inter-link", "100mbit"]
    lab = start_lab(*shape, "--", "luffy", "train", *tiny, "--steps", "3")
    _, err = lab.communicate(timeout=120)
    assert lab.returncode == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 4
    assert summary["lab"]["topology"] == "2x2:intra=200mbit,inter=50mbit"
    assert summary["provenance"] == "emulated"
    assert "(asked 100)" in summary["network"]
    for name, asked in (("intra_node", 2.5e7), ("inter_node", 1.25e7)):
        link = summary["lab"]["links"][name]
        assert link["asked_bytes_per_second"] == asked
        assert 0.65 * asked < link["alone_bytes_per_second"] < 1.15 * asked
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert record["bytes_by_link"]["intra_node"] > 0 and record["bytes_by_link"]["inter_node"] > 0
    assert processes_of(lab) == []


@pytest.mark.slow
def test_a_training_ends_with_its_lab_whatever_ends_it(start_lab, tiny, tmp_path):
    lab = start_lab(*LINKS, "--", "luffy", "train", *tiny, "--steps", "100000")
    wait_for_step(tmp_path / "run", 2, lab)
    namespaces = namespaces_of(lab)
    assert namespaces <= held_namespaces()
    lab.kill()
    lab.wait()
    wait_until(lambda: not processes_of(lab), 10)
    assert_nothing_is_left(lab, namespaces)


@pytest.mark.slow
def test_a_training_whose_rank_dies_ends_with_one_line(start_lab, tiny, tmp_path):
    lab = start_lab(*LINKS, "--", "luffy", "train", *tiny, "--steps", "100000")
    wait_for_step(tmp_path / "run", 2, lab)
    namespaces = namespaces_of(lab)
    ranks = [pid for pid in processes_of(lab) if os.readlink(f"/proc/{pid}/ns/net") in namespaces]
    assert len(ranks) == 2
    begin = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, err = lab.communicate(timeout=60)
    assert lab.returncode == 1 and time.monotonic() - begin < 20
    assert "was ended by signal 9" in err.strip().splitlines()[-1]
    assert_nothing_is_left(lab, namespaces)


@pytest.mark.slow
def test_recipes_are_compared_in_one_lab_and_a_mistake_of_the_command_is_its_own(start_lab, tiny, tmp_path):
    lab = start_lab(*LINKS, "--", "luffy", "compare", "--recipes", "vanilla,vanilla_dedup", *tiny, "--steps", "2")
    _, err = lab.communicate(timeout=180)
    assert lab.returncode == 0, err
    summaries = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert [s["world_size"] for s in summaries] == [2, 2] and all(s["lab"]["ranks"] == 2 for s in summaries)
    for s in summaries:  # behind links of a known rate a step has a least time
        moved, rate = (
            s["step_bytes_by_link"]["intra_node"],
            s["lab"]["links"]["intra_node"]["together_bytes_per_second"],
        )
        assert s["roofline"]["wire_seconds"] == pytest.approx(moved / 2 / rate)
    lab = start_lab(*LINKS, "--", "luffy", "train", *tiny, "--ranks", "3")
    _, err = lab.communicate(timeout=60)
    assert lab.returncode == 2
    assert "--ranks 3: the lab has 2 ranks" in err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_training_may_also_be_started_once_on_every_rank(start_lab, tiny, tmp_path):
    lab = start_lab(*LINKS, "--per-rank", "--", "luffy", "train", *tiny, "--steps", "2")
    _, err = lab.communicate(timeout=180)
    assert lab.returncode == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["lab"]["ranks"] == 2


@pytest.mark.slow
def test_a_cut_link_is_named_in_one_line_and_a_restart_continues(start_lab, tiny, tmp_path):
    more = ["--steps", "60", "--timeout-seconds", "5", "--max-restarts", "3", "--checkpoint-every", "2"]
    lab = start_lab(*LINKS, "--", "luffy", "train", *tiny, *more)
    wait_for_step(tmp_path / "run", 5, lab)
    ranks = sorted(pid for pid in processes_of(lab) if os.readlink(f"/proc/{pid}/ns/net") in namespaces_of(lab))
    network = os.open(f"/proc/{ranks[1]}/ns/net", os.O_RDONLY)
    log = tmp_path / "run" / "logs" / "rank-0.log"

    def set_link(state: str) -> None:
        with inside(network):
            subprocess.run(["ip", "link", "set", "eth0", state], check=True)

    set_link("down")
    wait_until(lambda: "late: " in log.read_text(), 30)
    set_link("up")
    os.close(network)
    _, err = lab.communicate(timeout=120)
    assert lab.returncode == 0 and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if "is late" in line]
    assert line.startswith(f"luffy: rank 1 on {os.uname().nodename} is late: ") and "step " in line
    assert "restart 1 of 3, on 2 ranks, from step-" in err
    assert last_step(tmp_path / "run") == 60
