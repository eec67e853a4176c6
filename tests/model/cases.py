"""Train a small model on real ranks, and by the oracle, from one description of the case.

`train_on_ranks` is what the ranks do, with nothing of luffy's trainer: forward, backward, gradients summed,
a plain `torch.optim.AdamW`. `assert_exact` runs both and asserts that they agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from luffy.comm import Comm, Mesh, build_mesh
from luffy.config import ModelConfig, model_preset
from luffy.data.batch import TokenBatch
from luffy.data.loader import Sequence
from luffy.exchange.stage import Stage
from luffy.model import Runtime, Transformer, build_model, expert_parameters
from luffy.recipes import Recipe, get_recipe
from luffy.seats.features import features_of
from luffy.seats.layout import Seating, SeatLayout
from luffy.seats.seater import LearntSeats
from luffy.testing import (
    OracleStep,
    gather_full,
    largest_error,
    load_full,
    oracle_step,
    oracle_train,
    random_sequences,
    run_ranks,
    vivid_parameters,
)
from luffy.train.batching import gather_step, make_micro_batch
from luffy.train.rehoming import move_experts
from luffy.train.seating import table_of

TINY_PRESETS = ("moe-gpt2-tiny", "moe-bert-large-tiny", "moe-transformer-xl-tiny", "moe-llm-tiny")
# Of four architectures two run with the fast tests, all with the slow ones.
PRESETS = [pytest.param(name, marks=[pytest.mark.slow] if name in TINY_PRESETS[1:3] else []) for name in TINY_PRESETS]
DECODERS = tuple(name for name in TINY_PRESETS if model_preset(name).causal)
TOLERANCE = 1e-10  # of the largest element of a tensor; summation order alone makes about 1e-15


def shrunk(preset: str, **changes: Any) -> ModelConfig:
    """`preset` small enough to meet the oracle: the auxiliary losses weigh enough to be felt."""
    small = {
        "vocab_size": 97,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "dense_hidden_size": 40,
        "expert_hidden_size": 24,
        "max_sequence_length": 40,
        "num_experts": 8,
        "top_k": 2,
        "balance_loss": 0.05,
        "z_loss": 0.01,
        "locality_loss": 0.03,
    }
    return model_preset(preset).override(**(small | changes))


@dataclass(frozen=True)
class Case:
    """A model, how it is spread and run, and the data: `steps` of `micro_batches` of `batch` sequences.

    rehome_after: experts of all layers move to random ranks after each of these steps. expert_flops: the speed that
    decides about shadows. overlap: the micro-batches of a step take turns instead of following each other.
    device: "cuda" gives each rank a GPU of its own, over NCCL. num_topics: > 0 gives sequences topics.
    seats: where sequences are computed, "random" or "learnt" (from rows made up); as read by default.
    """

    config: ModelConfig
    world: int = 1
    ep_size: int | None = None
    recipe: str | Recipe = "vanilla_dedup"
    padded: bool = False
    recompute: bool = False
    lengths: str = "uneven"
    labelled: float = 1.0
    batch: int = 4
    micro_batches: int = 1
    steps: int = 1
    clip_norm: float | None = None
    rehome_after: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    ranks_per_node: int | None = None
    expert_flops: float | None = None
    overlap: bool = False
    device: str = "cpu"
    num_topics: int = 0
    seats: str = ""

    @property
    def backend(self) -> str:
        return "gloo" if self.device == "cpu" else "nccl"

    def data(self) -> list[list[list[Sequence]]]:
        """Sequences by [step][micro-batch]; the same at every number of ranks."""

        def batch(step: int, micro: int) -> list[Sequence]:
            seed = 1000 * step + micro
            sequences = random_sequences(
                self.batch, self.config.vocab_size, seed=seed,
                lengths=self.lengths, labelled=self.labelled,  # type: ignore[arg-type]
            )  # fmt: skip
            if not self.num_topics:
                return sequences
            topics = np.random.default_rng(seed).integers(0, self.num_topics, len(sequences))
            return [replace(s, topic=int(t)) for s, t in zip(sequences, topics, strict=True)]

        return [[batch(step, micro) for micro in range(self.micro_batches)] for step in range(self.steps)]

    def computed(self) -> list[list[list[Sequence]]]:
        """`data`, its sequences in the micro-batches that they are computed in."""
        if not self.seats:
            return self.data()
        return [self._by_micro_batch(step) for step in self.data()]

    def _by_micro_batch(self, step: list[list[Sequence]]) -> list[list[Sequence]]:
        batch, seating = self.seat(step)
        return [[batch[i] for i in np.flatnonzero(seating.micro_batch == m)] for m in range(self.micro_batches)]

    def seat(self, step: list[list[Sequence]]) -> tuple[list[Sequence], Seating]:
        """(all sequences of a step in reading order, where they sit): the same on every rank."""
        batch, layout = [s for micro in step for s in micro], self.seat_layout
        rng = np.random.default_rng(len(batch[0].tokens))
        if self.seats == "random":
            anywhere = rng.integers(0, [[layout.world_size], [self.micro_batches]], (2, len(batch)))
            return batch, Seating(anywhere[0], anywhere[1])
        seats, lengths = LearntSeats(layout.ep_size), np.array([len(s.tokens) for s in batch])
        features = features_of([s.tokens for s in batch])
        seats.predictor.observe(features, lengths, rng.integers(0, 2 * lengths[:, None], (len(batch), layout.ep_size)))
        seats.predictor.solve()
        return batch, seats.seat(batch, layout)

    @property
    def seat_layout(self) -> SeatLayout:
        ep_size = self.ep_size or self.world
        return SeatLayout(ep_size, self.world // ep_size, self.micro_batches, self.padded)


# The bias of the keys has a true gradient of zero, since softmax does not feel it. AdamW divides what rounding
# leaves of it by `eps`: at the usual 1e-8 that alone moves the weights by 1e-10 of their size.
OPTIMIZER: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6}
WEIGHT_DECAY = 0.1


def decays(name: str) -> bool:
    return name.endswith(("weight", "w_in", "w_out", "head")) and "norm" not in name


@functools.lru_cache(maxsize=8)
def _mesh(world: dist.ProcessGroup, device: torch.device, ep_size: int | None, ranks_per_node: int | None) -> Mesh:
    """The mesh of this process group: cases that share a launch share its communicators, which NCCL makes slowly."""
    return build_mesh(device, ep_size, ranks_per_node)


def build(case: Case, ranks_per_node: int | None = None) -> tuple[Transformer, Comm]:
    """The case's model on this rank with vivid weights."""
    device = torch.device("cpu") if case.device == "cpu" else torch.device("cuda", dist.get_rank())
    assert dist.group.WORLD is not None
    comm = Comm.create(_mesh(dist.group.WORLD, device, case.ep_size, ranks_per_node or case.ranks_per_node))
    recipe = case.recipe if isinstance(case.recipe, Recipe) else get_recipe(case.recipe)
    runtime = Runtime.create(comm, recipe, case.config, case.recompute)
    if runtime.residency is not None and case.expert_flops is not None:
        runtime.residency.flops_per_second = case.expert_flops
    model = build_model(case.config, runtime, dtype=case.dtype)
    load_full(model, vivid_parameters(model))
    return model, comm


