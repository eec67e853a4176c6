"""One MoE layer on one GPU: Luffy's beside transformers' grouped experts and Liger's fused ones.

    python benchmarks/moe_layer.py --out docs/results/moe_layer.json

Each computes x + experts(norm(x)), router included, in bfloat16 on the same random weights; their answers are compared.
Reported: milliseconds forward, and forward and backward (medians, by device events), peak memory beyond weights, input
and upstream gradient (the gradients of weights count), launches of both passes, and the share of the rate of a grouped
product that both passes come to. `luffy_masters` keeps float32 weights, cast once a step; the others hold bfloat16.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from luffy.comm import build_mesh
from luffy.kernels.sort import sort_by_group
from luffy.model.block import MoEBlock
from luffy.testing.launches import launches

try:
    from liger_kernel.ops import LigerFusedMoEFunction
except ImportError:
    LigerFusedMoEFunction = None


class Shape(NamedTuple):
    hidden: int
    expert: int
    num_experts: int
    top_k: int
    tokens: int


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8, 32768),
    "olmoe": Shape(2048, 1024, 64, 8, 32768),
    "mixtral": Shape(4096, 14336, 8, 2, 8192),
    "qwen3_4k": Shape(2048, 768, 128, 8, 4096),
}


class Luffy(MoEBlock):
    """On weights of its own; nothing is drawn on the host, which would take longer than the benchmark."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.to("cuda")
        torch.manual_seed(0)
        for p in self.parameters():
            p.normal_(std=p.shape[-2] ** -0.5) if p.dim() == 3 else p.normal_(std=p.shape[-1] ** -0.5)
        self.norm.weight.fill_(1.0)

    def gradients(self) -> list[Tensor | None]:
        return [self.moe.experts.w_in.grad.transpose(1, 2), self.moe.router.weight.grad]


def luffy(shape: Shape, masters: bool) -> Luffy:
    mesh = build_mesh(torch.device("cuda", 0))
    with torch.device("cuda"):
        block = Luffy(shape.hidden, shape.expert, shape.num_experts, shape.top_k, mesh=mesh)
    if not masters:
        block.moe.experts.bfloat16()
    return block


