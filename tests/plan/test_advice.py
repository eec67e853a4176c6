"""Advice: what is worth taking, what is named beside it, and when two other ways to train send less, by hand."""

from luffy.plan.advice import MICRO_BATCHES, Alternative, advise, group_sum_seconds, offloading, pipeline
from luffy.plan.prediction import Prediction
from luffy.plan.topology import Topology


def of(recipe: str, seconds: float, num_bytes: float = 1.0) -> Prediction:
    return Prediction(recipe, (0, num_bytes, 0), (0, 0, 0), seconds, 0.0, 1)


PREDICTIONS = [of("vanilla", 2.0), of("vanilla_dedup", 1.0), of("luffy", 0.5), of("luffy_max", 0.1)]
LOSSLESS = ["vanilla", "vanilla_dedup", "luffy"]


def test_the_best_lossless_recipe_is_advised_and_a_faster_one_named() -> None:
    advice = advise(PREDICTIONS, LOSSLESS, compute_seconds=0.5)
    assert advice.recipe == "luffy" and advice.gain == 1.5
    assert advice.line == (
        "take luffy: 1.50x the speed of vanilla_dedup; if rows may be rounded, "
        "luffy_max: 2.50x the speed of vanilla_dedup"
    )
    assert "links are busy for 0.50 of the time of vanilla_dedup" in advise(PREDICTIONS, LOSSLESS).line


def test_where_nothing_gains_the_base_is_advised() -> None:
    advice = advise(PREDICTIONS, LOSSLESS, compute_seconds=100.0)
    assert advice.recipe == "vanilla_dedup" and "no lossless recipe gains more than 3%" in advice.line
    assert "luffy_max" not in advice.line
    assert advise([of("luffy", 0.0), of("vanilla", 0.0)], LOSSLESS).recipe == "luffy"  # one rank: no links at all


def test_others_are_named_where_they_win_and_only_there() -> None:
    idle = Alternative("pipeline", 0.1, 0.25)
    assert (
        "Not ours, and less to send: pipeline (0.1 s of busy links for 0.5, 25% of"
        in advise(PREDICTIONS, LOSSLESS, [idle], 1.0).line
    )  # 1.25 + 0.1 for 1.0 + 0.5
    assert "Not ours" not in advise(PREDICTIONS, LOSSLESS, [idle], 2.0).line  # 2.5 + 0.1 for 2.0 + 0.5


def test_seconds_of_the_others_by_hand() -> None:
    links = Topology(8, 2, 1e9, 1e8)  # 4 nodes of 2
    found = pipeline(of("vanilla_dedup", 0.8), links, num_tokens=1000, row_num_bytes=100)
    # A quarter of what two ranks would do with all tokens; then 1000 states of 100 bytes over two links, twice.
    assert abs(found.seconds - (0.8 / 4 + 2 * 1000 * 100 / 2 / 1e8)) < 1e-12
    assert found.idle_share == 3 / (4 * MICRO_BATCHES)
    weights = 1e9
    by_hand = 2 * 1 / 2 * weights / 1e9 + 2 * 3 / 4 * weights / 2 / 1e8 + 3 * weights / 25e9
    assert abs(offloading(links, weights).seconds - by_hand) < 1e-9
    assert abs(group_sum_seconds(links, 10, weights) - 2 * 9 / 10 * weights / 8 / 1e8) < 1e-9
