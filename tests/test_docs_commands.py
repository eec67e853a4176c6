"""Every command that README and docs show: its options are known, and those of the guides run, scaled down."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from docs_commands import GUIDES, RESEARCH, ROOT, Shown, blocks, shown

from luffy.lab.cli import lab
from luffy.train.cli import cli, main

COMMANDS = [command for command in shown([*GUIDES, *RESEARCH]) if command.luffy is not None]


REQUIRED = {"plan": ("--trace", "RUN", "--topology", "2:intra=1gbit"), "compare": ("--recipes", "vanilla,luffy")}


def parse(words: tuple[str, ...]) -> None:
    """Raises what click raises for an unknown command, option or kind of value."""
    name, rest = words[0], [w.replace("$GPUS", "8") for w in words[1:] if w != "$@" and not w.endswith(".toml")]
    if name == "lab":
        inner = lab.make_context("lab", rest).params["command"]
        if inner and inner[0] == "luffy":
            parse(inner[1:])
        return
    shows_help = bool({"--help", "--help-all"} & set(rest))
    extra = () if shows_help else REQUIRED.get(name, ())  # where three dots stand for them
    cli.commands[name].make_context(name, [*extra, *rest], resilient_parsing=shows_help)


def test_commands_are_found() -> None:
    assert {command.luffy[0] for command in COMMANDS if command.luffy} >= {
        "train", "compare", "plan", "finetune", "upcycle", "lab", "doctor", "report"
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {' '.join(c.luffy)[:60]}")
def test_options_are_known(command: Shown) -> None:
    assert command.luffy is not None
    parse(command.luffy)


def test_targets_and_scripts_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    found = 0
    for command in shown([*GUIDES, *RESEARCH]):
        for program, target in zip(command.words, command.words[1:], strict=False):
            if program == "make" and "=" not in target:
                assert target in targets, f"{command.page}: make {target}"
                found += 1
            if Path(program).name == "python" and target.endswith(".py"):
                assert (ROOT / target).exists(), f"{command.page}: {target}"
                found += 1
    assert found > 10


# ------------------------------------------------------------------ the guides' commands, run

SMALL = {
    "ranks": 2, "steps": 2, "device": "cpu", "model": "moe-gpt2-tiny", "layers": 2, "hidden-size": 32, "heads": 2,
    "experts": 8, "expert-hidden-size": 32, "vocab-size": 300, "sequence-length": 32, "batch-size": 8,
    "eval-every": 0, "eval-batches": 1, "checkpoint-every": 0,
}  # fmt: skip
TUNED = {"ranks": 2, "steps": 1, "device": "cpu", "sequence-length": 32, "batch-size": 4, "eval-every": 0,
         "eval-batches": 1, "checkpoint-every": 0, "lr": 1e-4}  # fmt: skip


def scaled(words: tuple[str, ...], given: dict[str, str]) -> list[str]:
    """Placeholders replaced; options that make it small said last, where they win."""
    small = {"train": SMALL, "compare": SMALL, "finetune": TUNED}.get(words[0], {})
    if words[0] == "train" and "--trace-every" in words:
        small = SMALL | {"steps": 6, "batch-size": 64, "trace-every": 2}
    out = [given.get(word, word) for word in words]
    return [*out, *(w for name, value in small.items() for w in (f"--{name}", str(value)))]


@pytest.mark.slow
def test_commands_of_readme_and_quickstart_run(corpus, tmp_path, monkeypatch, capfd) -> None:
    pytest.importorskip("transformers")
    import torch
    from hf.tiny import tiny_config, tiny_model, tiny_tokenizer

    tiny_model(tiny_config("mixtral", vocab_size=97), torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", corpus["cache_dir"])
    given = {"FOLDER": corpus["data"], "HF_FOLDER": str(tmp_path / "model"), "chats.jsonl": corpus["data"]}
    ran = set()
    pages = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", ROOT / "docs" / "recipes.md"]
    for command in sorted(shown(pages), key=lambda c: bool(c.luffy) and c.luffy[0] == "plan"):
        words = command.luffy
        if not words or words[0] in ("lab", "doctor", "demo") or words in ran:
            continue
        ran.add(words)
        if words[0] == "train" and words[1].endswith(".toml"):
            words = ("train", words[1], *words[2:])
        arguments = scaled(words, given)
        if words[0] in ("train", "finetune") and "--resume" not in words and not words[1].endswith(".toml"):
            arguments.append("--overwrite")
        if words[0] == "plan":
            arguments = ["2x2:intra=400gbit,inter=25gbit" if w.startswith("2x8") else w for w in arguments]
            arguments = ["runs/traced" if w == "runs/mine" else w for w in arguments]
        main(arguments)
    assert "advice (predicted): take " in capfd.readouterr().out
    assert {words[0] for words in ran} >= {"train", "compare", "plan", "finetune"}


@pytest.mark.slow
def test_the_script_for_several_nodes_runs_on_one(corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", corpus["cache_dir"])
    torchrun, slurm, *_ = blocks(ROOT / "docs" / "several_nodes.md")
    (tmp_path / "train.sh").write_text(torchrun)
    small = [w for name, value in SMALL.items() if name != "ranks" for w in (f"--{name}", str(value))]
    settings = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "NNODES": "1", "GPUS": "2", "MASTER_PORT": "29617",
                "INTERFACE": "lo", "DATA": corpus["data"], "OUT": str(tmp_path / "out")}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}")
    done = subprocess.run(["bash", str(tmp_path / "train.sh"), *small], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "summary.json").exists()
    (tmp_path / "job.sh").write_text(slurm)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    python = shutil.which("python", path=str(ROOT / ".venv" / "bin")) or "python"
    done = subprocess.run(
        [python, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first = re.sub(r"<[^>]+>", "", (tmp_path / "site" / "index.html").read_text("utf-8"))
    assert "make demo" in first and "make test" in first
