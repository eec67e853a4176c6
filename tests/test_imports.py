"""What is imported, and what is not: a question to the command line costs no second of loading torch."""

import subprocess
import sys

import pytest

import luffy
import luffy.hf

HEAVY = ("torch", "scipy", "transformers", "matplotlib", "pyarrow", "triton", "tensorboard")
QUESTIONS = ("--help", "--version", "models", "recipes", "train --help", "compare --help", "finetune --help",
             "plan --help", "lab --help", "report --help", "upcycle --help", "doctor --help",
             "train --help-all")  # fmt: skip
ASK = """
import sys
from luffy.train.cli import main
for question in sys.argv[1:]:
    try:
        main(question.split())
    except SystemExit as stopped:
        assert not stopped.code, (question, stopped.code)
    loaded = [name for name in {heavy} if name in sys.modules]
    assert not loaded, (question, loaded)
"""


def test_what_needs_no_torch_does_not_import_it() -> None:
    done = subprocess.run([sys.executable, "-c", ASK.format(heavy=HEAVY), *QUESTIONS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("finetune", "moe-gpt2-tiny", "vanilla_dedup", "--topology"))


@pytest.mark.slow
def test_ranks_are_launched_by_a_process_that_has_not_loaded_what_only_ranks_need() -> None:
    """The launcher waits; torch's compiler, checkpoints and Triton would cost it three seconds."""
    code = f"import sys, luffy.train.run; print(*(m for m in {HEAVY[1:]} + ('torch._dynamo',) if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", [luffy, luffy.hf])
def test_public_names_are_shown_before_they_are_imported(package) -> None:
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
