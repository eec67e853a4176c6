"""Table 4 of the paper: what each recipe costs in quality. Held-out loss after the same steps on the same data.

    python benchmarks/paper_table4.py --device cuda --ranks 8 --out runs/bench -- --data FOLDER

Repeats differ in their seed, so the range says what is noise. Lossless recipes differ by rounding alone; those that
condense (`paper`, `lsh`, `corrected`) or send fewer bits (`int8`) are what the table is about.
"""

from compare_tools import Cell, Study, bars, main

RECIPES = (
    "vanilla_dedup,luffy;int8=vanilla_dedup --wire int8;paper=luffy_paper;lsh=lsh_moe_causal;"
    "corrected=vanilla_dedup --condense static:0.9,correct"
)


def cells(s):
    models = ("moe-gpt2",) if s.small else ("moe-gpt2", "moe-transformer-xl")
    repeats = 1 if s.small else 3
    return [Cell(m, RECIPES, s.model(m), repeats=repeats, extra=["--vary-seed"]) for m in models]


def loss(summary):
    return summary["valid_loss"]


def table(found):
    rows = []
    for model, summaries in found.items():
        for s in summaries:
            low, high = s["valid_loss_range"]
            spread, above = f"{low:.3f} to {high:.3f}", f"{loss(s) - loss(summaries[0]):+.3f}"
            kept = "–" if s.get("copies_kept") is None else f"{100 * s['copies_kept']:.0f} %"
            rows.append([model, s["label"], f"{loss(s):.3f}", spread, above, kept])
    return ["model", "recipe", "held-out loss", "range of seeds", "against the first", "copies kept"], rows


def rise(found):
    """Held-out loss above that of the cell's first recipe."""
    return {
        model: [s | {"rise": loss(s) - loss(summaries[0])} for s in summaries[1:]] for model, summaries in found.items()
    }


STUDY = Study(
    "paper_table4",
    "Held-out loss by recipe",
    cells,
    table,
    lambda found: bars(rise(found), lambda s: s["rise"], "Price in quality", "nats above vanilla_dedup", "%+.3f"),
    steps=120,
)

if __name__ == "__main__":
    main(STUDY)
