"""Bytes counted around other people's collectives, against a count by hand and against torch's dispatcher."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
import torch.distributed as dist
from torch.distributed import all_to_all_single as kept_by_name
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from benchmarks.peers.audit import Audit
from benchmarks.peers.common import check_options, check_package
from benchmarks.peers.counting import ByteCounter
from benchmarks.peers.reduce_scatter import SwappedReduceScatter
from benchmarks.peers.registry import MODULES, get_peer, start
from luffy.errors import UserError
from luffy.testing import run_ranks
from luffy.train.options import TrainOptions


def taken(counter: ByteCounter) -> dict[str, int]:
    return {kind: n for kind, n in counter.take().items() if n}


def exchange(rank: int, counter: ByteCounter) -> list[dict[str, int]]:
    """One MoE layer of width 5: rank 0 keeps 1 of 4 rows, rank 1 keeps none of 3; counts travel as integers."""
    out = []
    sends, receives = ([1, 3], [1, 3]) if rank == 0 else ([3, 0], [3, 0])
    counts = torch.tensor(sends)
    kept_by_name(torch.empty_like(counts), counts)
    counter.begin(backward=False)
    rows = torch.ones(sum(sends), 5, requires_grad=True)
    there = wait_tensor(all_to_all_single_autograd(rows * 2, receives, sends, dist.group.WORLD))
    back = wait_tensor(all_to_all_single_autograd(there * 3, sends, receives, dist.group.WORLD))
    out.append(taken(counter))
    counter.begin(backward=True)
    back.sum().backward()
    assert torch.equal(rows.grad, torch.full_like(rows, 6.0))
    out.append(taken(counter))
    return out


def counting_job(rank: int) -> dict[str, object]:
    counter = ByteCounter().install()
    audit = Audit(counter)
    found: dict[str, object] = {}
    with audit:
        found["exchange"] = exchange(rank, counter)
    ten = torch.arange(10.0) + rank
    with audit:
        dist.all_reduce(ten.clone())
        found["all_reduce"] = taken(counter)
        dist.all_gather_into_tensor(torch.empty(20), ten)
        found["all_gather"] = taken(counter)
        part = torch.empty(5)
        dist.reduce_scatter_tensor(part, ten)
        found["reduce_scatter"] = taken(counter)
        own = torch.empty(5)
        SwappedReduceScatter(counter)(own, ten, dist.group.WORLD, dist.ReduceOp.SUM)
        assert torch.equal(own, part) and torch.equal(own, 2 * torch.arange(10.0).view(2, 5)[rank] + 1)
        found["swapped"] = taken(counter)
        with counter.charging("control"):
            dist.all_reduce(ten.to(torch.bfloat16))
        found["control"] = taken(counter)
    try:
        with audit:  # a way around Python, as C++ takes it
            dist.group.WORLD.allreduce([ten]).wait()
    except RuntimeError as error:
        found["missed"] = str(error)
    return found


def test_bytes_equal_a_count_by_hand_and_the_dispatcher() -> None:
    found = run_ranks(counting_job, 2)
    row, other = 5 * 4, 3  # each rank sends three rows to the other, in every direction
    for result in found:
        forward = {"dispatch": other * row, "combine": other * row, "control": 8}
        backward = {"combine_backward": other * row, "dispatch_backward": other * row}
        assert result["exchange"] == [forward, backward]
        assert result["all_reduce"] == {"gradients": 40}  # 2 (n-1)/n of 40 bytes
        assert result["all_gather"] == {"gradients": 40}
        assert result["reduce_scatter"] == result["swapped"] == {"gradients": 20}
        assert result["control"] == {"control": 20}
        assert result["missed"] == "0 bytes were counted where 40 were sent"


def test_a_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    for name in MODULES:
        peer = get_peer(name)
        monkeypatch.setattr(metadata, "version", none_installed)
        with pytest.raises(UserError, match=r"not installed; install it with: .*pip install") as error:
            check_package(peer)
        assert "\n" not in str(error.value)
        monkeypatch.setattr(metadata, "version", lambda _: "0.1.2")
        with pytest.raises(UserError, match=r"not 0\.1\.2"):
            check_package(peer)
        monkeypatch.setattr(metadata, "version", lambda _, low=peer.versions[0]: low + ".1")
        check_package(peer)


@pytest.mark.parametrize(
    ("peer", "changes", "words"),
    [
        ("hf_ep", {"wire": "int8"}, "--wire is Luffy's own"),
        ("deepspeed", {"accumulate": 2}, "--accumulate is Luffy's own"),
        ("hf_ep", {"start_weights": __file__}, "--start-weights holds Luffy's model"),
        ("hf_ep", {"model": "moe-bert-large-tiny"}, "moe-gpt2"),
        ("hf_ep", {"capacity_factor": 1.5}, "--capacity-factor"),
        ("hf_ep_layer", {"model": "moe-llm-tiny"}, "GELU"),
        ("deepspeed", {"sequence_mode": "streams"}, "--sequence-mode"),
        ("deepspeed", {"capacity_factor": 1.25}, "--sequence-mode fixed"),
    ],
)
def test_options_that_a_peer_cannot_have(peer: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_options(get_peer(peer), TrainOptions(recipe="vanilla", **changes))  # type: ignore[arg-type]


def test_an_unknown_peer() -> None:
    with pytest.raises(UserError, match="--peer megablocks is unknown; choose one of hf_ep"):
        start("megablocks", TrainOptions())
