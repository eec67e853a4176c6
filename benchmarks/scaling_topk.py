"""What does a larger top-k cost? Top-1, 2, 4, 8 of 16 experts: pairs grow with k, copies only with ranks.

python benchmarks/scaling_topk.py --device cpu --ranks 4 --link 250mbit --out runs/bench
"""

from compare_tools import Cell, Study, by_recipe, lines, main

from luffy.report.compare_table import total_bytes


def cells(s):
    options = [*s.model("moe-gpt2"), "--experts", "16"]
    return [
        Cell(str(k), "vanilla,vanilla_dedup,luffy", [*options, "--top-k", str(k)])
        for k in ((1, 2, 4) if s.small else (1, 2, 4, 8))
    ]


def moved(summary):
    """MB of token rows: what the other bytes (gradients, control) are does not depend on k."""
    return (total_bytes(summary) - summary["step_bytes"]["gradients"] - summary["step_bytes"]["control"]) / 1e6


def table(found):
    seconds = by_recipe(found, "top-k", lambda s: s["step_seconds"][1])
    mega = by_recipe(found, "top-k", moved, "{:.2f}")
    head = ["top-k", *(f"{x} s/step" for x in seconds[0][1:]), *(f"{x} MB" for x in mega[0][1:])]
    return head, [[*a, *b[1:]] for a, b in zip(seconds[1], mega[1], strict=True)]


STUDY = Study(
    "scaling_topk",
    "Seconds a step (median), and MB of rows that leave a rank in it, by top-k",
    cells,
    table,
    lambda found: lines(found, moved, "Rows on the wire by top-k", "experts a token chooses", "MB a step, all ranks"),
)

if __name__ == "__main__":
    main(STUDY)
