"""MoEBlock: Luffy's MoE layer for a model of your own.

    x = block(x)            [B, S, D] -> [B, S, D]: x plus what its experts say; every row stays where it is
    batch = block(batch)    TokenBatch -> TokenBatch: sequences may move, where the recipe moves any

It brings its own norm and adds its own residual, because what travels is the stream itself (luffy.model.moe_layer).
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
from luffy.config import ModelConfig
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.errors import UserError
from luffy.model.aux_loss import auxiliary_loss
from luffy.model.build import moe_layer
from luffy.model.layers import make_norm
from luffy.model.ownership import expert_parameters
from luffy.model.router import RouterStats
from luffy.recipes import recipe_of


class MoEBlock(nn.Module):
    """x -> x + sum of the top-k experts of norm(x), experts spread over the expert-parallel ranks of `mesh`.

    mesh: of `luffy.join_world`. recipe: `luffy` sends as few rows as seats leave, which `luffy.seats.exchange` gives
    the sequences of a batch; low bits with `luffy_max`. runtime: of another block of the same model, to share its
    traffic meter and planner. layer: index of this block among the model's MoE blocks. settings: of ModelConfig or
    RouterConfig, such as `activation`, `norm`, `score`, `balance_loss`, `num_shared_experts`; UserError for those that
    cannot be.
    Weights come from (seed, layer, name): the same at every number of ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        mesh: Mesh,
        recipe: str = "luffy",
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
        self.reset_parameters()
        self.to(mesh.device)

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
    def forward(self, x: Tensor | TokenBatch) -> Tensor | TokenBatch:
        """[B, S, D] of this rank, or a TokenBatch. Every rank calls it, with an empty batch if it has none."""
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
        mesh, (B, S, D) = self.runtime.comm.mesh, x.shape
        table = SequenceTable(np.full(B, S), np.full(B, mesh.ep_rank))
        batch = self.moe(TokenBatch(x.reshape(B * S, D), Layout(table, mesh.ep_rank, x.device)), self.norm)
        self._stats = batch.router_stats[-1]
        return batch.hidden.view(B, S, D)

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
