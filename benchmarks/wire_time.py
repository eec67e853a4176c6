"""Do coded rows pay on the CPU? Encode, exchange and decode against the plain exchange, behind links of several rates.

    sudo python benchmarks/wire_time.py run --out docs/results/wire_time.json      (Linux; needs network namespaces)

Starts itself in the lab once a rate (`luffy lab --ranks N --link RATE`): N ranks, each behind a link of its own. Every
rank sends an equal share of its rows to every other and gets as many back, forward and backward, as a layer's dispatch
does; formats take turns. Seconds are the slowest rank's, medians of the repeats. *Emulated*: the processors are this
machine's, shared by all ranks; the links are narrow. `--rates none` runs without the lab, over loopback.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from luffy.comm import Comm, RowExchange, all_to_all_rows
from luffy.exchange.wire import AS_THEY_ARE, WireCodecs, row_codec
from luffy.train.launch import join_world
from luffy.train.metrics import describe_machine, write_json_atomic


def measure(rows: int, size: int, dtype: torch.dtype, formats: list[str], repeats: int, comm: Comm) -> dict[str, Any]:
    """Seconds of one exchange there and back of `rows` rows a rank, by format; the slowest rank's."""
    mesh = comm.mesh
    share = rows // max(1, mesh.ep_size - 1)
    splits = tuple(0 if r == mesh.ep_rank else share for r in range(mesh.ep_size))
    exchange = RowExchange(comm, splits, splits)
    x = torch.randn(rows, size, dtype=dtype, requires_grad=True)
    index = torch.arange(sum(splits)) % rows
    gradient = torch.randn(sum(splits), size, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in formats}
    codec_times: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name in formats:
            wire = AS_THEY_ARE if name == "model" else WireCodecs(row_codec(name), row_codec(name))
            comm.all_reduce(torch.zeros(1))
            begin = time.perf_counter()
            if name == "model":
                sent, codecs = x[index], wire.plain
            else:
                sent, codecs = x, wire.gathering(index, rows)
            (got,) = all_to_all_rows(
                [sent], exchange, directions=("dispatch",), backward_directions=("dispatch_backward",), codecs=(codecs,)
            )
            got.backward(gradient)
            seconds = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
            slowest = float(comm.all_gather_world(seconds).max())
            x.grad = None
            if turn:  # the first warms up
                times[name].append(slowest)
    for name in formats:
        if name != "model":
            begin = time.perf_counter()
            coded = row_codec(name).encode(x.detach(), index)
            middle = time.perf_counter()
            row_codec(name).decode(coded, size, dtype)
            codec_times[name] = time.perf_counter() - begin
            codec_times[f"{name} encode"] = middle - begin
    return {
        "seconds": {n: median(t) for n, t in times.items()},
        "spread_seconds": {n: [min(t), max(t)] for n, t in times.items()},
        "codec_seconds": codec_times,
    }


@click.group()
def main() -> None:
    """Time exchanges with and without codes."""


@main.command()
@click.option("--ranks", default=4, show_default=True)
@click.option("--rates", default="1gbit,4gbit,10gbit", show_default=True, help="Links; none: no lab, loopback.")
@click.option("--rows", default=4096, show_default=True, help="Rows that each rank sends.")
@click.option("--sizes", default="768,2048", show_default=True)
@click.option("--formats", default="model,bf16,int16,int8,int4", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--repeats", default=9, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path))
def run(ranks: int, rates: str, rows: int, sizes: str, formats: str, dtype: str, repeats: int, out: Path) -> None:
    """Start the ranks once a rate, print a table, write JSON."""
    results = []
    for rate in rates.split(","):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "result.json"
            command = [sys.executable, __file__, "rank", "--rows", str(rows), "--sizes", sizes, "--formats", formats]
            command += ["--dtype", dtype, "--repeats", str(repeats), "--out", str(target)]
            if rate == "none":
                start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
                command = [sys.executable, *start, *command[1:]]
            else:
                lab = ["-m", "luffy.train.cli", "lab", "--ranks", str(ranks), "--link", rate, "--"]
                command = [sys.executable, *lab, *command]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise click.ClickException(f"{rate}: {done.stderr.strip()[-1500:]}")
            results += [{"link": rate, **r} for r in json.loads(target.read_text())]
    names = formats.split(",")
    click.echo(f"seconds there and back, {rows} rows a rank, {ranks} ranks, {dtype}")
    click.echo("| link | d | " + " | ".join(names) + " |")
    click.echo("| --- | --- |" + " --- |" * len(names))
    for r in results:
        plain = r["seconds"].get("model")
        cells = [f"{r['seconds'][n]:.3f}" + (f" ({plain / r['seconds'][n]:.2f}x)" if plain else "") for n in names]
        click.echo(f"| {r['link']} | {r['hidden_size']} | " + " | ".join(cells) + " |")
    content = {"environment": describe_machine("cpu"), "provenance": "emulated", "ranks": ranks, "rows": rows,
               "dtype": dtype, "results": results}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out, content)


@main.command(hidden=True)
@click.option("--rows", type=int, required=True)
@click.option("--sizes", required=True)
@click.option("--formats", required=True)
@click.option("--dtype", required=True)
@click.option("--repeats", type=int, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path))
def rank(rows: int, sizes: str, formats: str, dtype: str, repeats: int, out: Path) -> None:
    """What one rank does."""
    mesh = join_world("cpu", "gloo", None, None, 600.0)
    torch.set_num_threads(1)
    comm, results = Comm.create(mesh), []
    for size in map(int, sizes.split(",")):
        got = measure(rows, size, getattr(torch, dtype), formats.split(","), repeats, comm)
        results.append({"hidden_size": size, **got})
    if mesh.rank == 0:
        out.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
