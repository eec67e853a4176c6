"""Topics of sequences and seats by topic: found where planted, shared evenly, merged and cut, alike everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from luffy.data.loader import Sequence
from luffy.errors import UserError
from luffy.seats.layout import SeatLayout
from luffy.seats.topic import TopicSeats
from luffy.seats.topics import Topics, balanced_assignment
from luffy.train.parts.topics import topic_record

VOCAB, KINDS = 400, 4


def planted(num: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Sequences of four kinds, of uneven length: half of their tokens are of any kind, half of 40 ids of their own.
    Kinds 0 and 1 share 20 ids, as do 2 and 3."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, KINDS, num)
    pools = [np.r_[100 * (k // 2) : 100 * (k // 2) + 20, 200 + 20 * k : 220 + 20 * k] for k in range(KINDS)]
    sequences = []
    for kind in kinds:
        length = int(rng.integers(20, 60))
        own = rng.choice(pools[kind], length)
        sequences.append(np.where(rng.random(length) < 0.5, own, rng.integers(0, VOCAB, length)))
    return sequences, kinds


@pytest.fixture(scope="module")
def topics() -> Topics:
    return Topics.fit(planted(600, 1)[0], KINDS, VOCAB)


def agreement(topic: np.ndarray, kinds: np.ndarray) -> float:
    """Share of sequences that have their topic's commonest kind."""
    return sum(np.bincount(kinds[topic == c], minlength=KINDS).max() for c in set(topic.tolist())) / len(kinds)


def test_planted_kinds_are_found_in_unseen_sequences(topics: Topics) -> None:
    sequences, kinds = planted(200, 2)
    assert agreement(topics.gains(sequences).argmax(1), kinds) > 0.95


def test_neighbours_merge_and_parts_are_cut_from_their_whole(topics: Topics) -> None:
    sequences, kinds = planted(200, 3)
    two = topics.regrouped(2)
    assert two.num_topics == 2
    assert agreement(two.gains(sequences).argmax(1), kinds // 2) > 0.95  # kinds that share ids are neighbours
    again = two.regrouped(4, planted(600, 1)[0])
    assert agreement(again.gains(sequences).argmax(1), kinds) > 0.9
    of_eight = topics.regrouped(8, planted(600, 1)[0])
    np.testing.assert_array_equal(of_eight.regrouped(4).counts.sum(), of_eight.counts.sum())
    with pytest.raises(UserError, match="--topics 3"):
        topics.regrouped(3)


def test_topics_share_a_batch_evenly_and_no_trade_is_left(topics: Topics) -> None:
    sequences, _ = planted(64, 4)
    lengths, gains = np.array([len(s) for s in sequences]), topics.gains(sequences)
    topic = topics.assign(sequences, slack=0.05)
    tokens = np.bincount(topic, weights=lengths, minlength=KINDS)
    assert tokens.max() <= 1.05 * -(-lengths.sum() // KINDS)
    said = gains[np.arange(64), topic].sum()
    rng = np.random.default_rng(0)
    for _ in range(500):  # exchanges of sequences as long as each other
        i, j = rng.choice(64, 2, replace=False)
        if lengths[i] == lengths[j]:
            other = topic.copy()
            other[[i, j]] = topic[[j, i]]
            assert gains[np.arange(64), other].sum() <= said


@pytest.mark.parametrize("num", [0, 1, 3])
def test_fewer_sequences_than_topics(topics: Topics, num: int) -> None:
    sequences = planted(8, 5)[0][:num]
    assert len(set(topics.assign(sequences).tolist())) == num


def test_unknown_ids_say_nothing_and_too_few_sequences_are_named(topics: Topics) -> None:
    assert not topics.gains([np.array([VOCAB + 5, 10**9])]).any()
    with pytest.raises(UserError, match="--topics"):
        Topics.fit(planted(3, 6)[0], 8, VOCAB)


def test_budgets_hold_where_gains_pull_all_one_way() -> None:
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 513, 48)
    gains = np.zeros((48, 4), dtype=np.int64)
    gains[:, 0] = 1000 * lengths
    topic = balanced_assignment(gains, lengths, 0.1)
    assert np.bincount(topic, weights=lengths, minlength=4).max() <= 1.1 * -(-lengths.sum() // 4)


@pytest.mark.parametrize(("ep_size", "dp_size", "micro_batches"), [(1, 1, 2), (2, 2, 1), (4, 1, 1), (8, 1, 2)])
def test_seats_stand_with_their_topics(topics: Topics, ep_size: int, dp_size: int, micro_batches: int) -> None:
    """Topics are the same at any number of ranks; ranks and micro-batches get about equally many tokens."""
    sequences = [Sequence(i, tokens, tokens, True) for i, tokens in enumerate(planted(128, 8)[0])]
    seats, layout = TopicSeats(KINDS), SeatLayout(ep_size, dp_size, micro_batches)
    assert seats.seat(sequences, layout).topic is None  # nothing is known yet
    seats.topics = topics
    seating = seats.seat(sequences, layout)
    assert seating.topic is not None
    np.testing.assert_array_equal(seating.topic, topics.assign([s.tokens for s in sequences]))
    where = seating.ep_rank(layout)
    if ep_size <= KINDS:
        np.testing.assert_array_equal(where, seating.topic * ep_size // KINDS)
    else:
        np.testing.assert_array_equal(where * KINDS // ep_size, seating.topic)
    lengths = np.array([len(s.tokens) for s in sequences])
    tokens = np.bincount(where + ep_size * seating.cell(layout), weights=lengths)
    assert tokens.max() <= 1.35 * tokens.mean()


def test_state_is_taken_up_and_merged(topics: Topics) -> None:
    seats = TopicSeats(KINDS)
    seats.topics = topics
    same, fewer, more = TopicSeats(KINDS), TopicSeats(2), TopicSeats(8)
    for other in (same, fewer, more):
        other.load(seats.state())
    assert same.topics is not None and fewer.topics is not None and more.topics is None and more.fewer is not None
    np.testing.assert_array_equal(same.topics.table, topics.table)
    np.testing.assert_array_equal(fewer.topics.counts, topics.regrouped(2).counts)


def test_record_of_a_known_traffic() -> None:
    """Two topics of half the tokens each. Topic 0 stays at home; each token of topic 1 uses both blocks."""
    record = topic_record(torch.tensor([[[0.5, 0.0], [0.5, 0.5]]]))
    assert record == {
        "rows_at_home": pytest.approx(2 / 3),
        "blocks_touched": pytest.approx(1.5),
        "rows_away": pytest.approx(0.5),
        "busiest": pytest.approx(0.5 / (1.5 / 4)),
    }


def test_a_damaged_file_of_topics_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "topics.npz").write_bytes(b"PK not topics")
    with pytest.raises(UserError, match=r"topics .*topics.npz cannot be read .*remove it"):
        Topics.load(tmp_path / "topics.npz")
