"""A model in plain PyTorch with a MoE layer of its own; then the same with its experts spread over ranks by Luffy.

    python examples/plain_pytorch.py                             the original code, in one process
    torchrun --nproc-per-node 2 examples/plain_pytorch.py        with Luffy: the same losses

What Luffy needs is marked by `if mesh`. docs/own_model.md goes through it.
"""

import argparse
import inspect
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import luffy

WIDTH, LENGTH, BATCH, STEPS = 64, 64, 16, 12  # BATCH: sequences of all ranks


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.w2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """The original layer, as in Mixtral: x [B, S, D] -> weighted sum of the best two of eight experts."""

    def __init__(self):
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(WIDTH, 8, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(8))

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, ids = self.gate(flat).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, choice = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, choice, None])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.moe = MoE()

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.moe(self.norm2(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, input_ids, labels):
        """Summed loss over the labels of these sequences."""
        x = self.embed(input_ids) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")


def spread_experts(model, mesh):
    """Put a MoEBlock in the place of every MoE; it answers as the module did, with this rank's share of the experts."""
    runtime = None
    for layer, block in enumerate(model.blocks):
        block.moe = luffy.MoEBlock.from_module(block.moe, mesh, recipe="luffy", layer=layer, runtime=runtime)
        runtime = block.moe.runtime  # one for all layers: they share a traffic meter
    return runtime


def batch_of(text, step):
    """The sequences of a step, the same in every process."""
    order = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,), generator=order)
    windows = torch.stack([text[s : s + LENGTH + 1] for s in starts])
    return windows[:, :-1], windows[:, 1:]


def original(model):
    """The original model with the weights of all ranks. Every rank calls it."""
    plain = Model().to(model.position)
    rest = {name: value for name, value in model.state_dict().items() if ".moe." not in name}
    plain.load_state_dict(rest, strict=False)
    for mine, theirs in zip(model.blocks, plain.blocks, strict=True):
        mine.moe.copy_to(theirs.moe)
    return plain


@torch.no_grad()
def evaluate(model, text):
    """Mean loss of the original code on one rank, which asks no other for anything."""
    ids, labels = (t.to(model.position.device) for t in batch_of(text, 0))
    return float(model(ids, labels)) / labels.numel()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "plain_pytorch")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    mesh = luffy.join_world() if "RANK" in os.environ else None
    device = mesh.device if mesh else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank = mesh.rank if mesh else 0

    torch.manual_seed(0)  # every rank makes the same weights, or loads them from one file
    model = Model().to(device, dtype)
    if mesh:
        runtime = spread_experts(model, mesh)
        comm = runtime.comm
        sync, seats = luffy.GradientSync(model, comm), luffy.Seats(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list((inspect.getsource(argparse) + inspect.getsource(inspect)).encode()))

    for step in range(1, STEPS + 1):
        ids, labels = (t.to(device) for t in batch_of(text, step))
        num_labels = labels.numel()  # of all ranks
        if mesh:
            ids, labels = (t.chunk(mesh.world_size)[rank] for t in (ids, labels))  # a loader of each rank reads its own
            seated = seats.take(ids, labels=labels)  # the sequences whose experts are here
            ids, labels = seated.input_ids, seated.labels
        loss = (sync if mesh else model)(ids, labels) / num_labels
        loss.backward()
        if mesh:
            sync.finish()  # gradients are sums over ranks
        optimizer.step()
        if mesh:
            seats.step()  # learns which sequences want which rank
        optimizer.zero_grad()
        total = comm.all_reduce(loss.detach().clone()) if mesh else loss.detach()
        numbers = luffy.metrics(model) if mesh else {}
        if rank == 0:
            sent = f", {numbers['rows_home']:.0%} of rows at home, {numbers['bytes_sent'] / 1e6:.2f} MB" if mesh else ""
            print(f"step {step}: loss {float(total):.10f}{sent}", flush=True)
        if mesh and step == STEPS // 2:  # keep it, and go on from what was kept, as after a restart
            if rank == 0:
                shutil.rmtree(args.out / "checkpoint", ignore_errors=True)  # of an earlier run of this script
            luffy.save_checkpoint(args.out / "checkpoint", model, optimizer)
            luffy.load_checkpoint(args.out / "checkpoint", model, optimizer)
    plain = original(model) if mesh else model
    if rank == 0:
        print(f"evaluation: loss {evaluate(plain, text):.10f}", flush=True)
    if mesh:
        luffy.save_weights(args.out / "model.safetensors", model)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
