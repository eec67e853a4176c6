"""Hugging Face transformers' native expert parallelism: a Mixtral of the same shape.

    from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N, ep_size=N, ep_implementation="all_to_all"),
                    experts_implementation="grouped_mm")

Its exchange sends every (token, expert) pair to the expert's rank and every pair's output back, without padding or
dropping, and weighs them at home. Everything else is sharded by FSDP2, as its expert parallelism demands.

Mixtral has rotary positions, RMSNorm, SwiGLU and no biases. Three things are set so that it is as strong and as equal
as can be: experts are 2/3 as wide (three matrices instead of two: the same operations), attention runs in Luffy's own
packed form (no padding, no dense mask), and blocks stay gathered between forward and backward, so that synchronisation
moves no more than an all-reduce does. (Where gloo carries it, it is not hidden behind computation: FSDP2 waits for
gloo.)
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from benchmarks.peers.common import Peer
from benchmarks.peers.counting import ByteCounter
from benchmarks.peers.reduce_scatter import sum_over_gloo
from luffy.comm import Comm
from luffy.config import ModelConfig
from luffy.data.batch import Layout
from luffy.errors import UserError
from luffy.model.attention import Attention
from luffy.model.transformer import IGNORE_INDEX, MicroBatch
from luffy.train.gradients import decays
from luffy.train.options import TrainOptions

ATTENTION = "luffy_packed"


def expert_hidden_size(config: ModelConfig) -> int:
    """Inner width of a SwiGLU expert that computes as much as Luffy's: 2/3 of a GELU expert's, in steps of 8.

    Grouped products want rows of 16 bytes, so the width is rounded, to the nearest step.
    """
    if config.activation == "swiglu":
        return config.expert_hidden_size
    return max(8, 8 * round(config.expert_hidden_size * 2 / 3 / 8))


class PackedAttention:
    """Luffy's attention over packed sequences as an attention function of transformers; `layout` is the batch's."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):  # for its way to attend, not for its weights
            self._attention = Attention(config.override(position="learned"))
        self.layout: Layout | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: [1, H, T, hd] -> [1, T, H, hd]."""
        assert self.layout is not None and mask is None
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
        return self._attention._packed(q, k, v, self.layout).unsqueeze(0), None


@contextlib.contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """transformers takes the GPU of number LOCAL_RANK, of which there is none where ranks share one."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _distributable(model_class: Any) -> Any:
    """`model_class`, its weights tied before it is sharded, and not only once they are loaded.

    Otherwise FSDP2 takes a tied head for a parameter of its own, and gathers and reduces the embedding twice a step.
    """

    class Distributable(model_class):  # type: ignore[misc]
        __module__ = model_class.__module__  # whose source tells transformers what the model can do
        _fsdp_plan = {}  # noqa: RUF012  (the head belongs to the root, as the embedding does)

        @classmethod
        def maybe_distribute_model(cls, model: Any, *args: Any) -> Any:
            model.tie_weights()
            return super().maybe_distribute_model(model, *args)

    return Distributable


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


