"""Who is whose neighbour, and what a collective costs on which link."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luffy.comm import DIRECTIONS, LINK_CLASSES, Comm, Mesh, TrafficMeter, build_mesh
from luffy.comm.meter import by_direction, by_link
from luffy.config import model_preset
from luffy.errors import UserError
from luffy.testing import run_ranks

CPU = torch.device("cpu")


def facts(mesh: Mesh) -> dict[str, object]:
    sums = {}
    for name, group in (("world", mesh.world_group), ("ep", mesh.ep_group), ("dp", mesh.dp_group)):
        value = torch.tensor([2.0**mesh.rank])  # the sum says who took part
        torch.distributed.all_reduce(value, group=group)
        sums[name] = int(value)
    return sums | {
        "ep": (sums["ep"], mesh.ep_rank, mesh.ep_ranks),
        "dp": (sums["dp"], mesh.dp_rank, mesh.dp_ranks),
        "nodes": mesh.node_of_rank,
    }


def mesh_job(rank: int) -> list[dict[str, object]]:
    return [facts(build_mesh(CPU)), facts(build_mesh(CPU, 2, ranks_per_node=2)), facts(build_mesh(CPU, 1, 3))]


def test_meshes_of_four_ranks() -> None:
    for rank, (whole, grid, lonely) in enumerate(run_ranks(mesh_job, 4)):
        everyone = [0, 1, 2, 3]
        assert whole == {"world": 15, "ep": (15, rank, everyone), "dp": (1 << rank, 0, [rank]), "nodes": (0, 0, 0, 0)}
        pair, column = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert grid == {
            "world": 15,
            "ep": (sum(1 << r for r in pair), rank % 2, pair),
            "dp": (sum(1 << r for r in column), rank // 2, column),
            "nodes": (0, 0, 1, 1),
        }
        assert lonely == {"world": 15, "ep": (1 << rank, 0, [rank]), "dp": (15, rank, everyone), "nodes": (0, 0, 0, 1)}


def uneven_job(rank: int) -> str:
    with pytest.raises(UserError) as error:
        build_mesh(CPU, ep_size=2)
    return str(error.value)


def test_an_ep_size_that_does_not_divide_is_the_users_mistake() -> None:
    assert set(run_ranks(uneven_job, 3)) == {"--ep-size 2 does not divide the 3 ranks"}
    with pytest.raises(UserError, match="--experts 8 cannot be divided over 3"):
        model_preset("moe-gpt2-tiny").check_ranks(3)


def collectives_job(rank: int) -> tuple[list[float], np.ndarray, list[np.ndarray]]:
    comm = Comm.create(build_mesh(CPU, ep_size=2, ranks_per_node=2))
    total = comm.all_reduce(torch.full((3,), 10.0**rank), "gradients")  # 12 bytes over 4 ranks
    within = comm.all_reduce_ep(torch.full((1,), 10.0**rank))  # 4 bytes over 2 ranks
    world = comm.all_gather_world(torch.tensor([[rank, -rank]]))  # 16 bytes to 3 others
    group = comm.all_gather_ep(torch.tensor(rank, dtype=torch.int32))  # 4 bytes to 1 other
    assert world.tolist() == [[[r, -r]] for r in range(4)]
    assert group.tolist() == comm.mesh.ep_ranks
    return [float(total[0]), float(within)], comm.meter.read(), [comm.meter.read_to_rank()]


def test_charging_within_charging_ends_where_it_began() -> None:
    meter = TrafficMeter(0, [0, 0])
    with meter.charging("experts"):
        with meter.charging("control"):
            meter.send("dispatch", 1, 1)
        meter.send("dispatch", 1, 10)
    meter.send("dispatch", 1, 100)
    assert {d: n for d, n in by_direction(meter.read()).items() if n} == {"dispatch": 100, "experts": 10, "control": 1}


def test_collectives_and_what_they_cost() -> None:
    for rank, ((total, within), counts, (to_rank,)) in enumerate(run_ranks(collectives_job, 4)):
        assert total == 1111 and within == (11 if rank < 2 else 1100)
        table = {d: dict(zip(LINK_CLASSES, row, strict=True)) for d, row in zip(DIRECTIONS, counts, strict=True)}
        # The ring: 2 * 3/4 of 12 bytes to the next rank, which for ranks 1 and 3 is on the other node.
        far = rank in (1, 3)
        assert table["gradients"] == {"local": 0, "intra_node": 0 if far else 18, "inter_node": 18 if far else 0}
        # Gathers: 16 bytes to a neighbour and to two ranks afar, 4 to the neighbour; a ring of two: 4 bytes.
        assert table["control"] == {"local": 0, "intra_node": 16 + 4 + 4, "inter_node": 32}
        assert not to_rank.any()  # no token rows among them


@pytest.mark.parametrize(("n", "num_bytes", "expected"), [(1, 100, 0), (2, 100, 100), (4, 100, 150), (3, 10, 13)])
def test_ring_formula(n: int, num_bytes: int, expected: int) -> None:
    """Each of n ranks passes on 2 (n - 1) / n of the bytes, whole bytes only."""
    for rank in range(n):
        meter = TrafficMeter(rank, range(n))
        meter.all_reduce("gradients", range(n), num_bytes)
        assert by_direction(meter.read())["gradients"] == expected
        assert by_link(meter.read())["inter_node"] == expected


def test_rows_that_stay_are_in_no_total() -> None:
    meter = TrafficMeter(1, (0, 0, 1))
    for peer, num_bytes in ((0, 5), (1, 70), (2, 11)):
        meter.send("dispatch", peer, num_bytes)
        meter.send("gradients", peer, num_bytes)
    assert by_link(meter.read()) == {"local": 140, "intra_node": 10, "inter_node": 22}
    assert by_direction(meter.read()) == dict.fromkeys(DIRECTIONS, 0) | {"dispatch": 16, "gradients": 16}
    assert meter.read_to_rank().tolist() == [5, 70, 11]  # rows of tokens only
    taken = meter.take()
    assert taken.sum() == 172 and not meter.read().any() and not meter.read_to_rank().any()
    with pytest.raises(ValueError, match="not in tuple"):
        meter.send("sideways", 0, 1)