class Other(nn.Module):
    """transformers' block with its norm and the residual, Luffy's weights in it. liger: Liger's experts."""

    def __init__(self, shape: Shape, ours: Luffy, liger: bool) -> None:
        super().__init__()
        from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

        config = configuration_qwen3_moe.Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.expert, num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k, norm_topk_prob=ours.config.router.normalize_topk, hidden_act="silu",
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.norm = modeling_qwen3_moe.Qwen3MoeRMSNorm(shape.hidden, eps=ours.config.norm_eps)
            self.block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
        self.to_empty(device="cuda").bfloat16()
        experts = ours.moe.experts
        with torch.no_grad():
            self.norm.weight.fill_(1.0)
            self.block.gate.weight.copy_(ours.moe.router.weight)
            self.block.experts.gate_up_proj.copy_(experts.w_in.transpose(1, 2))
            self.block.experts.down_proj.copy_(experts.w_out.transpose(1, 2))
        if liger:
            self.block.experts.forward = self.by_liger

    def by_liger(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts = self.block.experts
        return LigerFusedMoEFunction.apply(x, experts.gate_up_proj, experts.down_proj, ids.to(torch.int32), weights)

    def gradients(self) -> list[Tensor | None]:
        return [self.block.experts.gate_up_proj.grad, self.block.gate.weight.grad]

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


def milliseconds(action: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        action()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def grouped_rate(shape: Shape) -> float:
    """Operations per second of one grouped product, the first of an expert, experts evenly chosen."""
    P = shape.tokens * shape.top_k
    ids = torch.arange(P, device="cuda")[:, None] % shape.num_experts
    x = torch.randn(P, shape.hidden, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(shape.num_experts, shape.hidden, 2 * shape.expert, device="cuda", dtype=torch.bfloat16)
    ends = sort_by_group(ids, shape.num_experts).ends
    ms = milliseconds(lambda: F.grouped_mm(x, w, offs=ends))
    return 4.0 * P * shape.hidden * shape.expert / ms * 1e3


def measure(module: Any, shape: Shape, rate: float) -> tuple[dict[str, Any], list[Tensor]]:
    """The numbers, and what was computed: output, gradients of input, first matrices and router."""
    g = torch.Generator(device="cuda").manual_seed(1)
    size = (8, shape.tokens // 8, shape.hidden)
    x = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
    upstream = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=g)

    def both() -> Tensor:
        module.zero_grad(set_to_none=True)
        x.grad = None
        y = module(x)
        y.backward(upstream)
        return y

    def forward() -> None:
        with torch.no_grad():
            module(x)

    out = [both().detach().clone(), x.grad.clone(), *(g.bfloat16() for g in module.gradients())]
    again = [both().detach(), x.grad, *(g.bfloat16() for g in module.gradients())]
    repeats = all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    del again
    module.zero_grad(set_to_none=True)
    x.grad = None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - held
    found = launches(both)
    ms = milliseconds(both)
    operations = 18.0 * shape.tokens * shape.top_k * shape.hidden * shape.expert
    by_time = sorted(((n, c, t / 1e3) for n, (c, t) in found.items()), key=lambda r: -r[2])
    return {
        "forward_ms": milliseconds(forward), "both_ms": ms, "peak_gb": peak / 1e9,
        "launches": sum(c for c, _ in found.values()), "device_ms": sum(t for _, t in found.values()) / 1e3,
        "share_of_grouped_rate": operations / (ms / 1e3) / rate, "repeats_to_the_bit": repeats, "kernels": by_time,
    }, out  # fmt: skip


def contestants(shape: Shape) -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {
        "luffy": lambda: luffy(shape, False),
        "luffy_masters": lambda: luffy(shape, True),
        "transformers": lambda: Other(shape, luffy(shape, False), False),
    }
    if LigerFusedMoEFunction is not None:
        found["liger"] = lambda: Other(shape, luffy(shape, False), True)
    return found


@click.command()
@click.option("--shapes", default=",".join(SHAPES), help="Which of the shapes.")
@click.option("--only", default="", help="Which layers; all that are installed if not said.")
@click.option("--kernels", default=0, help="Print so many of the longest kernels of each layer.")
@click.option("--out", default=None, type=click.Path(path_type=Path))
def main(shapes: str, only: str, kernels: int, out: Path | None) -> None:
    """Measure each layer in each shape, print a table, write JSON."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[dict[str, Any]] = []
    for name in shapes.split(","):
        shape = SHAPES[name]
        rate = grouped_rate(shape)
        click.echo(f"{name} {tuple(shape)}: grouped product {rate / 1e12:.0f} TFLOP/s")
        exact: list[Tensor] = []
        for layer, build in contestants(shape).items():
            if only and layer not in only.split(","):
                continue
            torch.cuda.empty_cache()
            try:
                row, outputs = measure(build(), shape, rate)
            except Exception as error:  # one that cannot must not hide the others
                click.echo(f"  {layer}: {type(error).__name__}: {str(error)[:600]}")
                continue
            exact = exact or outputs
            off = [
                float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(outputs, exact, strict=True)
            ]
            r = SimpleNamespace(**row)
            click.echo(
                f"  {layer:<14} forward {r.forward_ms:6.2f} ms, both {r.both_ms:6.2f} ms, peak {r.peak_gb:5.2f} GB, "
                f"{r.launches:3d} launches of {r.device_ms:6.2f} ms, {r.share_of_grouped_rate:.2f} of its rate, "
                f"off {' '.join(format(o, '.0e') for o in off)}, {'repeats' if r.repeats_to_the_bit else 'differs'}"
            )
            for kernel, count, spent in r.kernels[:kernels]:
                click.echo(f"    {spent:7.3f} ms {count:3d} {kernel[:110]}")
            rows.append({"shape": name, "layer": layer, "grouped_rate": rate, "off": off, **row})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
