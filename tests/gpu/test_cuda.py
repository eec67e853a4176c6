"""The same model on a GPU: one rank, and several ranks that share it over gloo, against float64 on the CPU.

The parent process never touches CUDA, so that ranks can be forked. All that a number of ranks does is one launch.
"""

import functools
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from luffy.comm import Comm, build_mesh
from luffy.config import PRESETS, model_preset
from luffy.data.loader import Sequence
from luffy.kernels.grouped import add_bias, grouped_product
from luffy.kernels.sort import sort_by_group
from luffy.model import Runtime, build_model, expert_parameters
from luffy.model.block import MoEBlock
from luffy.recipes import get_recipe
from luffy.testing import Outcome, run_together
from luffy.testing.launches import launches
from luffy.train.batching import gather_step, make_micro_batch
from luffy.train.rates import measure_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/dxg"), reason="no GPU"),
]
LENGTHS = [40, 7, 1, 33, 16, 16, 25, 3]


def _loss_and_gradients(device, dtype, preset, recipe, recompute=False):
    config = model_preset(preset).override(vocab_size=211, num_layers=2, num_experts=8, num_shared_experts=1)
    mesh = build_mesh(device)
    comm = Comm.create(mesh)
    model = build_model(config, Runtime.create(comm, get_recipe(recipe), config, recompute), dtype=dtype, seed=1)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 211, n + 1) for n in LENGTHS]
    share = len(tokens) // mesh.world_size
    mine = [Sequence(i, t[:-1], t[1:], False) for i, t in enumerate(tokens)][mesh.rank * share :][:share]
    micro = make_micro_batch(mine, 0, gather_step([mine], comm), comm)
    output = model(micro)
    output.loss.backward()
    loss = output.loss.detach().double()
    dist.all_reduce(loss)
    gradients, experts = {}, expert_parameters(model)
    for name, p in model.named_parameters():
        grad = p.grad.double()
        if name in experts:
            parts = [torch.empty_like(grad) for _ in range(mesh.world_size)]
            dist.all_gather(parts, grad)
            grad = torch.cat(parts)
        else:
            dist.all_reduce(grad)
        gradients[name] = grad.cpu().numpy()
    return float(loss), gradients


def _compare(rank, preset):
    exact_loss, exact = _loss_and_gradients(torch.device("cpu"), torch.float64, preset, "vanilla_dedup")
    gpu = torch.device("cuda", 0)
    torch.cuda.set_device(gpu)
    report = []
    # bfloat16 rounds scores, so a choice between two nearly equal experts can fall the other way: whole rows of the
    # gradient then differ, in a model this small visibly. float32 shows that the function is the same.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.12)):
        for recipe, recompute in (("vanilla", False), ("vanilla_dedup", True), ("netmoe", True)):
            loss, gradients = _loss_and_gradients(gpu, dtype, preset, recipe, recompute)
            whole = np.sqrt(sum((g**2).sum() for g in exact.values()))
            off = np.sqrt(sum(((gradients[n] - exact[n]) ** 2).sum() for n in exact)) / whole
            report.append((str(dtype), recipe, abs(loss - exact_loss) / exact_loss, off))
            assert abs(loss - exact_loss) / exact_loss < tolerance / 4, report
            assert off < tolerance, report
    return report


