"""`luffy doctor` says what is there, measures, and counts parameters as the models have them."""

import re

import pytest
import torch

from luffy.comm import Comm, build_mesh
from luffy.config import PRESETS
from luffy.model import Runtime, build_model
from luffy.plan.topology import parse_topology
from luffy.recipes import get_recipe
from luffy.testing import run_ranks
from luffy.train.cli import main
from luffy.train.memory import count_parameters


def count(rank: int, name: str) -> tuple[int, int]:
    config = PRESETS[name]
    comm = Comm.create(build_mesh(torch.device("cpu")))
    model = build_model(config, Runtime.create(comm, get_recipe("vanilla_dedup"), config))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    experts = sum(size for n, size in sizes.items() if ".experts." in n and ".shared_experts." not in n)
    return sum(sizes.values()) - experts, experts


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("-tiny")])
def test_parameters_are_counted_to_a_few_percent(name):
    for counted, real in zip(count_parameters(PRESETS[name], 1), run_ranks(count, 1, name)[0], strict=True):
        assert counted == pytest.approx(real, rel=0.03)


def test_it_prints_versions_machine_links_and_models(capfd):
    main(["doctor", "--ranks", "2"])
    out = capfd.readouterr().out
    assert f"torch {torch.__version__}" in out and "MISSING" not in out
    topology = parse_topology(re.search(r"--topology (\S+)", out)[1])
    assert topology.world_size == 2 and topology.intra_node_bytes_per_second > 1e6
    assert re.search(r"moe-gpt2-tiny .* parameters, .* a rank before activations: fits", out)
    assert "luffy lab" in out
