"""torchtitan's debug models with its own all-to-all and with Luffy's exchange: FSDP2, checkpointing, seats.

Experts compute in float32 here (`exact_experts`), where torchtitan's always round to bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("torchtitan", reason="torchtitan is not installed: pip install 'luffy-moe[titan]' to test it")

import numpy as np
import torch

from luffy.testing import RankFailedError, run_ranks
from tests.titan.cases import EXCHANGE, asks_for, beside_their_own, losses, resumed

pytestmark = pytest.mark.slow
TOKEN_ROWS = ("dispatch", "combine", "dispatch_backward", "combine_backward")


@pytest.mark.parametrize(
    ("model", "ranks", "settings", "bound"),  # of bytes over theirs, with all that goes along
    [
        ("qwen3", 2, {}, 0.3),  # 8 of 64 experts a token: a row in place of four
        ("qwen3", 2, {"checkpointing": "full"}, 0.3),
        ("deepseek_v3", 2, {"checkpointing": "none", "tp_size": 2}, 0.7),  # 3 of 8
        ("deepseek_v3", 4, {}, 1.02),  # two experts a rank: hardly ever does a token choose both
        ("deepseek_v3", 4, {"ep_size": 2}, 0.7),  # experts sharded by FSDP2 as well
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_their_own_all_to_all(
    model: str, ranks: int, settings: dict[str, Any], bound: float
) -> None:
    found = run_ranks(functools.partial(beside_their_own, **settings), ranks, model)
    for rank in found:
        assert rank["gradients"] > 20
        assert rank["own_loss"] == pytest.approx(rank["loss"], rel=1e-6)
        assert rank["worst"] < 2e-5, rank
    rows = [{name: sum(r[f"bytes_{name}"] for r in found) for name in TOKEN_ROWS}][0]
    times = 2 if settings.get("checkpointing") == "full" else 1  # rows travel again, theirs as well
    assert rows["dispatch"] == rows["combine"] == times * rows["dispatch_backward"] == times * rows["combine_backward"]
    theirs = sum(r["their_bytes"] for r in found) * (1 + times)  # forward, maybe again, and backward
    sent = sum(r["bytes_sent"] for r in found)
    assert 0.1 * theirs < sent < bound * theirs, sent / theirs


def test_seats_and_few_bits_train_as_they_should() -> None:
    plain = run_ranks(losses, 4, [EXCHANGE], 4)[0]
    seated = run_ranks(losses, 4, [EXCHANGE, ("luffy.titan.seats", {"refresh": 1})], 4)[0]
    assert max(seated["moved"]) > 0 and seated["moved"][0] == 0
    np.testing.assert_allclose(seated["losses"], plain["losses"], rtol=1e-4)
    assert "luffy_seats_0" in seated["state"] and "count" in seated["state"]
    few = run_ranks(losses, 4, [(EXCHANGE, {"wire": "int8"})], 4)[0]
    np.testing.assert_allclose(few["losses"], plain["losses"], rtol=2e-2)
    assert sum(few["bytes"]) < 0.35 * sum(plain["bytes"])


def test_a_seated_loader_resumes_where_it_was() -> None:
    for through, again in run_ranks(resumed, 2):
        assert len(through) == len(again) == 2
        for a, b in zip(through, again, strict=True):
            assert torch.equal(torch.tensor(a), torch.tensor(b))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("compiled blocks", r"leave `model` out of --compile\.components"),
        ("shared batches", r"luffy\.titan\.seats .* here ranks share a batch"),
    ],
)
def test_what_cannot_be_is_refused_by_name(what: str, words: str) -> None:
    with pytest.raises(RankFailedError, match=words):
        run_ranks(asks_for, 2, what)
