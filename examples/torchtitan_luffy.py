"""Luffy's exchange in torchtitan, on CPUs, so that it can be tried anywhere.

    torchrun --nproc-per-node 2 examples/torchtitan_luffy.py                                  # torchtitan as it is
    torchrun --nproc-per-node 2 examples/torchtitan_luffy.py --override luffy.titan.exchange  # with Luffy's exchange
    torchrun --nproc-per-node 2 examples/torchtitan_luffy.py --override luffy.titan.exchange luffy.titan.seats

On GPUs nothing of this file is needed: give torchtitan's own command the same overrides (docs/torchtitan.md).
torchtitan's Trainer asks for an accelerator. Here a plain loop calls what the Trainer calls, in its order: the debug
config, overrides, model, expert parallelism, FSDP2, activation checkpointing, optimizer, load balancing, clipping.
What a CPU needs otherwise is in `on_a_cpu` and `sum_over_gloo`.
"""

from __future__ import annotations

import argparse
import email
import encodings
import inspect
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.distributed.parallel_dims as parallel_dims_of_titan
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import override
from torchtitan.config.override import apply_overrides, derive, parse_cli_imports
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as titan
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.common.moe import GroupedExperts

MODELS = {
    "deepseek_v3": "torchtitan.models.deepseek_v3.config_registry:deepseek_v3_debugmodel",
    "qwen3": "torchtitan.models.qwen3.config_registry:qwen3_moe_debug",
}
CHECKPOINTING = {"selective": SelectiveAC.Config, "full": FullAC.Config, "none": lambda: None}


class BytesLoader(BaseDataLoader):
    """Bytes of Python's standard library: programs and tables of characters by turns, other ones on each rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        folders = [Path(inspect.getfile(package)).parent for package in (email, encodings)]
        texts = [b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))) for folder in folders]
        self.texts = [torch.tensor(list(text)) for text in texts]
        self.length, self.batch = seq_len, local_batch_size
        self.rank, self.ranks, self.count = dp_rank, dp_world_size, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        positions = torch.arange(self.length).expand(self.batch, -1).contiguous()
        while True:
            order = torch.Generator().manual_seed(self.count * self.ranks + self.rank)
            self.count += 1
            rows = []
            for i in range(self.batch):
                text = self.texts[i % len(self.texts)]
                start = int(torch.randint(0, len(text) - self.length - 1, (), generator=order))
                rows.append(text[start : start + self.length + 1])
            ids = torch.stack(rows)
            yield {"input": ids[:, :-1].contiguous(), "positions": positions.clone()}, ids[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


@override(target=FlexAttention.Config, description="CPUs have no backward pass of FlexAttention.")
def plain_attention(cfg: FlexAttention.Config) -> ScaledDotProductAttention.Config:
    return derive(cfg, ScaledDotProductAttention.Config)


def on_a_cpu(
    model: str, overrides: list[Any], *, checkpointing: str = "selective", ep_size: int | None = None, tp_size: int = 1,
    layers: int = 3,
) -> Any:  # fmt: skip
    """torchtitan's debug config of `model`, small and in float32, for all ranks of this world."""
    parallel_dims_of_titan.device_type = "cpu"  # torchtitan takes CUDA for granted
    module, function = MODELS[model].split(":")
    config = getattr(import_module(module), function)()
    shape = config.model_spec.model
    del shape.layers[layers:]
    for _, experts, _, _ in shape.traverse(GroupedExperts.Config):
        experts.hidden_dim = 128
    config.training.seq_len, config.training.local_batch_size = 128, 4
    config.training.dtype = config.training.mixed_precision_param = "float32"
    config.dataloader = BytesLoader.Config()
    config.activation_checkpoint = CHECKPOINTING[checkpointing]()
    config.parallelism.expert_parallel_degree = ep_size or dist.get_world_size()
    config.parallelism.tensor_parallel_degree = tp_size
    config.parallelism.spmd_backend = "partial_dtensor"  # the others ask more of FSDP2 than torch 2.13 has
    config.override.imports = [f"{__name__}.plain_attention", *overrides]
    return config


def sum_over_gloo(model: torch.nn.Module) -> None:
    """gloo cannot scale a sum on its way, as FSDP2 asks of NCCL."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


class Loop:
    """What torchtitan's Trainer does with a config, without its Trainer."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config, spec = config, config.model_spec
        self.dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
        self.dims.build_mesh()
        titan.set_spmd_backend(config.parallelism.spmd_backend)
        torch.manual_seed(seed)
        spec.model.update_from_config(config=config)
        apply_overrides(config.override, config)
        with torch.device("meta"):
            model = spec.model.build()
        self.loss_fn = config.loss.build(compile_config=config.compile)
        self.model = spec.parallelize_fn(
            model, parallel_dims=self.dims, training=config.training, parallelism=config.parallelism,
            compile_config=config.compile, ac_config=config.activation_checkpoint, dump_folder=config.dump_folder,
        )  # fmt: skip
        self.model.to_empty(device="cpu")
        with torch.no_grad():
            self.model.init_weights(buffer_device=None)
        self.model.train()
        sum_over_gloo(self.model)
        self.loss_fn.set_lm_head(self.model.lm_head)
        self.model._skip_lm_head = True
        self.optimizers = config.optimizer.build(model_parts=[self.model])
        spec.post_optimizer_build_fn(self.optimizers, [self.model], self.dims)
        batch = self.dims.get_optional_mesh("batch")  # None where all ranks share one
        self.num_batches, own = (1, 0) if batch is None else (batch.size(), batch.get_local_rank())
        self.loader = config.dataloader.build(
            dp_world_size=self.num_batches, dp_rank=own, tokenizer=None, seq_len=config.training.seq_len,
            local_batch_size=config.training.local_batch_size,
        )  # fmt: skip
        self.batches = iter(self.loader)
        self.context = titan.get_spmd_context(parallel_dims=self.dims)

    def gradients(self) -> Tensor:
        """Forward and backward of the next batch: the mean loss over the labels of all ranks, []."""
        inputs, labels = next(self.batches)
        count = torch.tensor(labels.numel() * self.num_batches)
        with self.context():
            hidden = self.model(inputs["input"], positions=inputs["positions"])
            loss, _ = self.loss_fn(hidden, labels, count)
            loss.backward()
        total = loss.full_tensor().detach() if isinstance(loss, DTensor) else loss.detach().clone()
        dist.all_reduce(total)
        return total * self.num_batches / dist.get_world_size()

    def step(self) -> float:
        """One optimizer step; its loss."""
        self.optimizers.zero_grad()
        loss = self.gradients()
        titan.clip_grad_norm_(
            list(self.model.parameters()), self.config.training.max_norm, foreach=True, ep_enabled=self.dims.ep_enabled
        )
        self.optimizers.step()
        return float(loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen3", choices=sorted(MODELS))
    parser.add_argument("--override", nargs="*", default=[], help="such as luffy.titan.exchange luffy.titan.seats")
    parser.add_argument("--checkpointing", default="selective", choices=sorted(CHECKPOINTING))
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    dist.init_process_group("gloo")
    overrides = parse_cli_imports(args.override)
    loop = Loop(on_a_cpu(args.model, overrides, checkpointing=args.checkpointing))
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        loss = loop.step()
        record = {"step": step, "loss": loss, "seconds": round(time.perf_counter() - begin, 3)}
        if any("luffy.titan.exchange" in str(name) for name in args.override):
            import luffy.titan

            record |= {k: round(v, 3) for k, v in luffy.titan.metrics().items() if k in ("bytes_sent", "rows_home")}
        if dist.get_rank() == 0:
            print(json.dumps(record), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
