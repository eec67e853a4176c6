"""What steers and what is recorded of a step is of all its micro-batches on all ranks, however it is divided."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import luffy
from luffy.comm import build_mesh
from luffy.testing import run_ranks
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer

OF_A_STEP = ("loss", "balance", "router_z", "dropped", "locality", "favourite_rank_share", "expert_load", "tokens")
WIDTH, ROWS = 8, 16


def _train(rank, runs):
    for options in runs:
        Trainer(options, build_mesh(torch.device("cpu"), options.ep_size)).run()


def _flat(record):
    values = [record[name] for name in OF_A_STEP]
    out = []
    while values:
        value = values.pop(0)
        if isinstance(value, dict | list):
            values = [*(value.values() if isinstance(value, dict) else value), *values]
        else:
            out.append(value)
    return out


def test_a_divided_step_is_the_step(small, tmp_path):
    """At --lr 0 only the bias moves; it and the record are those of the undivided step, on one rank too."""
    ways = {
        "whole": {},
        "accumulate": {"accumulate": 4},
        "overlap": {"overlap": True},
        "both": {"accumulate": 2, "overlap": True},
        "groups": {"accumulate": 2, "ep_size": 1},
    }
    base = small(
        lr=0.0, steps=4, checkpoint_every=0, keep_checkpoints=0, export=True, bias_update_rate=0.01, batch_size=16,
        capacity_factor=1.2,
    )  # fmt: skip
    runs = {name: TrainOptions(**base | {"out": str(tmp_path / name)} | change) for name, change in ways.items()}
    alone = TrainOptions(**base | {"out": str(tmp_path / "alone")})
    run_ranks(_train, 2, list(runs.values()))
    run_ranks(_train, 1, [alone])
    whole = read_metrics(tmp_path / "alone" / "metrics.jsonl")
    bias = {k: v for k, v in load_file(tmp_path / "alone" / "model.safetensors").items() if "choice_bias" in k}
    assert len(bias) == 2
    assert all(b.any() for b in bias.values())
    for name, options in runs.items():
        tensors = load_file(Path(options.out) / "model.safetensors")
        assert all(torch.equal(tensors[k], b) for k, b in bias.items()), name
        records = read_metrics(Path(options.out) / "metrics.jsonl")
        for record, expected in zip(records, whole, strict=True):
            if "expert_load" not in expected:  # only of some steps
                expected, record = ({**r, "favourite_rank_share": 0, "expert_load": 0} for r in (expected, record))
            # Shares at a favourite rank depend on the number of ranks.
            for r in (record, expected):
                r["favourite_rank_share"] = 0
                r["locality"] = {k: v for k, v in r["locality"].items() if k != "favourite_rank_share"}
            assert _flat(record) == pytest.approx(_flat(expected), rel=1e-5, abs=1e-9), (name, record["step"])


class Net(nn.Module):
    def __init__(self, mesh):
        super().__init__()
        self.blocks = nn.ModuleList()
        for layer in range(2):
            runtime = self.blocks[0].runtime if layer else None
            self.blocks.append(
                luffy.MoEBlock(WIDTH, 8, 4, mesh=mesh, layer=layer, runtime=runtime, bias_update_rate=0.01)
            )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().sum()


def _own_loop(rank, parts):
    mesh = build_mesh(torch.device("cpu"))
    net = Net(mesh).double()
    comm = net.blocks[0].runtime.comm
    sync, bias = luffy.GradientSync(net, comm), luffy.LossFreeBias(net, comm)
    x = torch.randn(ROWS, 3, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine = x.chunk(mesh.world_size)[rank]
    for _ in range(5):
        for part in mine.chunk(parts):
            sync(part).backward()
        sync.finish()
        with torch.no_grad():
            net(mine[:1])  # a look at the model is no step
        bias.step()
    return [block.moe.router.choice_bias.tolist() for block in net.blocks]


def test_the_bias_in_a_loop_of_ones_own():
    alone = run_ranks(_own_loop, 1, 1)[0]
    assert all(max(map(abs, bias)) > 0.005 for bias in alone)
    for ranks, parts in ((1, 4), (2, 1), (2, 2)):
        assert all(found == alone for found in run_ranks(_own_loop, ranks, parts))


def _planned(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cpu"), options.ep_size))
    record = trainer.train_step()
    tally = {**record["plan"], "most": record["tokens_max_over_mean"]}
    return {k: v for k, v in tally.items() if not isinstance(v, dict)}


def test_what_planning_came_to_is_of_all_ranks(small):
    """Two groups plan for themselves; every rank records the same."""
    first, *others = run_ranks(_planned, 4, TrainOptions(**small(recipe="netmoe", ep_size=2)))
    assert all(other == first for other in others)