class HuggingFaceEP(Peer):
    name = "hf_ep"
    summary = "Hugging Face transformers, native expert parallelism, Mixtral of the same shape"
    package = "transformers"
    versions = ("5.23", "5.24")
    install = "pip install transformers==5.23.0"

    def __init__(
        self, options: TrainOptions, config: ModelConfig, comm: Comm, dtype: torch.dtype, counter: ByteCounter
    ) -> None:
        super().__init__(options, config, comm, dtype, counter)
        if self.mesh.device.type == "cpu" and torch.cuda.is_available():
            raise UserError("--device cpu: transformers takes a GPU where it sees one; set CUDA_VISIBLE_DEVICES= too")
        self.attention = PackedAttention(config)
        self.model = self._build()
        self._parameters = dict(self.model.named_parameters())
        # The optimizer works on each rank's own shards: AdamW knows no difference, and DTensor's dispatch is saved.
        self._shards = {n: nn.Parameter(_local(p.data)) for n, p in self._parameters.items()}
        heavy = [s for n, s in self._shards.items() if decays(n, s)]
        light = [s for n, s in self._shards.items() if not decays(n, s)]
        self.optimizer = torch.optim.AdamW(
            [{"params": heavy, "weight_decay": options.weight_decay}, {"params": light, "weight_decay": 0.0}],
            lr=options.lr,
            betas=(0.9, 0.95),
            fused=self.mesh.device.type == "cuda",
        )

    @classmethod
    def check(cls, options: TrainOptions) -> None:
        config = options.model_config()
        if config.router.capacity_factor is not None:
            raise UserError("--capacity-factor: transformers drops no tokens; leave it out for --peer hf_ep")
        if not config.router.normalize_topk or config.qk_norm or config.position == "relative":
            raise UserError(f"--model {options.model} has no Mixtral of its shape; use moe-gpt2 or moe-gpt2-tiny")
        if options.get_gradient_dtype() != "model":
            raise UserError("--gradient-dtype: FSDP2 reduces this model's gradients in float32; leave it out")
        if options.start_weights is not None:
            raise UserError("--start-weights holds Luffy's model, and this is a Mixtral; use --peer hf_ep_layer")
        if options.dtype == "float64":
            raise UserError("--dtype float64: Mixtral's router works in float32; use float32 or bfloat16")

    # ---------------------------------------------------------------- the model

    def _mixtral_config(self) -> Any:
        from transformers import MixtralConfig

        c = self.config
        return MixtralConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=expert_hidden_size(c),
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_heads,
            max_position_embeddings=c.max_sequence_length,
            initializer_range=c.init_std,
            rms_norm_eps=c.norm_eps,
            use_cache=False,
            tie_word_embeddings=c.tie_embeddings,
            num_experts_per_tok=c.router.top_k,
            num_local_experts=c.router.num_experts,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        )

    def _build(self) -> nn.Module:
        """Rank 0 draws the weights and writes them down; every rank reads its shards of them."""
        from transformers import AttentionInterface, MixtralForCausalLM
        from transformers.distributed import DistributedConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        AttentionInterface.register(ATTENTION, self.attention)
        folder = Path(self.options.out) / "initial-weights"
        if self.mesh.rank == 0:
            self._draw(MixtralForCausalLM).save_pretrained(folder)
        dist.barrier()
        ranks = self.mesh.world_size
        config = self._mixtral_config()
        # Blocks are gathered once a step; the root, which is always kept, holds embedding, last norm and head.
        config.base_model_fsdp_plan = {"layers.*": "keep_full_weight"}
        settings = DistributedConfig(
            fsdp_size=ranks,
            ep_size=ranks,
            ep_implementation="all_to_all",
            fsdp_mixed_precision=self.dtype == torch.bfloat16,
        )
        with _local_rank(self.mesh.device):
            model = _distributable(MixtralForCausalLM).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,  # master weights, as Luffy keeps them
                attn_implementation=ATTENTION,
                experts_implementation="grouped_mm",
                **({"distributed_config": settings} if ranks > 1 else {}),
            )
        if ranks == 1:
            model = model.to(self.mesh.device)
        elif dist.get_backend() == "gloo":
            sum_over_gloo(model, self.counter)
        dist.barrier()
        if self.mesh.rank == 0:
            shutil.rmtree(folder)
        return model.train()

    def _draw(self, model_class: Any) -> nn.Module:
        """Normal weights; projections into the stream scaled by 1/sqrt(2 layers), as Luffy draws them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            model = model_class(self._mixtral_config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj")):
                    parameter.mul_((2 * self.config.num_layers) ** -0.5)
        return model

    def differs(self) -> dict[str, str]:
        c = self.config
        width = expert_hidden_size(c)
        return {
            "model": "Mixtral: rotary positions, RMSNorm, SwiGLU, no biases, separate q, k, v",
            "experts": f"SwiGLU of width {width} (three matrices) for GELU of width {c.expert_hidden_size} (two): "
            f"{1.5 * width / c.expert_hidden_size:.3f} x the operations; grouped_mm",
            "weights": "drawn from the same distributions with torch's generator, so not the same numbers",
            "router": "computed in the stream's dtype (Luffy's in float32)",
            "exchange": "token-expert pairs both ways, routing weights applied at home",
            "attention": "Luffy's packed attention, as an attention function of transformers",
            "balance_loss": "of each rank's own tokens, over all layers at once; scaled to the same weight",
            "z_loss": "none",
            "gradients": "FSDP2 over all ranks: weights gathered once a step"
            + (" in bfloat16" if self.dtype == torch.bfloat16 else "")
            + ", gradients reduce-scattered in float32, the optimizer's work divided among the ranks; over gloo "
            "nothing of it is hidden behind computation",
        }

    # ---------------------------------------------------------------- a step

    def loss(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        self.attention.layout = micro.layout
        training = torch.is_grad_enabled()
        output = self.model(
            input_ids=micro.tokens[None], position_ids=micro.layout.positions[None], output_router_logits=training
        )
        summed = F.cross_entropy(output.logits[0].float(), micro.labels, ignore_index=IGNORE_INDEX, reduction="sum")
        token_loss = summed / max(micro.step_labels, 1)
        if not training:
            return token_loss, token_loss
        router = self.config.router
        # Theirs is k where experts are used evenly, a mean over layers; ours 1 for each layer.
        weight = router.balance_loss * self.config.num_layers / router.top_k
        share = micro.layout.num_tokens / max(micro.step_tokens, 1)
        loss = token_loss + weight * share * output.aux_loss
        return loss * self.mesh.world_size, token_loss.detach()  # FSDP2 averages over ranks

    def end_evaluation(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def clip(self, max_norm: float) -> Tensor:
        grads = []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} received no gradient")
            self._shards[name].grad = _local(parameter.grad)
            grads.append(self._shards[name].grad)
            parameter.grad = None
        squares = torch.stack(torch._foreach_norm(grads)).square().sum()
        norm = self.comm.all_reduce(squares).sqrt()  # no two ranks hold the same element
        if max_norm > 0:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
