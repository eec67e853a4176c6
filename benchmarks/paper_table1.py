"""Table 1 of the paper: how much of a step is communication, by model, where pairs travel (`vanilla`) and after?

    python benchmarks/paper_table1.py --device cpu --ranks 4 --link 250mbit --out runs/bench

Communication is the time in which a rank waits for rows or for the sums of gradients. The runs are those of Table 3
and Figure 8.
"""

from compare_tools import Study, bars, by_recipe, communication, main
from paper_cells import cells


def share(summary):
    return 100 * communication(summary) / sum(summary["phase_seconds"].values())


STUDY = Study(
    "paper_table1",
    "Share of communication in a mean step, in percent, by model and recipe",
    cells,
    lambda found: by_recipe(found, "model", share, "{:.0f}"),
    lambda found: bars(found, share, "Communication in a step", "% of a mean step", "%.0f"),
)

if __name__ == "__main__":
    main(STUDY)
