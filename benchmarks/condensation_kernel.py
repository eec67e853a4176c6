"""Is choosing representatives cheap? Its time beside the expert layer that it precedes, and its memory against rows.

    python benchmarks/condensation_kernel.py --out docs/results/condensation_kernel.json      (needs a GPU)

One rank's share of a layer: `rows` copies, spread over 16 experts, in clusters of alike rows. `choose`: gather, cosine
tiles and choice (luffy.kernels.representatives). `decide`: all of luffy.exchange.condense, with sorting and windows.
`experts`: forward of the grouped expert products that those rows are for. Medians of interleaved repeats.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch

from luffy.condensation import parse_condense
from luffy.config import model_preset
from luffy.data.batch import Layout, SequenceTable
from luffy.exchange import CondenseState, ExpertMap, condense, copy_keys
from luffy.exchange.condense import find_groups, make_windows
from luffy.kernels.representatives import choose_representatives
from luffy.model.experts import GroupedExperts
from luffy.train.metrics import describe_machine


def milliseconds(action, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # launches happen behind it, and are not timed
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def measure(size: int, tokens: int, window: int, repeats: int) -> dict:
    device, E, K = torch.device("cuda"), 16, 2
    g = torch.Generator(device).manual_seed(0)
    centres = torch.randn(tokens // 4, size, generator=g, device=device)
    x = centres[torch.randint(len(centres), (tokens,), generator=g, device=device)]
    x = (x + 0.3 * torch.randn(tokens, size, generator=g, device=device)).bfloat16()
    ids = torch.rand(tokens, E, generator=g, device=device).topk(K).indices
    lengths = np.full(tokens // 1024, 1024)
    layout = Layout(SequenceTable(lengths, np.zeros(len(lengths), dtype=np.int64)), 0, device)
    experts = ExpertMap(torch.arange(E, device=device), 1)
    keys = copy_keys(ids, experts, 0, E, "ranks")
    state = CondenseState(parse_condense(f"static:0.9,local,window={window}"), [0.9])
    config = model_preset("moe-gpt2").override(hidden_size=size, expert_hidden_size=4 * size, num_heads=8)
    network = GroupedExperts(config, E).to(device).bfloat16()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.02)
    rows = x[torch.arange(tokens * K, device=device) // K]
    counts = torch.full((E,), tokens * K // E, device=device)
    group, G = find_groups(ids, keys, layout, E, 0, local=True, by_sequence=False, pairs=False)
    table = make_windows(group, G, layout, window)
    token = torch.where(table >= 0, table // K, -1)
    unit = torch.nn.functional.normalize(x.float(), dim=1).bfloat16()

    def choose(kernel=True):
        return choose_representatives(unit, token, 0.9, causal=True, nearest=True, kernel=kernel)

    def decide():
        return condense(state, 0, x, ids, keys, layout, experts, 0, causal=True, by_sequence=False, pairs=False)

    def forward():
        with torch.no_grad():
            network(rows, counts)

    actions = {"choose": choose, "decide": decide, "experts": forward}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            times[name] += milliseconds(action, 1)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        decide()
    host = (time.perf_counter() - began) / repeats * 1e3  # what the host needs to launch it all
    torch.cuda.synchronize()
    memory = {}
    for name in ("choose", "decide"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        actions[name]()
        memory[name] = torch.cuda.max_memory_allocated() - before
    kept = condense(state, 0, x, ids, keys, layout, experts, 0, causal=True, by_sequence=False, pairs=False)[0]
    out = {"hidden_size": size, "rows": tokens * K, "window": window, "kept": float(kept.sent.float().mean())}
    out["decide_host_ms"] = host
    out |= {f"{n}_ms": median(t) for n, t in times.items()}
    out |= {f"{n}_spread_ms": [min(t), max(t)] for n, t in times.items()}
    out |= {"choose_share": out["choose_ms"] / out["experts_ms"], "decide_share": out["decide_ms"] / out["experts_ms"]}
    if size == 768:
        out["reference_ms"] = median(milliseconds(lambda: choose(False), 5))
    return out | {"memory_num_bytes": memory}


@click.command()
@click.option("--sizes", default="768,1024,2048,4096", show_default=True)
@click.option("--rows", default="8192,16384,32768,65536", show_default=True)
@click.option("--windows", default="64,128", show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(sizes: str, rows: str, windows: str, repeats: int, out: Path | None) -> None:
    """Print a table, and write it as JSON."""
    results = []
    click.echo(
        "| d | rows | window | kept | choose ms | decide ms | experts ms | choose/experts | decide/experts | MB |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in map(int, sizes.split(",")):
        for n in map(int, rows.split(",")):
            for window in map(int, windows.split(",")):
                r = measure(size, n // 2, window, repeats)
                results.append(r)
                click.echo(
                    f"| {size} | {n} | {window} | {r['choose_ms']:.3f} | {r['decide_ms']:.3f} | "
                    f"{r['decide_host_ms']:.3f} | {r['experts_ms']:.3f} | {r['choose_share']:.1%} | "
                    f"{r['decide_share']:.1%} | {r['memory_num_bytes']['decide'] / 1e6:.0f} |"
                )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": describe_machine("cuda"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
