"""Run files, and the help page of a command with many options."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from luffy.train import cli
from luffy.train.options import TrainOptions
from luffy.train.runfile import write_run_file


@pytest.fixture
def seen(monkeypatch):
    """What `luffy train` would have run."""
    runs = []
    monkeypatch.setattr("luffy.train.run.start", runs.append)
    return runs


def refusal(capfd, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *map(str, arguments)])
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    return line


def test_the_file_of_a_run_starts_the_same_run(tmp_path, seen):
    made = TrainOptions(out=str(tmp_path), recipe="vanilla", steps=7, lr=3e-4, tensorboard=False, experts=4,
                        data='a "b"\\c', dtype="float64", resume=True)  # fmt: skip
    write_run_file(made)
    text = (tmp_path / "run.toml").read_text()
    assert "steps = 7" in text and "# batch_size = 32" in text and "resume" not in text
    cli.main(["train", str(tmp_path / "run.toml")])
    # The command line goes before the file.
    cli.main(["train", str(tmp_path / "run.toml"), "--steps", "9", "--tensorboard"])
    same = replace(made, resume=False)
    assert seen == [same, replace(same, steps=9, tensorboard=True)]


def test_options_may_be_written_as_on_the_command_line(tmp_path, seen):
    path = tmp_path / "mine.toml"
    path.write_text('batch-size = 64\nclip_norm = 2\nrecipe = "vanilla"\n')
    cli.main(["train", str(path)])
    assert (seen[0].batch_size, seen[0].clip_norm, seen[0].recipe) == (64, 2.0, "vanilla")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sise = 3", ("batch_sise", "did you mean batch_size?")),
        ("steps = 2.5", ("steps = 2.5", "integer")),
        ("steps = true", ("steps = true", "integer")),
        ('lr = "much"', ('lr = "much"', "float")),
        ("model = 5", ("model = 5", "text")),
        ("resume = 1", ("resume = 1", "boolean")),
        ("[train]\nsteps = 1", ("no option train",)),
        ("steps =", ("not TOML",)),
    ],
)
def test_a_mistake_in_a_run_file_is_one_line(tmp_path, capfd, seen, text, words):
    path = tmp_path / "run.toml"
    path.write_text(text)
    line = refusal(capfd, path)
    assert str(path) in line and all(word in line for word in words), line
    assert not seen


def test_what_is_no_run_file_is_refused(tmp_path, capfd, seen):
    assert "No such file" in refusal(capfd, tmp_path / "none.toml")
    assert "end in .toml" in refusal(capfd, "steps")
    path = Path(tmp_path, "run.toml")
    path.write_text("steps = 0")
    assert "--steps 0" in refusal(capfd, path)  # checked like any option


@pytest.mark.parametrize("command", ["train", "compare", "finetune"])
def test_ten_options_come_first_and_the_rest_by_group_when_asked(command):
    short, whole = (CliRunner().invoke(cli.cli, [command, word]).output for word in ("--help", "--help-all"))
    assert "--batch-size" in short and "--help-all" in short
    assert "--clip-norm" not in short and len(short.splitlines()) < 60
    assert [name in whole for name in ("Run:", "Data:", "Training:", "--clip-norm", "--seed")] == [True] * 5
    assert whole.count("  --batch-size INTEGER") == 1
    if command == "finetune":
        assert short.count("[required]") == 2
