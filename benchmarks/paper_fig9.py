"""Figure 9 of the paper: what migration and condensation do alone, and together.

    python benchmarks/paper_fig9.py --device cpu --ranks 4 --link 250mbit --out runs/bench

A condensed token that moves must send its stream home to home, so the two savings do not multiply.
"""

from compare_tools import Cell, Study, bars, main, step_seconds

from luffy.report.compare_table import total_bytes
from luffy.report.units import format_bytes

RECIPES = (
    "vanilla,vanilla_dedup;migration=luffy;condensation=vanilla_dedup --condense static:0.9;"
    "both=luffy --condense static:0.9"
)


def cells(s):
    models = ("moe-gpt2",) if s.small else ("moe-gpt2", "moe-transformer-xl")
    return [Cell(model, RECIPES, s.model(model)) for model in models]


def table(found):
    rows = [
        [model, s["label"], f"{step_seconds(s):.3f}", f"{s['speedup_over'].get('vanilla', 1.0):.2f}",
         format_bytes(total_bytes(s)), f"{s['valid_loss']:.3f}"]
        for model, summaries in found.items()
        for s in summaries
    ]  # fmt: skip
    return ["model", "recipe", "s/step", "over vanilla", "bytes a step", "held-out loss"], rows


STUDY = Study(
    "paper_fig9",
    "Migration alone, condensation alone, both",
    cells,
    table,
    lambda found: bars(found, step_seconds, "Ablation", "seconds a step (median)"),
)

if __name__ == "__main__":
    main(STUDY)
