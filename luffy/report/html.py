"""One page that tells a training run: what ran, on what, what came out, and the pictures.

The page is a single file that asks nothing of the network: styles are inside it, figures are data URIs, and
there is no script. It can be mailed, kept, or opened in ten years.

Numbers keep their origin. A page says whether its times were *measured* on the hardware it names, *emulated*
(real ranks behind links that were slowed on purpose) or *predicted* by the cost model, and never mixes them:
the word comes from `provenance` in the summary or the options; where nothing was said it is `measured`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from luffy.report.figures import write_pictures
from luffy.report.runs import BYTE_KINDS, REPORT_FILE, SECONDS_KINDS, Run, read_run, write_bytes_atomic
from luffy.report.style import data_uri, label_of
from luffy.report.units import DASH, format_bytes, format_count, format_loss, format_rate, format_seconds, format_share
from luffy.version import __version__

PROVENANCE = ("measured", "emulated", "predicted")

# Shown in the header, the tiles or the tables below, hence not again among the rest of the summary.
_SHOWN = {"bytes", "seconds", "environment", "provenance", "network", "traffic"}


def render(template: str, **context: Any) -> str:
    """A template of this package, filled. Unknown names are errors, and every value is escaped."""
    environment = Environment(
        loader=PackageLoader("luffy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template(template).render(version=__version__, **context)


def flatten(obj: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested options as rows: `("options.lr", "0.001")`."""
    for key, value in obj.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif value is None:
            yield name, DASH
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or DASH
        elif isinstance(value, float):
            yield name, f"{value:.6g}"
        else:
            yield name, str(value)


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers that a reader came for: (what, value, a quiet word beside it)."""
    summary, steps = run.summary, len(run.records)
    valid, moved = summary.get("valid_loss"), sum(summary["bytes"].values())
    perplexity = f"perplexity {format_count(math.exp(min(valid, 700)))}" if valid is not None else ""
    seconds = summary["total_seconds"] if "total_seconds" in summary else sum(summary["seconds"].values())
    peak = summary.get("peak_memory_bytes")
    return [
        ("held-out loss", format_loss(valid), perplexity if valid is not None else "not measured"),
        ("training loss, last step", format_loss(summary.get("final_loss")), "nats per token"),
        ("speed", format_rate(summary.get("tokens_per_second"), "tokens"), "all ranks together, after warm-up"),
        ("time per step", format_seconds(seconds / steps), f"{format_seconds(seconds)} in all"),
        ("bytes per step", format_bytes(moved / steps), f"{format_bytes(moved)} in all, leaving a rank"),
        ("peak memory", format_bytes(peak or None), "of the rank that used most" if peak else "not measured"),
    ]


def breakdown(totals: Mapping[str, float], steps: int, kinds: tuple[str, ...], form: Any) -> list[list[str]]:
    """Rows (kind, per step, in all, share) with a last row that sums them up."""
    whole = sum(totals.values())
    rows = [
        [label_of(kind), form(totals.get(kind, 0) / steps), form(totals.get(kind, 0)), share]
        for kind in kinds
        if (share := format_share(totals.get(kind, 0), whole))
    ]
    return [*rows, ["all", form(whole / steps), form(whole), "100 %" if whole else "0 %"]]


def origin(run: Run) -> dict[str, str]:
    """Where the numbers come from: a word, and what they were measured (emulated, predicted) on."""
    word = run.lookup("provenance")
    word = word if word in PROVENANCE else "measured"
    ranks, host = run.lookup("world_size", "ranks"), str(run.lookup("host") or "")
    device = str(run.lookup("device_name", "device") or "")
    parts = [f"{ranks} rank" + ("" if ranks == 1 else "s") if ranks else ""]
    parts += ["" if host.startswith(device) else device, host]  # a CPU run's device is its host
    parts += [run.lookup("network", "link")]
    if torch_version := run.lookup("torch_version"):
        parts.append(f"torch {torch_version}")
    text = ", ".join(dict.fromkeys(str(part) for part in parts if part))
    return {"word": word, "text": text}


def what_ran(run: Run) -> list[tuple[str, str]]:
    """The run's identity, as far as its files know it."""
    rows = [
        ("recipe", run.lookup("recipe")),
        ("model", run.lookup("model")),
        ("ranks", run.lookup("world_size", "ranks")),
        ("EP size", run.lookup("ep_size")),
        ("device", run.lookup("device")),
        ("precision", run.lookup("dtype")),
        ("steps", run.summary["steps"]),
        ("tokens", format_count(run.summary.get("total_tokens"))),
        ("data", run.lookup("data")),
        ("seed", run.lookup("seed")),
        ("torch", run.lookup("torch_version")),
        ("host", run.lookup("host")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None and not isinstance(value, dict)]


def write_run_report(out_dir: str | os.PathLike[str], option: str = "--out") -> Path:
    """Write the pictures (`loss.png`, ...) and `report.html` of the run in `out_dir`; the page's path.

    option: see `read_run`.
    """
    out_dir = Path(out_dir)
    run = read_run(out_dir, option)
    pictures = write_pictures(run, out_dir)
    summary, steps = run.summary, len(run.records)
    split = {kind: summary["seconds"].get(kind, 0.0) for kind in SECONDS_KINDS}
    timed = sum(split.values()) > split["other"]  # stages that nobody timed are not zero seconds long
    identity = dict(what_ran(run))
    page = render(
        "run.html.j2",
        title=" · ".join(identity[key] for key in ("recipe", "model") if key in identity) or out_dir.name,
        origin=origin(run),
        identity=identity,
        tiles=tiles(run),
        pictures=pictures,
        bytes_rows=breakdown(summary["bytes"], steps, BYTE_KINDS, format_bytes),
        seconds_rows=breakdown(split, steps, SECONDS_KINDS, format_seconds) if timed else [],
        summary_rows=list(flatten({key: item for key, item in summary.items() if key not in _SHOWN})),
        option_rows=list(flatten(run.config)),
    )
    path = out_dir / REPORT_FILE
    write_bytes_atomic(path, page.encode())
    return path
