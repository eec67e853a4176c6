"""Hugging Face transformers' expert-parallel exchange (`AllToAllEP`) and grouped experts in Luffy's transformer.

The same exchange as `hf_ep`, without what surrounds it there: router, auxiliary losses, attention, head and the
overlapped synchronisation of replicated gradients are Luffy's own code, the weights are those that Luffy begins with,
and FSDP is left out. Both compute the same function with the same losses, step by step (tests/peers/test_peer_runs.py),
so that what differs is the exchange alone: token-expert pairs, a collective for their counts, weights applied at home.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.peers.common import Peer, luffys_transformer
from benchmarks.peers.counting import ByteCounter
from luffy.comm import Comm
from luffy.config import ModelConfig
from luffy.data.batch import TokenBatch
from luffy.errors import UserError
from luffy.exchange.stage import Stage
from luffy.model.experts import GroupedExperts
from luffy.model.layers import activate
from luffy.model.moe_layer import MoELayer
from luffy.model.transformer import MicroBatch
from luffy.train.gradients import GradientSync, make_optimizer
from luffy.train.options import TrainOptions


class ExpertWeights(nn.Module):
    """The weights of Luffy's local experts under the names that transformers' `grouped_mm` looks for."""

    def __init__(self, config: Any, ours: GroupedExperts) -> None:
        super().__init__()
        self.num_experts = ours.num_local
        self.w_in, self.w_out, self.b_in, self.b_out = ours.w_in, ours.w_out, ours.b_in, ours.b_out
        self.activation, self.dtype = ours.activation, torch.float32

    @property
    def up_proj(self) -> Tensor:
        return self.w_in.to(self.dtype)

    @property
    def down_proj(self) -> Tensor:
        return self.w_out.to(self.dtype)

    @property
    def up_proj_bias(self) -> Tensor:
        return self.b_in.to(self.dtype)  # type: ignore[union-attr]

    @property
    def down_proj_bias(self) -> Tensor:
        return self.b_out.to(self.dtype)  # type: ignore[union-attr]

    def act_fn(self, x: Tensor) -> Tensor:
        return activate(x, self.activation)

    def forward(self, *_: Tensor) -> Tensor:
        raise NotImplementedError("transformers puts grouped_mm in this place")


class TransformersLayer(nn.Module):
    """Takes the place of a block's MoELayer, with that layer's router and experts."""

    def __init__(self, ours: MoELayer, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__()
        from transformers.distributed.expert_parallel import AllToAllEP
        from transformers.integrations import use_experts_implementation

        class Experts(ExpertWeights):
            """A class of its own, since the decorator changes it."""

        decorated: Any = use_experts_implementation(is_transposed=True, has_bias=True, has_gate=False)(Experts)
        self.recipe = ours.recipe  # the transformer asks it whether to look ahead
        self.router = ours.router
        self.experts = decorated(SimpleNamespace(_experts_implementation="grouped_mm"), ours.experts)
        self.exchange = AllToAllEP(self.experts, ep_mesh, tp_mesh)

    def prefetch(self, dtype: torch.dtype) -> None:
        """Nothing is fetched ahead."""

    def stages(self, batch: TokenBatch, norm: nn.Module, *_: Any) -> Stage[TokenBatch]:
        """As MoELayer's; it waits where it is, so it has no place to yield."""
        yield from ()
        normed = norm(batch.hidden)
        routing, stats = self.router(normed, batch.layout)
        self.experts.dtype = normed.dtype
        output = self.exchange(normed, routing.topk_expert_ids, routing.topk_weights)
        batch = replace(batch, router_stats=(*batch.router_stats, stats))
        return batch.with_hidden(batch.hidden + output.to(normed.dtype))


class HuggingFaceLayer(Peer):
    name = "hf_ep_layer"
    summary = "Hugging Face transformers' expert-parallel exchange in Luffy's transformer"
    package = "transformers"
    versions = ("5.23", "5.24")
    install = "pip install transformers==5.23.0"

    def __init__(
        self, options: TrainOptions, config: ModelConfig, comm: Comm, dtype: torch.dtype, counter: ByteCounter
    ) -> None:
        super().__init__(options, config, comm, dtype, counter)
        mesh = self.mesh
        alone = init_device_mesh(mesh.device.type, (mesh.world_size, 1), mesh_dim_names=("each", "tp"))["tp"]
        self.model: Any = luffys_transformer(options, config, comm, dtype)
        for block in self.model.blocks:
            if block.moe is not None:
                block.moe = TransformersLayer(block.moe, mesh.device_mesh["ep"], alone)
        self.optimizer = make_optimizer(self.model, options.lr, options.weight_decay, mesh.device.type == "cuda")
        self.sync = GradientSync(self.model, comm, options.get_gradient_dtype())

    @classmethod
    def check(cls, options: TrainOptions) -> None:
        config = options.model_config()
        if config.router.capacity_factor is not None:
            raise UserError(f"--capacity-factor: transformers drops no tokens; leave it out for --peer {cls.name}")
        if config.activation != "gelu" or not config.bias:
            raise UserError(f"--model {options.model}: --peer {cls.name} knows experts with GELU and biases (moe-gpt2)")

    def differs(self) -> dict[str, str]:
        return {
            "model": "none: the same transformer, router, weights, losses and function",
            "exchange": "token-expert pairs both ways, routing weights applied at home, a collective for the counts",
            "experts": "transformers' grouped_mm",
            "gradients": "Luffy's: DistributedDataParallel, overlapped with backward (FSDP2 is not used)",
        }

    def loss(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        output = self.sync(micro)
        return output.loss, output.token_loss

    def evaluation_loss(self, micro: MicroBatch) -> Tensor:
        return self.model(micro).token_loss

    def clip(self, max_norm: float) -> Tensor:
        self.sync.finish()
        return self.sync.clip(max_norm)
