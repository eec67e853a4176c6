"""Run folders made up from numbers, and a reader of pages that checks that they are well formed."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from luffy.report.runs import BYTE_KINDS, SECONDS_KINDS, read_run, totals, write_json_atomic
from luffy.report.summaries import set_side_by_side, summarise

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest and ids are unique, and collects what the page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        self.resources += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def make_run(out: Path, steps: int, *, full: bool = True, layers: int = 3, experts: int = 4) -> Path:
    """A synthetic run folder; `full=False` has the required keys alone and no summary."""
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        seconds = 0.5 + 0.1 * float(random.random())
        traffic = {kind: int(random.integers(10**6, 10**7)) for kind in BYTE_KINDS}
        record = {"step": step, "loss": 3 + 6 / step, "tokens": 4096, "seconds": seconds, "bytes": traffic}
        if full:
            record["seconds_split"] = dict.fromkeys(SECONDS_KINDS, seconds / len(SECONDS_KINDS))
            record["bytes_by_link"] = {"local": 10**6, "intra_node": 2 * 10**6, "inter_node": 10**7}
            record["expert_load"] = random.integers(1, 100, (layers, experts)).tolist()
            if step % 10 == 0:
                record["valid_loss"] = 3.2 + 6 / step
        records.append(record)
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if full:
        environment = {"device": "cpu", "device_name": "Some CPU", "host": "Some CPU, 2 cores", "torch_version": "2.13"}
        named = {"recipe": "luffy", "model": "moe-gpt2-tiny", "world_size": 4, "peak_memory_bytes": 10**9}
        write_json_atomic(out / "summary.json", named | totals(records) | {"environment": environment})
        options = {"recipe": "luffy", "lr": 1e-3, "tokenizer": None, "text": "<script>alert('x')</script> & \"more\""}
        write_json_atomic(out / "config.json", {"options": options, "model": {"hidden_size": 128}})
    return out


LAB = {
    "ranks": 4,
    "nodes": 2,
    "nic": "node",
    "topology": "2x2:intra=80mbit,inter=40mbit",
    "latency_seconds": 0.0,
    "links": {
        "intra_node": {"asked_bytes_per_second": 1e7, "together_bytes_per_second": 1e7},
        "inter_node": {"asked_bytes_per_second": 1e7, "together_bytes_per_second": 1e7},
    },
}
NAMES = (
    "vanilla",
    "luffy --locality-loss 0.02 --rehome-every 100",
    "vanilla_dedup --condense static:0.9,correct",
    "peer",
)


def make_comparison(folder: Path, ranks: int = 4) -> Path:
    """`compare.json` and runs with everything that a page can show: links, matrices, condensation, a peer."""
    summaries, runs = [], []
    random = np.random.default_rng(1)
    for number, label in enumerate(NAMES):
        out = make_run(folder / f"run-{number}", 60)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for r in records:
            r["seconds"] /= 1 + 0.3 * number
            r["seconds_split"] = {
                k: v * r["seconds"] for k, v in zip(SECONDS_KINDS, (0.1, 0.2, 0.4, 0.02, 0.03, 0.05, 0.2), strict=False)
            }
            r["locality"] = {"favourite_rank_share": 0.3 + 0.1 * number}
            if "condense" in label:
                r["condense"] = {"kept": 0.5, "layer_00": {"kept": 0.4}, "layer_01": {"kept": 0.6}}
            if number == 1:
                r["exchange_hidden_seconds"] = 0.1
            if label == "peer":
                del r["seconds_split"], r["locality"]
        (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        summary = json.loads((out / "summary.json").read_text())
        summary |= totals(records) | {"recipe": label.split()[0], "provenance": "emulated", "network": "emulated links"}
        if label != "peer":
            matrix = random.integers(10**6, 10**7, (ranks, ranks)).tolist()
            summary |= {"lab": LAB, "ep_size": ranks, "traffic": {"steps": 60, "bytes": matrix}}
        write_json_atomic(out / "summary.json", summary)
        runs.append([read_run(out)])
        about = {"folders": [out.name], "own_options": {"locality_loss": 0.02} if number == 1 else {}}
        about |= {"elsewhere": True, "differs": ["pairs travel <one by one>"]} if label == "peer" else {}
        summaries.append(summarise(label, runs[-1]) | about)
    set_side_by_side(summaries, runs)
    write_json_atomic(folder / "compare.json", summaries)
    return folder
