"""Do coded rows cost next to nothing on a GPU? Encode with gathering, decode with adding, beside a copy on the device.

    python benchmarks/wire_kernels.py --out docs/results/wire_kernels.json      (needs a GPU; under a minute)

`encode`: rows of a bfloat16 stream gathered by index into coded rows. `decode`: coded rows added into a float32 stream
by index, two rows a token as at top-2; `in a message`: from rows that other columns stand beside, as they arrive.
`copy`: torch's own copy of as many bfloat16 rows. GB/s count every byte that must be read or written, indices
included: for an addition, the sum is read and written. `torch`: the same by the reference, an operation at a time.
Before anything is timed, the kernels are held to their references to the bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from luffy.kernels.wire_rows import add_rows, decode_rows, encode_rows
from luffy.train.metrics import describe_machine
from luffy.wire_format import row_num_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


RATES = ("copy", "encode", "encode at random", "decode", "decode in a message")


def milliseconds(action: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # launches happen behind it, and are not timed
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def measure(name: str, rows: int, size: int, repeats: int, with_reference: bool) -> dict[str, Any]:
    device = torch.device("cuda")
    g = torch.Generator(device).manual_seed(0)
    tokens = rows // 2
    x = torch.randn(tokens, size, generator=g, device=device).bfloat16()
    index = torch.arange(rows, device=device)[torch.randperm(rows, generator=g, device=device)] % tokens
    plain, target = torch.randn(rows, size, device=device).bfloat16(), torch.empty(rows, size, device=device).bfloat16()
    total = torch.zeros(tokens, size, device=device)
    coded, width = encode_rows(x, index, name), row_num_bytes(name, size, 2)
    message = torch.cat([coded, coded[:, :12]], dim=1)[:, :width]  # beside ids and weights, as rows arrive
    actions: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(plain),
        "encode": lambda: encode_rows(x, index, name),
        "encode at random": lambda: encode_rows(x, index, name, 1),
        "decode": lambda: add_rows(total, index, coded, name),
        "decode in a message": lambda: add_rows(total, index, message, name),
        "decode without adding": lambda: decode_rows(coded, size, name, torch.bfloat16),
    }
    if with_reference:
        actions["torch encode"] = lambda: encode_rows(x, index, name, kernel=False)
        actions["torch decode"] = lambda: add_rows(total, index, coded, name, kernel=False)
    one_way = rows * (2 * size + width + 8)
    num_bytes = {"copy": 4 * rows * size, "decode": rows * (8 * size + width + 8)}
    num_bytes["decode in a message"] = num_bytes["decode"]
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {n: [] for n in actions}
    for _ in range(repeats):
        for n, action in actions.items():
            times[n] += milliseconds(action, 1)
    out: dict[str, Any] = {"format": name, "rows": rows, "hidden_size": size}
    for n, t in times.items():
        moved = num_bytes.get(n.removeprefix("torch "), one_way)
        out[n] = {"ms": median(t), "spread_ms": [min(t), max(t)], "gb_per_second": moved / median(t) / 1e6}
    return out


@click.command()
@click.option("--sizes", default="768,1024,2048,4096", show_default=True)
@click.option("--rows", default="8192,16384,32768,65536", show_default=True)
@click.option("--formats", default="int8,int4", show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(sizes: str, rows: str, formats: str, repeats: int, out: Path | None) -> None:
    """Check, print a table, and write it as JSON."""
    if not torch.cuda.is_available():
        raise click.ClickException("needs a GPU; tests/kernels hold the kernels to their references without one")
    from tests.kernels.wired import check  # after the path is set: the tests stand beside the benchmarks

    seen = check("cuda", (torch.float32, torch.bfloat16), (50, 768))
    click.echo(f"{seen} cases agree with their references to the bit\n")
    results = []
    click.echo("| format | d | rows | " + " | ".join(f"{r} GB/s" for r in RATES) + " | encode ms | decode ms |")
    click.echo("| --- | --- | --- |" + " --- |" * (len(RATES) + 2))
    for name in formats.split(","):
        for size in map(int, sizes.split(",")):
            for n in map(int, rows.split(",")):
                r = measure(name, n, size, repeats, with_reference=size == 768)
                results.append(r)
                rates = [f"{r[k]['gb_per_second']:.0f}" for k in RATES]
                cells = [name, str(size), str(n), *rates, f"{r['encode']['ms']:.3f}", f"{r['decode']['ms']:.3f}"]
                click.echo("| " + " | ".join(cells) + " |")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": describe_machine("cuda"), "cases_checked": seen, "results": results}
        out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
