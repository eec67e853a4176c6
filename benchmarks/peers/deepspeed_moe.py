"""DeepSpeed's MoE layer (`deepspeed.moe.layer.MoE`) in Luffy's transformer: the paper's "Vanilla".

Embedding, attention, norms, head, loss and the overlapped synchronisation of replicated gradients are Luffy's own code;
routing, exchange and the running of experts are DeepSpeed's. All weights are those that Luffy begins with, so without
dropping and without auxiliary losses both compute the same function, and their losses agree step by step
(tests/peers/test_peer_runs.py): what is compared is the exchange and nothing else.

DeepSpeed exchanges [experts, capacity, width] buffers of equal size. With dropping off, the capacity of a layer is the
largest number of tokens that any rank has for any expert (one integer all-reduce a layer), so padding travels too.
DeepSpeed's newer AutoEP, which exchanges pairs as transformers does (`hf_ep_layer`), knows gated experts only.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.common import Peer, luffys_transformer
from benchmarks.peers.counting import ByteCounter
from luffy.comm import Comm
from luffy.config import ModelConfig
from luffy.data.batch import TokenBatch
from luffy.errors import UserError
from luffy.exchange.stage import Stage
from luffy.model.layers import activate
from luffy.model.moe_layer import MoELayer
from luffy.model.transformer import MicroBatch, Transformer
from luffy.train.gradients import GradientSync, make_optimizer
from luffy.train.options import TrainOptions


def _import() -> Any:
    """DeepSpeed, made not to compile anything and not to talk."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Which of its operators could be compiled: none. It would run compilers to find out, and then build a shared-memory
    # all-reduce that goes past the links of a lab.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    return deepspeed, MoE


class Expert(nn.Module):
    """One feed-forward expert with Luffy's weights and activation; computes in its input's dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.expert_hidden_size
        width = 2 * F if config.activation == "swiglu" else F
        self.activation = config.activation
        self.w_in, self.w_out = nn.Parameter(torch.empty(D, width)), nn.Parameter(torch.empty(F, D))
        self.b_in = nn.Parameter(torch.empty(width)) if config.bias else None
        self.b_out = nn.Parameter(torch.empty(D)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(self._linear(x, self.w_in, self.b_in), self.activation)
        return self._linear(hidden, self.w_out, self.b_out)

    @staticmethod
    def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As one matrix product over rows, which for a single stacked matrix is the grouped GEMM."""
        rows = x.flatten(0, -2)
        y = rows @ weight.to(x.dtype) if bias is None else torch.addmm(bias.to(x.dtype), rows, weight.to(x.dtype))
        return y.unflatten(0, x.shape[:-1])


class DeepSpeedLayer(nn.Module):
    """Takes the place of a block's MoELayer, with that layer's weights."""

    def __init__(self, ours: MoELayer, config: ModelConfig, layer_class: Any, ep_size: int) -> None:
        super().__init__()
        self.recipe = ours.recipe  # the transformer asks it whether to look ahead
        factor = config.router.capacity_factor
        self.moe = layer_class(
            hidden_size=config.hidden_size,
            expert=Expert(config),
            num_experts=config.router.num_experts,
            ep_size=ep_size,
            k=config.router.top_k,
            capacity_factor=factor or 1.0,
            eval_capacity_factor=factor or 1.0,
            drop_tokens=factor is not None,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.aux: Tensor | None = None
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(ours.router.weight)
            for i, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
                for name, parameter in expert.named_parameters():
                    parameter.copy_(getattr(ours.experts, name)[i])

    def prefetch(self, dtype: torch.dtype) -> None:
        """Nothing is fetched ahead."""

    def stages(self, batch: TokenBatch, norm: nn.Module, *_: Any) -> Stage[TokenBatch]:
        """As MoELayer's; it waits where it is, so it has no place to yield."""
        yield from ()
        output, self.aux, _counts = self.moe(norm(batch.hidden))
        return batch.with_hidden(batch.hidden + output)


class DeepSpeedMoE(Peer):
    name = "deepspeed"
    summary = "DeepSpeed's MoE layer in Luffy's transformer"
    package = "deepspeed"
    versions = ("0.19.8", "0.20")
    install = "DS_BUILD_OPS=0 pip install deepspeed==0.19.8 --no-build-isolation setuptools wheel"

    def __init__(
        self, options: TrainOptions, config: ModelConfig, comm: Comm, dtype: torch.dtype, counter: ByteCounter
    ) -> None:
        super().__init__(options, config, comm, dtype, counter)
        deepspeed, layer_class = _import()
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
            model = luffys_transformer(options, config, comm, dtype)
            self.layers = [self._replace(model, i, layer_class) for i, b in enumerate(model.blocks) if b.moe]
        self.model = model
        self.optimizer = make_optimizer(model, options.lr, options.weight_decay, self.mesh.device.type == "cuda")
        self.sync = GradientSync(model, comm, options.get_gradient_dtype())

    @classmethod
    def check(cls, options: TrainOptions) -> None:
        config = options.model_config()
        if config.router.top_k > 1 and not config.router.normalize_topk:
            raise UserError(f"--model {options.model}: DeepSpeed's chosen weights sum to one; use a moe-gpt2 model")
        if config.router.capacity_factor is not None and options.sequence_mode != "fixed":
            # Capacity follows from a rank's own tokens, and its buffers must be as large as everybody's.
            raise UserError("--capacity-factor: DeepSpeed needs equally many tokens a rank; add --sequence-mode fixed")

    def _replace(self, model: Transformer, index: int, layer_class: Any) -> DeepSpeedLayer:
        block: Any = model.blocks[index]
        layer = DeepSpeedLayer(block.moe, self.config, layer_class, self.mesh.ep_size).to(self.mesh.device)
        layer.moe.set_deepspeed_parallelism()
        block.moe = layer
        return layer

    def differs(self) -> dict[str, str]:
        router, aux = self.config.router, "of its first choices (Switch's, top-1)"
        if router.top_k != 2:
            aux = "of its choices"
        factor = router.capacity_factor
        return {
            "model": "none: the same transformer, weights and function",
            "exchange": "[experts, capacity, width] buffers of equal size, padding included, routing weights applied "
            "at home",
            "dropping": "none; capacity is the fullest expert of any rank, padded up to"
            if factor is None
            else f"capacity factor {factor} over a rank's tokens, in token order (Luffy's is per sequence)",
            "experts": "one after another over padded rows, as this layer of DeepSpeed does it",
            "balance_loss": f"of each rank's own tokens, {aux}; Luffy's is over all tokens and choices",
            "z_loss": "none",
            "gradients": "Luffy's: DistributedDataParallel, overlapped with backward (DeepSpeed's engine is not used)",
        }

    def loss(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        output = self.sync(micro)
        share = micro.layout.num_tokens / max(micro.step_tokens, 1)
        balance = torch.stack([layer.aux for layer in self.layers]).sum()
        return output.loss + self.config.router.balance_loss * share * balance, output.token_loss

    def evaluation_loss(self, micro: MicroBatch) -> Tensor:
        return self.model(micro).token_loss

    def clip(self, max_norm: float) -> Tensor:
        self.sync.finish()
        return self.sync.clip(max_norm)