def watch_block(block: Any, note: Callable[[TokenBatch, TokenBatch], None]) -> None:
    """Have `note` called with every batch that enters a block, as it was and as it leaves."""
    whole = block.stages

    def watched(batch: TokenBatch, *args: Any) -> Stage[TokenBatch]:
        after = yield from whole(batch, *args)
        note(batch, after)
        return after

    block.stages = watched


def share_of(sequences: list[Sequence], comm: Comm) -> list[Sequence]:
    """The slice of a batch that falls to this rank."""
    n = len(sequences) // comm.mesh.world_size
    return sequences[comm.mesh.rank * n : (comm.mesh.rank + 1) * n]


def run_step(model: Transformer, comm: Comm, case: Case, step: list[list[Sequence]]) -> torch.Tensor:
    """Accumulate the gradients of one step; the step's loss over all ranks, [2]: with and without
    auxiliaries."""
    model.zero_grad()
    if case.seats:
        batch, seating = case.seat(step)
        announced = table_of(batch, seating, case.seat_layout)
        mine = [[batch[i] for i in seating.of(comm.mesh.rank, m)] for m in range(case.micro_batches)]
    else:
        mine = [share_of(micro, comm) for micro in step]
        announced = gather_step(mine, comm, case.num_topics)
    total = torch.zeros(2, dtype=torch.float64, device=comm.mesh.device)
    micros = [make_micro_batch(s, i, announced, comm, padded=case.padded) for i, s in enumerate(mine)]
    for group in [micros] if case.overlap else [[micro] for micro in micros]:
        output = model(*group)
        outputs = output if isinstance(output, tuple) else (output,)
        torch.stack([out.loss for out in outputs]).sum().backward()
        for out in outputs:
            total += torch.stack([out.loss.detach(), out.token_loss]).double()
    return comm.all_reduce(total)


