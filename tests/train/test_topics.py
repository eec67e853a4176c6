"""Runs with seats by topic and the seat loss, on real ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from luffy.errors import UserError
from luffy.report.runs import TOPICS_FILE
from luffy.seats.topics import Topics
from luffy.testing import run_ranks
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions

from .test_trainer import _train


def run(settings, world):
    run_ranks(_train, world, TrainOptions(**settings))
    return read_metrics(Path(settings["out"]) / "metrics.jsonl")


def test_a_model_of_four_topics_is_the_same_on_any_number_of_ranks_and_goes_on_at_others(small, tmp_path):
    """Sequences sit elsewhere on two ranks than on one; losses, topics and counts of rows are the same to rounding.
    Resumed on two ranks the topics are the checkpoint's, whatever the data says; two topics are cut in four."""
    settings = small(seats="topic", topics=4, seat_loss=0.3, batch_size=16, steps=4, checkpoint_every=2)
    settings |= {"experts": 8, "keep_checkpoints": 5, "seat_loss_warmup": 2}
    one = run(settings | {"out": str(tmp_path / "one")}, 1)
    two = run(settings | {"out": str(tmp_path / "two")}, 2)
    np.testing.assert_allclose([r["loss"] for r in two], [r["loss"] for r in one], rtol=1e-10)
    for a, b in zip(one, two, strict=True):
        assert a["topics"] == pytest.approx(b["topics"], rel=1e-6)
    assert two[-1]["seats"]["moved_share"] > 0
    assert two[-1]["bytes"]["dispatch"] > 0
    topics = Topics.load(tmp_path / "one" / TOPICS_FILE)
    np.testing.assert_array_equal(topics.counts, Topics.load(tmp_path / "two" / TOPICS_FILE).counts)

    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000004")
    again = run(settings | {"out": str(tmp_path / "two"), "resume": True}, 2)
    assert [r["loss"] for r in again] == [r["loss"] for r in two]
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "step-00000004")
    more = run(settings | {"out": str(tmp_path / "one"), "topics": 8, "resume": True}, 1)
    assert len(more) == 4
    cut = Topics.load(tmp_path / "one" / TOPICS_FILE)
    together, whole = cut.regrouped(4).gains([np.arange(300)]), topics.gains([np.arange(300)])
    assert cut.num_topics == 8 and together.argmax() == whole.argmax()
    about = json.loads((tmp_path / "one" / "config.json").read_text())
    assert about["options"]["seats"] == "topic"


def test_learnt_seats_pull_once_they_are_known(small, tmp_path, capfd):
    settings = small(recipe="luffy", steps=13, checkpoint_every=0, batch_size=16)
    plain = run(settings | {"out": str(tmp_path / "plain"), "export": True}, 2)
    taught = run(settings | {"out": str(tmp_path / "taught"), "seats": "learnt", "seat_loss": 0.5}, 2)
    assert taught[-1]["seats"]["moved_share"] > 0
    same = [a["loss"] == pytest.approx(b["loss"], rel=1e-10) for a, b in zip(plain, taught, strict=True)]
    assert same == [True] * 11 + [False] * 2  # the first pull is the one of step 11; it shows in the loss of step 12

    # Topics that are fitted anew for a trained model stand with experts that their sequences never chose.
    capfd.readouterr()
    trained = settings | {"steps": 1, "seats": "topic", "start_weights": str(tmp_path / "plain" / "model.safetensors")}
    run(trained, 1)
    assert "--seats topic: no topics.npz lies beside the trained weights" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seat_loss": 0.1}, "--seat-loss 0.1 needs seats"),
        ({"topics": 4}, "--topics 4 needs --seats topic"),
        ({"seats": "topic", "topics": 3}, "--topics 3 must divide"),
        ({"seats": "topic", "rehome_every": 10}, "--rehome-every"),
    ],
)
def test_settings_that_do_not_go_together_are_named(small, settings, named):
    with pytest.raises(UserError, match=named):
        TrainOptions(**small(**settings))


def test_topics_and_ranks_must_divide_one_another(small):
    options = TrainOptions(**small(seats="topic", topics=4, experts=12))
    options.check_world(2)
    with pytest.raises(UserError, match="--topics 4"):
        options.check_world(3)
