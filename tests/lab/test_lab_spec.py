"""What needs no privileges: the options, the environment of a rank, and the lines that refuse."""

from __future__ import annotations

import sys

import pytest

from luffy.errors import UserError
from luffy.lab.place import VARIABLE, Lab, check_ranks, current_lab
from luffy.lab.probe import LinkReport, format_rate, table
from luffy.lab.processes import resolve, starts_its_own_ranks
from luffy.lab.spec import LabSpec, read_spec
from luffy.plan.topology import LinkClass, parse_topology
from luffy.train.cli import main


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line by which the command line refuses."""
    with pytest.raises(SystemExit) as caught:
        main(["lab", *arguments])
    assert caught.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("luffy: error: ")
    return line


def test_a_mistake_is_one_line_that_names_the_option_and_the_mend(capfd):
    run = ["--", "true"]
    for arguments, words in (
        (["--link", "1gbit", *run], ("--ranks",)),
        (["--ranks", "0", *run], ("--ranks 0", "at least 1")),
        (["--ranks", "many", *run], ("--ranks", "many")),
        (["--ranks", "4", "--link", "fast", *run], ("--link fast", "8gbit")),
        (["--ranks", "4", "--link", "0mbit", *run], ("--link 0mbit",)),
        (["--ranks", "4", "--link", "1kbit", *run], ("--link 1kbit", "1mbit or more")),
        (["--ranks", "4", "--link", "100gbit", *run], ("--link 100gbit", "34gbit at most")),
        (["--ranks", "4", "--nodes", "3", "--link", "1gbit", *run], ("--nodes 3", "choose one of 1, 2, 4")),
        (["--ranks", "4", "--nodes", "0", *run], ("--nodes 0",)),
        (["--ranks", "4", "--nodes", "2", "--link", "1gbit", *run], ("--inter-link",)),
        (["--ranks", "4", "--inter-link", "1gbit", *run], ("--inter-link 1gbit", "--nodes 2")),
        (["--ranks", "4", "--nodes", "2", "--link", "1gbit", "--inter-link", "x", *run], ("--inter-link x",)),
        (["--ranks", "4", "--nic", "gpu", *run], ("--nic gpu", "node, rank")),
        (["--ranks", "4", "--latency", "5", *run], ("--latency 5", "20us")),
        (["--ranks", "4", "--link", "1gbit"], ("no command", "after --")),
        (["--ranks", "4", "--bandwidth", "1gbit", *run], ("--bandwidth",)),
    ):
        line = refusal(capfd, *arguments)
        assert all(word in line for word in words), line


def test_what_the_machine_lacks_is_one_line_too(capfd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("luffy.lab.run.missing_capabilities", lambda: ["CAP_NET_ADMIN"])
        assert "needs root (CAP_NET_ADMIN)" in refusal(capfd, "--ranks", "2", "--", "true")
        patch.setattr("luffy.lab.run.missing_capabilities", list)
        assert "no program no-such-program" in refusal(capfd, "--ranks", "2", "--", "no-such-program")
    monkeypatch.setitem(sys.modules, "pyroute2", None)
    assert "pip install pyroute2" in refusal(capfd, "--ranks", "2", "--", "true")


def test_ranks_fill_nodes_in_order_and_have_one_address_each():
    spec = read_spec(8, "16gbit", 2, "4gbit")
    assert [spec.node_of(r) for r in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [spec.address(r) for r in (0, 3, 4, 7)] == ["10.77.0.1", "10.77.0.4", "10.77.1.1", "10.77.1.4"]
    assert len({spec.address(r) for r in range(8)}) == 8


@pytest.mark.parametrize(("nic", "share"), [("node", 4), ("rank", 1)])
def test_the_topology_prices_a_ranks_share_of_the_card(nic, share):
    spec = read_spec(8, "16gbit", 2, "4gbit", nic, "50us")
    topology = parse_topology(str(spec.topology))
    assert (topology.world_size, topology.ranks_per_node) == (8, 4)
    assert topology.intra_node_bytes_per_second == 2e9
    assert topology.inter_node_bytes_per_second == 5e8 / share
    assert topology.latency_seconds[LinkClass.INTER_NODE] == pytest.approx(5e-5)


def test_a_cluster_with_an_unlimited_link_has_no_topology():
    assert read_spec(4).topology is None
    assert read_spec(4, None, 2, "1gbit").topology is None
    assert LabSpec(4, 4, None, 1e9).topology == "4x1:inter=8gbit"  # no two ranks share a node


def lab(ranks: int = 4, nodes: int = 2) -> Lab:
    names = [f"/proc/1/fd/{r}" for r in range(ranks)]
    return Lab("1-2", ranks, nodes, "node", 0.0, "2x2:...", names, ["10.77.0.1"] * ranks, {"intra_node": {"x": 1.0}})


def test_a_command_reads_the_lab_from_its_environment():
    assert current_lab({}) is None
    assert current_lab({VARIABLE: lab().to_json()}) == lab()
    assert lab().describe()["links"] == {"intra_node": {"x": 1.0}}


def test_a_rank_is_told_its_place_as_torchrun_would():
    places = [lab().rank_environment(r) for r in range(4)]
    assert [(p["RANK"], p["LOCAL_RANK"], p["GROUP_RANK"]) for p in places] == [
        ("0", "0", "0"),
        ("1", "1", "0"),
        ("2", "0", "1"),
        ("3", "1", "1"),
    ]
    assert {(p["WORLD_SIZE"], p["LOCAL_WORLD_SIZE"], p["MASTER_ADDR"]) for p in places} == {("4", "2", "10.77.0.1")}
    assert {p["GLOO_SOCKET_IFNAME"] for p in places} == {"eth0"}


def test_a_training_takes_its_ranks_from_the_lab():
    assert check_ranks(lab(), 1) == check_ranks(lab(), 4) == 4
    with pytest.raises(UserError, match="--ranks 3: the lab has 4 ranks"):
        check_ranks(lab(), 3)


def test_this_librarys_command_starts_its_own_ranks_and_others_do_not():
    assert starts_its_own_ranks(["/usr/bin/luffy", "train"])
    assert starts_its_own_ranks(resolve(["luffy", "train"]))
    assert not starts_its_own_ranks(["python", "train.py"])
    assert not starts_its_own_ranks(["python"])


def test_the_table_warns_of_links_that_the_machine_cannot_fill():
    fits = LinkReport(1.25e8, 1.2e8, 1.2e8, 1e-5)
    assert "cannot fill" not in table({"intra_node": fits}, "node")
    slow = LinkReport(1.25e9, 1.2e9, 6e8, 1e-5)
    text = table({"intra_node": fits, "inter_node": slow}, "node")
    assert "1 Gbit/s" in text and "10 Gbit/s" in text and "between nodes, each node" in text and "cannot fill" in text
    assert "no limit" in table({"intra_node": LinkReport(None, 5e8, 4e8, 1e-5)}, "rank")
    assert format_rate(6.25e6) == "50 Mbit/s"
