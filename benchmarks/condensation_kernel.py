"""Is deciding what to condense cheap? Its time beside the expert layer that it precedes, its launches, its memory.

    python benchmarks/condensation_kernel.py run --out docs/results/condensation_kernel.json      (needs a GPU)
    python benchmarks/condensation_kernel.py table docs/results/condensation_kernel.json

One rank's share of a layer: `rows` copies, spread over 16 experts, in clusters of alike rows. *decide*: all of
luffy.exchange.condense and only_sent, from the router's choices to the keys of what is sent. *choose*: the kernel in it
that does the arithmetic (luffy.kernels.condense). *experts*: forward of the grouped expert products that those rows are
for. Medians of interleaved repeats, launched behind a wait, so that what the host needs to launch them is not in them;
it is measured apart (*host*). `run` first holds the kernels to the torch path, and says so where they differ.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from luffy.condensation import parse_condense
from luffy.config import model_preset
from luffy.exchange.condense import CondenseState, condense, only_sent
from luffy.kernels.condense import Question, choose, find_windows
from luffy.kernels.sort import sort_by_group
from luffy.model.experts import GroupedExperts
from luffy.testing.alike import AlikeLayer, alike_layer, compare_closely, compare_exactly
from luffy.testing.launches import launches
from luffy.train.metrics import describe_machine

NUM_EXPERTS, TOP_K, THRESHOLD = 16, 2, 0.9
HEADER = (
    "| d | rows | window | scheme | choose ms | decide ms | host ms | launches | experts ms | decide / experts | MB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def milliseconds(action: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(10_000_000)  # launches happen behind it, and are not timed
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def check(device: torch.device) -> list[str]:
    """What differs between the kernels and torch, a text for each case; empty if nothing does."""
    problems = []
    for window in (16, 32, 64, 128):
        for dtype, causal in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
            for by_sequence in (True, False):
                seed = window + 2 * causal + by_sequence
                layer = alike_layer(seed, (700, 1, 30, 257, 100), 768, NUM_EXPERTS, TOP_K, dtype=dtype)
                rough = alike_layer(seed, (60, 31), 1024, 8, TOP_K, dtype=dtype, exact=False)
                for extras in ("", ",correct"):
                    flags = {"causal": causal, "by_sequence": by_sequence, "device": device}
                    try:
                        scheme = parse_condense(f"static:0.5,local,window={window}{extras}")
                        assert scheme is not None
                        if not compare_exactly(layer, scheme, 0.5, **flags):
                            problems.append(f"nothing was condensed, nothing was tested: {scheme}")
                        compare_closely(rough, scheme, 0.8, **flags)
                    except Exception as error:  # a kernel that does not compile is a finding too
                        short = "".join(traceback.format_exception_only(error))[-1500:]
                        problems.append(f"window {window}, {dtype}, {flags}: {short}")
    return problems


def layer_of_rows(size: int, tokens: int) -> AlikeLayer:
    """Gaussian clusters of four; an expert a rank, those of this rank condensed too."""
    g = torch.Generator("cuda").manual_seed(0)
    centres = torch.randn(tokens // 4, size, generator=g, device="cuda")
    x = centres[torch.randint(len(centres), (tokens,), generator=g, device="cuda")]
    x = (x + 0.3 * torch.randn(tokens, size, generator=g, device="cuda")).bfloat16()
    ids = torch.rand(tokens, NUM_EXPERTS, generator=g, device="cuda").topk(TOP_K).indices
    return AlikeLayer(x, ids, (1024,) * (tokens // 1024), NUM_EXPERTS, NUM_EXPERTS)


def expert_layer(size: int) -> GroupedExperts:
    config = model_preset("moe-gpt2").override(hidden_size=size, expert_hidden_size=4 * size, num_heads=8)
    with torch.device("cuda"):
        network = GroupedExperts(config, NUM_EXPERTS).bfloat16()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return network


def forward_of(network: GroupedExperts, layer: AlikeLayer) -> Callable[[], Any]:
    """What the experts do with the copies: as many rows for each."""
    num_rows = layer.ids.numel()
    rows = layer.x[torch.arange(num_rows, device="cuda") // TOP_K]
    ids = torch.arange(NUM_EXPERTS, device="cuda").repeat_interleave(num_rows // NUM_EXPERTS)[:, None]
    pairs, ones = sort_by_group(ids, NUM_EXPERTS), torch.ones(num_rows, 1, device="cuda")

    def forward() -> None:
        with torch.no_grad():
            network(rows, ones, pairs)

    return forward


def question(layer: AlikeLayer, scheme: Any) -> Question:
    keys = layer.keys
    return Question(
        layer.x, layer.ids, keys.rank, keys.is_copy, layer.layout, NUM_EXPERTS, 0, THRESHOLD, scheme.window,
        True, scheme.nearest, True, False, False,
    )  # fmt: skip


def measure(layer: AlikeLayer, forward: Callable[[], Any], text: str, repeats: int, by_torch: bool) -> dict:
    scheme = parse_condense(text)
    assert scheme is not None
    state = CondenseState(scheme, [THRESHOLD])
    layer_arguments = (layer.x, layer.ids, layer.keys, layer.layout, layer.experts, 0)

    def decide(kernel: bool | None = None) -> Any:
        flags = {"causal": True, "by_sequence": False, "pairs": False, "kernel": kernel}
        condensed = condense(state, 0, *layer_arguments, **flags)[0]
        return condensed, only_sent(layer.keys, condensed)

    asked = question(layer, scheme)
    windows = find_windows(asked)
    actions = {"choose": lambda: choose(asked, *windows), "decide": decide, "experts": forward}
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(milliseconds(action))
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        decide()
    host = (time.perf_counter() - began) / repeats * 1e3
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    condensed = decide()[0]
    memory = torch.cuda.max_memory_allocated() - before
    found = launches(decide)
    out = {"hidden_size": layer.x.shape[1], "rows": layer.ids.numel(), "window": scheme.window, "scheme": text}
    out |= {f"{n}_ms": median(t) for n, t in times.items()}
    out |= {f"{n}_spread_ms": [min(t), max(t)] for n, t in times.items()}
    out |= {"choose_share": out["choose_ms"] / out["experts_ms"], "decide_share": out["decide_ms"] / out["experts_ms"]}
    out |= {"decide_host_ms": host, "kept": float(condensed.sent.float().mean()), "decide_num_bytes": memory}
    out |= {"launches": sum(n for n, _ in found.values()), "launched_us": {k: [n, us] for k, (n, us) in found.items()}}
    if by_torch:
        decide(False)
        out["torch_decide_ms"] = median(milliseconds(lambda: decide(False)) for _ in range(3))
        out["torch_launches"] = sum(n for n, _ in launches(lambda: decide(False)).values())
    return out


SETTINGS = [
    {"block": block, "num_warps": warps, "stages": stages, "registers": registers}
    for block in (64, 128)
    for warps, registers in ((4, None), (4, 128), (8, None), (8, 128), (16, None))
    for stages in (2, 3)
]


def try_settings(size: int, tokens: int, window: int) -> list[dict]:
    """Times of the choosing kernel under other settings, the fastest first."""
    layer, results = layer_of_rows(size, tokens), []
    scheme = parse_condense(f"static:{THRESHOLD},local,window={window}")
    asked = question(layer, scheme)
    found = find_windows(asked)
    for setting in SETTINGS:
        action = functools.partial(choose, asked, *found, **setting)
        try:
            action()
        except Exception as error:  # more shared memory than there is
            click.echo(f"window {window} {setting}: {type(error).__name__} {str(error)[:200]}")
            continue
        ms = median(milliseconds(action) for _ in range(7))
        results.append({"hidden_size": size, "rows": TOP_K * tokens, "window": window, **setting, "ms": ms})
    return sorted(results, key=lambda r: r["ms"])


def line(r: dict) -> str:
    """A row of the table; measurements from before the kernels were fused lack some columns."""
    num_bytes = r.get("decide_num_bytes") or r["memory_num_bytes"]["decide"]
    return (
        f"| {r['hidden_size']} | {r['rows'] // 1024}k | {r['window']} | {r.get('scheme', '').split(',local')[0]} | "
        f"{r['choose_ms']:.3f} | {r['decide_ms']:.3f} | {r['decide_host_ms']:.3f} | {r.get('launches', '')} | "
        f"{r['experts_ms']:.2f} | {r['decide_share']:.1%} | {num_bytes / 1e6:.1f} |"
    )


@click.group()
def main() -> None:
    """Measure on a GPU, or print what was measured."""


@main.command()
@click.option("--sizes", default="768,1024,2048,4096", show_default=True)
@click.option("--rows", default="8192,16384,32768,65536", show_default=True)
@click.option("--windows", default="64,128", show_default=True)
@click.option("--repeats", default=11, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def run(sizes: str, rows: str, windows: str, repeats: int, out: Path | None) -> None:
    """Check the kernels, print a table, and write it as JSON; the exit status is 1 if a check failed."""
    began = time.monotonic()
    problems = check(torch.device("cuda"))
    for problem in problems:
        click.echo(f"FAILED {problem}")
    click.echo(f"checks: {len(problems)} failed, {time.monotonic() - began:.0f} s")
    report: dict[str, Any] = {"environment": describe_machine("cuda"), "problems": problems, "results": []}
    click.echo(HEADER)
    widths = [int(w) for w in windows.split(",")]
    for size in map(int, sizes.split(",")):
        network = expert_layer(size)
        for n in map(int, rows.split(",")):
            layer = layer_of_rows(size, n // TOP_K)
            forward = forward_of(network, layer)
            for window in widths:
                for text in ("static:0.9", *(["static:0.9,correct"] if n == 32768 and window == 128 else [])):
                    r = measure(layer, forward, f"{text},local,window={window}", repeats, by_torch=n == 32768)
                    report["results"].append(r)
                    click.echo(line(r))
    click.echo(f"all: {time.monotonic() - began:.0f} s")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    if problems:
        raise SystemExit(1)


@main.command()
@click.option("--windows", default="64,128", show_default=True)
def tune(windows: str) -> None:
    """Try other settings of the choosing kernel, to choose its defaults by; about a minute of compiling a window."""
    for window in map(int, windows.split(",")):
        for size, rows in ((768, 8192), (768, 65536), (4096, 65536)):
            for r in try_settings(size, rows // TOP_K, window):
                click.echo(json.dumps(r))


@main.command()
@click.option("--repeats", default=9, show_default=True)
def graph(repeats: int) -> None:
    """The paper's whole graph, by kernels and by torch operations: milliseconds with launches, launches, memory."""
    scheme = parse_condense("paper")
    assert scheme is not None
    click.echo("| tokens | by sequence | causal | path | ms | launches | MB | kept |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for lengths in ((450,) * 12, (300, 500, 80, 512) * 8):
        layer = alike_layer(1, lengths, 768, NUM_EXPERTS, TOP_K, ep_size=8, dtype=torch.bfloat16, exact=False)
        layer = layer.to(torch.device("cuda"))
        for by_sequence, causal, kernel in itertools.product((True, False), repeat=3):
            flags = {"causal": causal, "by_sequence": by_sequence, "kernel": kernel}
            decide = functools.partial(layer.decide_after, scheme=scheme, threshold=0.5, **flags)
            before = decide(None)[1]
            kept = float(decide(before)[0].sent.float().mean())
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            decide(before)
            memory = torch.cuda.max_memory_allocated() - held
            count = sum(n for n, _ in launches(functools.partial(decide, before)).values())
            times = []
            for _ in range(repeats):
                torch.cuda.synchronize()
                began = time.perf_counter()
                decide(before)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - began) * 1e3)
            click.echo(
                f"| {sum(lengths)} | {by_sequence} | {causal} | {'kernels' if kernel else 'torch'} | "
                f"{median(times):.2f} | {count} | {memory / 1e6:.0f} | {kept:.3f} |"
            )


@main.command()
@click.argument("file", type=click.Path(exists=True, path_type=Path))
def table(file: Path) -> None:
    """Print what `run` wrote, as docs/research/condensation.md shows it."""
    report = json.loads(file.read_text())
    click.echo(f"{report['environment']['device_name']}, torch {report['environment']['torch_version']}")
    click.echo(HEADER)
    for r in report["results"]:
        click.echo(line(r))
    for r in report["results"]:
        if "torch_decide_ms" in r:
            click.echo(
                f"{r['hidden_size']} x {r['rows']}, window {r['window']}, {r['scheme']}: with torch operations "
                f"{r['torch_decide_ms']:.3f} ms in {r['torch_launches']} launches"
            )


if __name__ == "__main__":
    main()
