"""Table 3 of the paper: computation and communication of a step, by recipe and model.

    python benchmarks/paper_table3.py --device cpu --ranks 4 --link 250mbit --out runs/bench

Communication is the time in which a rank waits for rows or for the sums of gradients; computation is the rest,
planning and condensing included. The runs are those of Table 1 and Figure 8.
"""

import numpy as np
from compare_tools import Study, communication, computation, main
from paper_cells import cells

from luffy.report import style


def table(found):
    rows = [
        [model, s["label"], f"{1e3 * computation(s):.1f}", f"{1e3 * communication(s):.1f}",
         f"{s['speedup_over'].get('vanilla', 1.0):.2f}"]
        for model, summaries in found.items()
        for s in summaries
    ]  # fmt: skip
    return ["model", "recipe", "computation ms", "communication ms", "over vanilla"], rows


def figure(found):
    labels = [(model, s) for model, summaries in found.items() for s in summaries]
    picture, axes = style.new_figure(height=1.4 + 0.21 * len(labels))
    at = np.arange(len(labels)) + 0.6 * np.array([list(found).index(model) for model, _ in labels])
    work = [computation(s) for _, s in labels]
    axes.barh(at, work, 0.8, color=style.BLUE, label="computation")
    axes.barh(at, [communication(s) for _, s in labels], 0.8, left=work, color=style.ORANGE, label="communication")
    axes.set_yticks(at, [f"{model.removeprefix('moe-')}: {s['label']}" for model, s in labels], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a mean step")
    axes.grid(axis="x")
    style.titles(axes, "The two parts of a step")
    style.legend_below(axes, columns=2)
    return picture


STUDY = Study("paper_table3", "Computation and communication of a mean step, by model and recipe", cells, table, figure)

if __name__ == "__main__":
    main(STUDY)
