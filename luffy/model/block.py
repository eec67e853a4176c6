"""MoEBlock: Luffy's MoE layer for a model of your own.

    x = block(x)            [B, S, D] -> [B, S, D]: x plus what its experts say; every row stays where it is
    batch = block(batch)    TokenBatch -> TokenBatch: sequences may move, where the recipe moves any
    block = MoEBlock.from_module(module, mesh)      takes the place of an existing MoE module, with its weights

Of its own it brings a norm and adds the residual, because what travels is the stream itself (luffy.model.moe_layer); in
the place of a module that has neither it has neither.
Sequences that move take along only what is in the TokenBatch; so with tensors, which say nothing of sequences
elsewhere, recipes that move them are refused.
"""

from __future__ import annotations

import hashlib
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from luffy.comm import Comm, Mesh
from luffy.compose import Runtime
from luffy.config import ModelConfig, RouterConfig
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.errors import UserError
from luffy.model.aux_loss import auxiliary_loss
from luffy.model.build import moe_layer
from luffy.model.experts import GroupedExperts
from luffy.model.layers import make_norm
from luffy.model.moe_layer import MoELayer
from luffy.model.ownership import check_model, expert_parameters
from luffy.model.router import RouterStats
from luffy.model.taken import give_back, take
from luffy.recipes import Recipe, recipe_of

_LOSSES = ("balance_loss", "z_loss", "locality_loss", "bias_update_rate")