def reduce_gradients(model: Transformer, clip_norm: float | None) -> None:
    """Sum replicated gradients over the world, an expert's over its copies if there are any; then clip."""
    mesh = model.runtime.comm.mesh
    squares, stacked = [], expert_parameters(model)
    for experts, group in ((False, mesh.world_group), (True, mesh.dp_group)):
        grads = [p.grad for n, p in model.named_parameters() if (n in stacked) == experts and p.grad is not None]
        flat = torch.cat([torch.zeros(0, dtype=torch.float64, device=mesh.device), *(g.flatten() for g in grads)])
        dist.all_reduce(flat, group=group)
        for g, reduced in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(reduced.view_as(g))
        squares.append(flat.square().sum())
    dist.all_reduce(squares[1], group=mesh.ep_group)
    if clip_norm is not None:
        norm = float(sum(squares)) ** 0.5
        for p in model.parameters():
            p.grad *= min(1.0, clip_norm / (norm + 1e-6))


def train_on_ranks(rank: int, case: Case) -> dict[str, Any]:
    """All steps of a case: the losses, the first step's gradients, the parameters before and after."""
    model, comm = build(case)
    initial = gather_full(model) | {n: b for n, b in model.named_buffers() if n.endswith("choice_bias")}
    initial = {name: value.clone() for name, value in initial.items()}
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if decays(n)], "weight_decay": WEIGHT_DECAY},
            {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
        ],
        **OPTIMIZER,
    )
    losses: list[list[float]] = []
    first: dict[str, torch.Tensor] = {}
    for number, step in enumerate(case.data()):
        losses.append(run_step(model, comm, case, step).tolist())
        first = first or gather_full(model, "grad")
        reduce_gradients(model, case.clip_norm)
        optimizer.step()
        if number in case.rehome_after:
            for layer, moe in enumerate(model.moe_layers):
                start = np.arange(case.config.router.num_experts) // moe.experts.num_local
                move_experts(moe, optimizer, np.random.default_rng((number, layer)).permutation(start), comm)
    final = gather_full(model)
    if model.runtime.residency is not None:
        assert model.runtime.residency.num_guests > 0, "no expert visited another rank: the case shows nothing"
    if rank != 0:
        return {}
    return {"losses": losses} | {
        kind: {name: value.cpu().numpy() for name, value in values.items()}
        for kind, values in (("initial", initial), ("gradients", first), ("final", final))
    }


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(a) for name, a in arrays.items()}


Expected = tuple[OracleStep, list[float], dict[str, torch.Tensor]]
_told: dict[Any, tuple[dict[str, torch.Tensor], Expected]] = {}


def _oracle(case: Case, initial: dict[str, torch.Tensor]) -> Expected:
    """The first step, and all losses and the last weights if there are more. Asked once where only the ranks differ."""
    key = (case.config, case.lengths, case.labelled, case.batch, case.micro_batches, case.steps, case.clip_norm)
    key += (case.num_topics, case.seats, case.seats and (case.world, case.ep_size))
    before, expected = _told.get(key, ({}, None))
    same = before.keys() == initial.keys() and all(torch.equal(before[name], value) for name, value in initial.items())
    if expected is not None and same:
        return expected
    first = oracle_step(case.config, initial, case.computed()[0], num_topics=case.num_topics)
    losses, final = [first.loss], {}
    if case.steps > 1:
        losses, final = oracle_train(
            case.config, initial, case.computed(), weight_decay=WEIGHT_DECAY, decays=decays, clip_norm=case.clip_norm,
            num_topics=case.num_topics, **OPTIMIZER,
        )  # fmt: skip
    _told[key] = initial, (first, losses, final)
    return first, losses, final


def assert_exact(case: Case, tolerance: float = TOLERANCE) -> OracleStep:
    """Run the case on ranks and by the oracle: loss, every gradient, every weight after the last step.

    Returns what the oracle says of the first step.
    """
    return check_exact(case, run_ranks(train_on_ranks, case.world, case, backend=case.backend), tolerance)


def check_exact(case: Case, results: list[dict[str, Any]], tolerance: float = TOLERANCE) -> OracleStep:
    """`assert_exact` of what ranks gave back from `train_on_ranks`."""
    result = results[0]
    first, losses, final = _oracle(case, tensors(result["initial"]))
    loss, token_loss = result["losses"][0]
    assert abs(loss - first.loss) <= tolerance * abs(first.loss)
    oracle_token_loss = sum(float(out.token_loss.detach()) for out in first.outputs)
    assert abs(token_loss - oracle_token_loss) <= tolerance * abs(oracle_token_loss)
    error, name = largest_error(tensors(result["gradients"]), first.gradients)
    assert error <= tolerance, f"gradient of {name}: relative error {error:.1e}"
    if case.steps == 1:
        return first
    np.testing.assert_allclose([total for total, _ in result["losses"]], losses, rtol=tolerance)
    trained = {name: p for name, p in final.items() if name in result["final"]}
    error, name = largest_error(tensors(result["final"]), trained)
    assert error <= tolerance, f"{name} after {case.steps} steps: relative error {error:.1e}"
    return first
