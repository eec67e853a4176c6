"""The commands of the guides, run: scaled down to two ranks, a tiny model and a few steps, one page after the other."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from luffy.lab.namespace import missing_capabilities
from luffy.train.cli import main
from tests.docs.commands import GUIDES, ROOT, Shown, blocks, own_script, shown

# Not run from here, by how they begin, and what shows that they work.
ELSEWHERE = {
    "make demo": "tests/train/test_demo.py",
    "make test": "this is it",
    "pip install": "needs a network; .ci/run installs from a bare checkout",
    "docker": "needs docker",
    "srun": "needs Slurm; its torchrun line is test_the_script_for_several_nodes_runs_on_one's",
    ". .venv/bin/activate": "only puts `luffy` on the path",
    "set": "a line of the script for several nodes",
    ":": "a line of the script for several nodes",
    "export": "a line of the script for several nodes",
    "torchrun --nproc-per-node 8 -m torchtitan.train": "asks for GPUs; tests/titan",
    "torchrun --nproc-per-node 2 examples/torchtitan_luffy.py": "needs torchtitan; tests/titan/test_example.py",
    "torchrun --nnodes": "test_the_script_for_several_nodes_runs_on_one",
}
SMALL = {
    "ranks": 2, "steps": 2, "device": "cpu", "model": "moe-gpt2-tiny", "layers": 2, "hidden-size": 32, "heads": 2,
    "experts": 8, "expert-hidden-size": 32, "vocab-size": 300, "sequence-length": 32, "batch-size": 8,
    "eval-every": 0, "eval-batches": 1, "checkpoint-every": 0,
}  # fmt: skip
TUNED = {"ranks": 2, "steps": 1, "device": "cpu", "sequence-length": 32, "batch-size": 4, "eval-every": 0,
         "eval-batches": 1, "checkpoint-every": 0, "lr": 1e-4}  # fmt: skip
TRACED = SMALL | {"steps": 6, "batch-size": 64, "trace-every": 2}
GROUPS = SMALL | {"ranks": 4, "ep-size": 2, "ranks-per-node": 2}
ROOT_AND_LINKS = os.geteuid() == 0 and not missing_capabilities()


def elsewhere(command: Shown) -> str | None:
    """Where else a command is run, if it is."""
    if command.program == "luffy" and command.words[1] == "lab" and not ROOT_AND_LINKS:
        return "needs root; tests/lab"
    return next((where for start, where in ELSEWHERE.items() if f"{command} ".startswith(f"{start} ")), None)


def options(settings: dict[str, object]) -> list[str]:
    return [w for name, value in settings.items() for w in (f"--{name}", *([] if value is None else [str(value)]))]


def scaled(words: list[str]) -> list[str]:
    """Options that make it small come last, where they win."""
    name = words[0]
    if name == "lab":
        at = words.index("--")
        return ["lab", *words[1:at], "--ranks", "2", "--", "luffy", *scaled(words[at + 2 :])]
    if name == "train" and words[1].endswith(".toml"):
        return words
    if name == "plan":
        return ["runs/traced" if w == "runs/mine" else w.replace("2x8:", "2x2:") for w in words]
    small = {"compare": SMALL, "finetune": TUNED, "doctor": {"ranks": 2}}.get(name, {})
    if name == "train":
        small = TRACED if "--trace-every" in words else GROUPS if "--ep-size" in words else SMALL
    if name == "compare" and "--repeats" in words:
        small = small | {"repeats": 2}
    if name == "finetune" and "runs/dots" in words:  # its folder is verified once a page
        small = small | {"no-verify-export": None}
    replace = ["--overwrite"] if name in ("train", "compare", "finetune") and "--resume" not in words else []
    return [*words, *options(small), *replace]


def run_program(*words: str) -> None:
    env = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    env |= {"PATH": f"{ROOT / '.venv' / 'bin'}:{env['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-3000:]}"


def run(command: Shown, desk) -> None:
    if command.luffy:
        words = desk.fill(command.luffy, command.abridged)
        if words[0] == "lab":
            if command.abridged:  # the dots are those of the command behind the links
                words = [*command.luffy, *desk.fill(("compare",), abridged=True)[1:]]
            run_program("luffy", *scaled(words))
        else:
            main(scaled(words))
        return
    words = re.sub(r"(--nproc-per-node) \d+", r"\1 2", str(command)).split()
    if words[0] == "torchrun":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            words[1:1] = ["--master-port", str(probe.getsockname()[1])]
    Path("own.py").write_text(own_script())
    run_program(*words)


def test_what_runs_elsewhere_is_still_shown() -> None:
    texts = [f"{c} " for c in shown(GUIDES)]
    assert [start for start in ELSEWHERE if not any(t.startswith(f"{start} ") for t in texts)] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_the_commands_of_a_guide_run(page: Path, desk, weights, other_system, tmp_path, capfd) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = [c for c in shown([page]) if elsewhere(c) is None]
    if any(c.luffy and c.luffy[0] == "plan" for c in found) and page.name == "README.md":
        main(scaled(desk.fill(("train", "--trace-every", "10", "--out", "runs/traced", "--data", "FOLDER"))))
    for command in found:
        run(command, desk)
    out = capfd.readouterr().out
    assert ("advice (predicted): take " in out) == any(c.luffy and c.luffy[0] == "plan" for c in found)


@pytest.mark.slow
def test_the_script_for_several_nodes_runs_on_one(corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", corpus["cache_dir"])
    torchrun, *_ = blocks(ROOT / "docs" / "several_nodes.md")
    (tmp_path / "train.sh").write_text(torchrun)
    small = options({name: value for name, value in SMALL.items() if name != "ranks"})
    settings = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "NNODES": "1", "GPUS": "2", "MASTER_PORT": "29617",
                "INTERFACE": "lo", "DATA": corpus["data"], "OUT": str(tmp_path / "out")}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    run_program("bash", str(tmp_path / "train.sh"), *small)
    assert (tmp_path / "out" / "summary.json").exists()