def _ragged_groups(rank):
    gpu = torch.device("cuda", 0)
    torch.manual_seed(0)
    for counts in ([0, 1, 0, 5], [3, 129, 64, 7], [0, 0, 0, 1], [17, 0, 255, 1]):
        x = torch.randn(sum(counts), 64, device=gpu, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(4, 64, 96, device=gpu, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(4, 96, device=gpu, requires_grad=True)
        ids = torch.arange(4, device=gpu).repeat_interleave(torch.tensor(counts, device=gpu))[:, None]
        pairs = sort_by_group(ids, 4)
        got = add_bias(grouped_product(x, w, pairs), bias, pairs)
        seed = torch.randn_like(got)
        got.backward(seed)
        exact_x, exact_w, exact_b = (t.detach().double().requires_grad_() for t in (x, w, bias))
        groups = exact_x.split(counts)
        want = torch.cat([g @ m + b for g, m, b in zip(groups, exact_w, exact_b, strict=True)])
        want.backward(seed.double())
        for a, b in ((got, want), (x.grad, exact_x.grad), (w.grad, exact_w.grad), (bias.grad, exact_b.grad)):
            assert torch.isfinite(a).all(), counts
            assert (a.double() - b).norm() <= 1e-2 * b.norm(), counts
        idle = [i for i, n in enumerate(counts) if n == 0]
        assert not w.grad[idle].any() and not bias.grad[idle].any()
    return True


def _rate(rank):
    gpu = torch.device("cuda", 0)
    torch.cuda.set_device(gpu)
    config = model_preset("moe-gpt2-tiny")
    comm = Comm.create(build_mesh(gpu))
    model = build_model(config, Runtime.create(comm, get_recipe("fastermoe"), config), dtype=torch.bfloat16)
    return measure_experts(model.moe_layers[0].experts, 4096, torch.bfloat16, comm)


TINY = [p for p in PRESETS if p.endswith("tiny")]


@functools.cache
def _outcomes(world: int) -> dict[str, Outcome]:
    alone = {
        "ragged groups": (_ragged_groups,), "rate": (_rate,), "layer repeats": (_layer_repeats,),
        "launches": (_launches_of_a_layer,), "kernels": (_layer_kernels,),
    } if world == 1 else {}  # fmt: skip
    return run_together(alone | {preset: (_compare, preset) for preset in TINY}, world, case_seconds=300)


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("world", [1, 4])
def test_loss_and_gradients_agree_with_float64_on_the_cpu(preset, world):
    print(_outcomes(world)[preset].get()[0])


def test_grouped_products_of_ragged_and_empty_groups_with_gradients():
    assert _outcomes(1)["ragged groups"].get() == [True]


def test_the_rate_of_experts_can_be_measured():
    assert 1e9 < _outcomes(1)["rate"].get()[0] < 1e16


def _layer_repeats(rank):
    """bfloat16 rows through a block twice, forward and backward, with dropped choices and without."""
    gpu = torch.device("cuda", 0)
    torch.cuda.set_device(gpu)
    mesh = build_mesh(gpu)
    for settings in ({}, {"capacity_factor": 1.0}, {"activation": "gelu", "bias": True}):
        block = MoEBlock(256, 96, 16, 4, mesh=mesh, **settings)
        block.moe.experts.bfloat16()
        x = torch.randn(4, 300, 256, device=gpu, dtype=torch.bfloat16, requires_grad=True)
        upstream, runs = torch.randn_like(x), []
        for _ in range(3):
            block.zero_grad(set_to_none=True)
            x.grad = None
            y = block(x)
            y.backward(upstream)
            runs.append([y, x.grad, *(p.grad for p in block.parameters())])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True)), settings
        assert all(bool(t.isfinite().all()) for t in runs[0]), settings
    return True


def _launches_of_a_layer(rank):
    gpu = torch.device("cuda", 0)
    torch.cuda.set_device(gpu)
    block = MoEBlock(256, 96, 16, 4, mesh=build_mesh(gpu))
    block.moe.experts.bfloat16()
    x = torch.randn(4, 300, 256, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)

    def both():
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).backward(upstream)

    both()
    return {name: count for name, (count, _) in launches(both).items()}


def _layer_kernels(rank):
    from tests.kernels.layered import CASES, LARGE, check_activation, check_rows, check_sort

    torch.cuda.set_device(0)
    both = (torch.float32, torch.bfloat16)
    check_sort("cuda")
    check_rows("cuda", both, (24, 1100), CASES + LARGE)
    check_activation("cuda", both, (24, 300), CASES + LARGE)
    return True


def test_the_kernels_of_a_layer_agree_with_their_references():
    assert _outcomes(1)["kernels"].get() == [True]


def test_a_layer_repeats_itself_to_the_bit():
    assert _outcomes(1)["layer repeats"].get() == [True]


def test_a_layer_alone_is_fewer_than_sixty_launches():
    found = _outcomes(1)["launches"].get()[0]
    assert found, "the profiler sees no kernels on this machine: launches cannot be counted"
    assert sum(found.values()) < 60, found