class MoEBlock(nn.Module):
    """x -> x + sum of the top-k experts of norm(x), experts spread over the expert-parallel ranks of `mesh`.

    mesh: of `luffy.join_world`. recipe: `luffy` sends as few rows as seats leave, which `luffy.seats.exchange` gives
    the sequences of a batch; low bits with `luffy_max`. runtime: of another block of the same model, to share its
    traffic meter and planner. layer: index of this block among the model's MoE blocks. settings: of ModelConfig or
    RouterConfig, such as `activation`, `norm`, `score`, `balance_loss`, `num_shared_experts`; UserError for those that
    cannot be.
    Weights come from (seed, layer, name): the same at every number of ranks.
    """

    _lies: bool | None  # how matrices lie in the module that the block was made from

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        mesh: Mesh,
        recipe: str | Recipe = "luffy",
        layer: int = 0,
        runtime: Runtime | None = None,
        recompute: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        base: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "num_heads": 1}
        config = ModelConfig(name="own").override(
            **base | {"hidden_size": hidden_size, "expert_hidden_size": expert_hidden_size, "num_layers": layer + 1}
            | {"num_experts": num_experts, "top_k": top_k} | settings
        )  # fmt: skip
        self.config, self.seed = config, seed
        self.runtime = runtime or Runtime.create(Comm.create(mesh), recipe_of(recipe), config, recompute)
        self.norm = make_norm(config)
        self.moe = moe_layer(config, self.runtime, layer)
        self._stats: RouterStats | None = None
        self._answers_logits, self._lies = False, None
        self.reset_parameters()
        self.to(mesh.device)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        mesh: Mesh,
        *,
        recipe: str | Recipe = "luffy",
        layer: int = 0,
        runtime: Runtime | None = None,
        recompute: bool = False,
        top_k: int | None = None,
        **losses: float,
    ) -> MoEBlock:
        """A block that answers as `module` does, x -> the weighted sum of its experts (and shared experts), no norm
        and no residual; this rank keeps its share of the experts. Every rank calls it with the same module.

        module: gate, and experts in a list or stacked, under the names of Mixtral, Qwen, DeepSeek or plain w1, w2, w3
        (luffy.model.taken). Where it answers with its router's logits as well, so does the block. top_k: where the
        module does not say. losses: `balance_loss`, `z_loss`, `locality_loss`, `bias_update_rate`; 0 unless given.
        Raises UserError for what cannot be taken, RanksDifferError where ranks hold different weights.
        """
        if unknown := sorted(set(losses) - set(_LOSSES)):
            raise UserError(f"from_module: {unknown[0]}= is unknown; beside the block's options there are {_LOSSES}")
        given: dict[str, Any] = dict.fromkeys(_LOSSES, 0.0) | losses
        taken = take(module, RouterConfig(**given), top_k)
        experts, router = taken.experts, taken.router
        first = experts.weights(0)[1]
        config = ModelConfig(
            name="own", hidden_size=experts.hidden_size, expert_hidden_size=first.shape[0], num_layers=layer + 1,
            num_heads=1, norm="rmsnorm", activation="swiglu" if experts.gated else "gelu", router=router.config,
        )  # fmt: skip
        config.check_ranks(mesh.ep_size)
        runtime = runtime or Runtime.create(Comm.create(mesh), recipe_of(recipe), config, recompute)
        if runtime.planner is not None:
            raise UserError(
                f"--recipe {runtime.recipe.name} moves sequences behind layers, and a module of your own keeps its "
                "residual; choose a recipe that leaves them, such as luffy or vanilla_dedup"
            )
        num = experts.num_experts // mesh.ep_size
        w_in, w_out, b_in, b_out = experts.share(mesh.ep_rank * num, num)
        assert w_in is not None and w_out is not None
        train = experts.example.requires_grad
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block.config, block.seed, block.runtime, block.norm = config, 0, runtime, nn.Identity()
        block.moe = MoELayer(
            runtime, layer, router=router, shared_experts=taken.shared, layer_of_moe=layer, residual=False,
            experts=GroupedExperts.holding(w_in, w_out, b_in, b_out, taken.activation, train),
        )  # fmt: skip
        block._stats, block._answers_logits, block._lies = None, taken.answers_logits, experts.lies
        block.train(module.training).to(mesh.device)
        check_model(block, mesh)
        return block

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the weights, with the experts of all ranks, into a module such as this block was made from.

        Every rank calls it, each with a module of its own. UserError for a block that `from_module` did not make.
        """
        if self._lies is None:
            raise UserError("copy_to: this block was not made by MoEBlock.from_module; use luffy.save_weights")
        comm, order = self.runtime.comm, self.moe.slot_of_expert
        own = [None if p is None else p.detach() for p in self.moe.experts._own()]
        weights = tuple(None if p is None else comm.all_gather_ep(p).flatten(0, 1)[order] for p in own)
        give_back(module, self.moe.router, self.moe.shared_experts, weights, self._lies)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices normal with standard deviation 1 / sqrt(inputs), the norm's weight one, biases zero."""
        ep_rank = self.runtime.comm.mesh.ep_rank

        def fill(p: Tensor, name: str, inputs: int) -> None:
            digest = hashlib.blake2b(f"{self.seed}/{self.moe.layer}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            p.copy_(torch.randn(p.shape, generator=generator) * inputs**-0.5)

        experts = expert_parameters(self)
        for name, p in self.named_parameters():
            if name.startswith("norm.") or name.endswith(("bias", "b_in", "b_out")):
                p.fill_(float(name == "norm.weight"))
            elif name in experts:
                for i in range(p.shape[0]):
                    fill(p[i], f"{name}.{ep_rank * p.shape[0] + i}", p.shape[1])
            else:
                fill(p, name, p.shape[1])

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: TokenBatch) -> TokenBatch: ...
    @torch.compiler.disable  # rows are counted on the host: torch.compile goes on behind the block
    def forward(self, x: Tensor | TokenBatch) -> Any:
        """[B, S, D] of this rank, or [T, D] of one sequence, or a TokenBatch, to the same. Every rank calls it, with an
        empty batch if it has none. With logits [T, E] beside it in the place of a module that answers so."""
        if self.moe.layer_of_moe <= self.runtime.last_layer:
            self.runtime.begin()  # another forward pass of the model
        self.runtime.last_layer = self.moe.layer_of_moe
        if isinstance(x, TokenBatch):
            batch = self.moe(x, self.norm)
            self._stats = batch.router_stats[-1]
            return batch
        if self.runtime.planner is not None:
            raise UserError(
                f"--recipe {self.runtime.recipe.name} moves sequences: give the block a TokenBatch (luffy.data.batch), "
                "or choose a recipe that leaves them, such as vanilla_dedup"
            )
        mesh, (B, S, D) = self.runtime.comm.mesh, x.shape if x.dim() == 3 else (1, *x.shape)
        table = SequenceTable(np.full(B, S), np.full(B, mesh.ep_rank))
        batch = self.moe(TokenBatch(x.reshape(B * S, D), Layout(table, mesh.ep_rank, x.device)), self.norm)
        self._stats = batch.router_stats[-1]
        out = batch.hidden.view(x.shape)
        return (out, self._stats.logits) if self._answers_logits else out

    @torch.compiler.disable
    def aux_loss(self) -> Tensor:
        """This rank's part of the losses that the settings ask for (`balance_loss`, `z_loss`, `locality_loss`), [].

        Of the last forward pass, over the tokens of all ranks; add it to the loss. Every rank calls it.
        """
        if self._stats is None:
            raise UserError("aux_loss() follows a forward pass")
        comm = self.runtime.comm
        tokens = comm.all_reduce(self._stats.assigned.sum()[None] / self.config.router.top_k)
        aux = auxiliary_loss((self._stats,), self.config.router, comm, int(tokens))
        assert aux is not None
        return aux.local
