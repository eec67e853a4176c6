"""Hugging Face models on GPUs: against float64 on the CPU, and sharded dense weights against replicated ones.

The parent process never touches CUDA, so that ranks can be forked; all that two ranks on one GPU do is one launch.
"""

import os

import pytest
import torch

pytest.importorskip("transformers")

from hf.tiny import collate, random_rows, tiny_config, tiny_model, wide

from luffy.comm import build_mesh
from luffy.hf import parallelize
from luffy.lab.gpus import count_gpus
from luffy.recipes import get_recipe
from luffy.testing import gather_full, run_ranks, run_together
from tests.hf import test_dense as dense

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/dxg"), reason="no GPU"),
]


def loss_and_gradients(device, family, weights, stream, padded):
    config = tiny_config(family)
    model = tiny_model(config).to(weights)
    if family != "gpt_oss":  # whose sinks the fused kernel does not know
        config._attn_implementation = "sdpa"
    parallel = parallelize(model, build_mesh(device), "luffy", stream_dtype=stream)
    rank = parallel.runtime.comm.mesh.rank
    rows = random_rows(4, 8, 30)[4 * rank : 4 * rank + 4]
    output = parallel(parallel.batch(**collate(rows, "right"), padded=padded))
    output.loss.backward()
    loss = parallel.runtime.comm.all_reduce(output.loss.detach().clone())
    return float(loss), {n: g.double().cpu() for n, g in gather_full(parallel, "grad").items()}


def compare(rank, device_name, family):
    """Errors of the loss and of the worst gradient, in float32 and with rows in bfloat16."""
    with wide():
        exact, gradients = loss_and_gradients(torch.device("cpu"), family, torch.float64, None, padded=False)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report = {}
    for padded in (False, True):
        for stream in (torch.float32, torch.bfloat16):
            loss, found = loss_and_gradients(device, family, torch.float32, stream, padded)
            error = max(float((found[n] - g).norm() / g.norm().clamp_min(1e-9)) for n, g in gradients.items())
            report[padded, str(stream)] = abs(loss / exact - 1), error
    return report


SHARDED = [
    dense.Case("deepseek_v3", get_recipe("luffy"), recompute=True),
    dense.Case("qwen2_moe", dense.RANDOM, tied=True),
]
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def outcomes():
    cases = {family: (compare, "cuda:0", family) for family in FAMILIES}
    return run_together(cases | {"sharded": (dense.compare, SHARDED, "cuda:0")}, 2, case_seconds=300)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_what_a_cpu_does(family, outcomes):
    for (padded, stream), (loss_error, gradient_error) in outcomes[family].get()[0].items():
        about = f"{stream}, padded={padded}"
        if stream == "torch.float32":
            assert loss_error < 1e-5 and gradient_error < 1e-3, about
        else:
            # A token that chooses another expert by a hair changes gradients a lot, and the loss little.
            assert loss_error < 0.02, about


def test_sharded_dense_weights_on_a_gpu_that_two_ranks_share(outcomes):
    """FSDP's streams, and gloo's copies from and to the device."""
    for shares in outcomes["sharded"].get()[0]:
        dense.check_memory(shares, 2)


@pytest.mark.multigpu
@pytest.mark.skipif(count_gpus() < 2, reason="needs two GPUs")
def test_sharded_dense_weights_with_a_gpu_a_rank():
    for shares in run_ranks(dense.compare, 2, SHARDED, "cuda", backend="nccl")[0]:
        dense.check_memory(shares, 2)
