import numpy as np
import pytest

from luffy.errors import UserError
from luffy.plan.topology import LinkClass, Topology, parse_rate, parse_seconds, parse_topology


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("8gbit", 1e9),
        ("500mbit", 62.5e6),
        ("64kbit", 8e3),
        ("800bit", 100),
        ("10gbps", 1.25e9),
        ("10Gbps", 1.25e9),
        ("2.5Gb/s", 312.5e6),
        ("2GB/s", 2e9),
        ("100MB/s", 1e8),
        ("1GBps", 1e9),
        ("1.5GiB/s", 1.5 * 2**30),
        ("1Tbit", 125e9),
        (" 8 gbit ", 1e9),
        (".5gbit", 62.5e6),
    ],
)
def test_rates_in_bits_and_bytes(text, bytes_per_second):
    assert parse_rate(text) == pytest.approx(bytes_per_second)


@pytest.mark.parametrize(
    "text", ["", "fast", "8", "8gb", "8GB", "-8gbit", "8gbit/h", "0gbit", "1ibit", "gbit", "8 8gbit", "nan"]
)
def test_a_rate_that_is_none_names_its_option(text):
    with pytest.raises(UserError, match=r"^--inter-link ") as error:
        parse_rate(text, "--inter-link")
    assert "\n" not in str(error.value)


def test_seconds():
    assert parse_seconds("20us") == pytest.approx(20e-6)
    assert parse_seconds("1.5ms") == pytest.approx(1.5e-3)
    with pytest.raises(UserError, match="--latency 20"):
        parse_seconds("20")


def test_topology_of_two_nodes():
    topology = parse_topology("2x4:intra=64gbit,inter=10gbit,latency=20us")
    assert topology == Topology(8, 4, 8e9, 1.25e9, (0.0, 20e-6, 20e-6))
    assert topology.num_nodes == 2
    assert topology.link_class(3, 3) is LinkClass.LOCAL
    assert topology.link_class(0, 3) is LinkClass.INTRA_NODE
    assert topology.link_class(3, 4) is LinkClass.INTER_NODE
    assert topology.class_weights == (0, 125_000, 800_000)


def test_topology_leaves_out_rates_that_no_pair_uses():
    assert parse_topology("8:intra=64gbit").world_size == 8
    assert parse_topology("1x8:intra=64gbit").ranks_per_node == 8
    assert parse_topology("4x1:inter=1gbit").num_nodes == 4
    assert parse_topology("1").world_size == 1


def test_latencies_by_class():
    topology = parse_topology("2x2:intra=1gbit,inter=1gbit,latency=20us,intra_latency=1us")
    assert topology.latency_seconds == pytest.approx((0.0, 1e-6, 20e-6))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "begin with"),
        ("two", "begin with"),
        ("2x4x4:intra=1gbit", "begin with"),
        ("0x4:intra=1gbit", "at least one"),
        ("2x4:intra=64gbit", "need inter="),
        ("2x4:inter=64gbit", "need intra="),
        ("2x4", "need inter="),
        ("8:intra=64gigs", "not a rate"),
        ("8:intra", "cannot read"),
        ("8:intra=", "cannot read"),
        ("8:speed=1gbit", "cannot read"),
        ("8:intra=1gbit,intra=2gbit", "given twice"),
        ("8:intra=1gbit,latency=20", "not a time"),
    ],
)
def test_a_topology_that_is_none_names_its_option(text, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        parse_topology(text)
    assert str(error.value).startswith("--topology") and "\n" not in str(error.value)


def test_matrices_agree_with_the_function():
    topology = Topology(6, 2, 8e9, 1e9)
    classes, weights = topology.link_class_matrix(), topology.weight_matrix()
    assert classes.dtype == weights.dtype == np.int64
    for src in range(6):
        for dst in range(6):
            assert classes[src, dst] == topology.link_class(src, dst)
            assert weights[src, dst] == topology.class_weights[classes[src, dst]]
    assert (classes == classes.T).all()


def test_weights_of_fast_links_are_not_rounded_away():
    _, intra, inter = Topology(16, 8, 900e9, 400e9).class_weights
    assert intra / inter == pytest.approx(400 / 900, rel=1e-3)


@pytest.mark.parametrize(
    "arguments", [(0, 1, 1, 1), (6, 4, 1, 1), (4, 2, 0, 1), (4, 2, 1, -1), (4, 2, 1, 1, (0, 0, -1))]
)
def test_impossible_clusters(arguments):
    with pytest.raises(ValueError, match="topology"):
        Topology(*arguments)
