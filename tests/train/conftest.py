"""Options for runs that take seconds."""

import pytest


@pytest.fixture
def small(corpus, tmp_path):
    """Settings of a tiny float64 run; override what a test is about."""

    def make(**changes):
        settings = {
            **corpus,
            "out": str(tmp_path / "run"),
            "recipe": "vanilla_dedup",
            "device": "cpu",
            "dtype": "float64",
            "vocab_size": 300,
            "layers": 2,
            "hidden_size": 32,
            "heads": 2,
            "experts": 4,
            "expert_hidden_size": 32,
            "sequence_length": 32,
            "batch_size": 8,
            "steps": 6,
            "eval_every": 0,
            "eval_batches": 1,
            "checkpoint_every": 3,
            "tensorboard": False,
            "profile_attention": False,
        }
        return settings | changes

    return make


@pytest.fixture
def as_arguments():
    """Settings -> command line."""

    def convert(settings):
        out = []
        for name, value in settings.items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                out.append(option if value else option.replace("--", "--no-", 1))
            else:
                out += [option, str(value)]
        return out

    return convert
