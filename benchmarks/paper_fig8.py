"""Figure 8 of the paper: end-to-end speed of every recipe over `vanilla`, by model.

    python benchmarks/paper_fig8.py --device cpu --ranks 4 --link 250mbit --out runs/bench

Ratios of median step times. The runs are those of Tables 1 and 3.
"""

from compare_tools import Study, bars, by_recipe, main
from paper_cells import cells


def speedup(summary):
    return summary["speedup_over"].get("vanilla", 1.0)


STUDY = Study(
    "paper_fig8",
    "Speed of a step over vanilla's, by model and recipe",
    cells,
    lambda found: by_recipe(found, "model", speedup, "{:.2f}"),
    lambda found: bars(found, speedup, "End-to-end speed-up", "times as fast as vanilla", "%.2f"),
)

if __name__ == "__main__":
    main(STUDY)
