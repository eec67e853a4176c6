"""Figure 10 of the paper: thresholds of condensation, fixed and adaptive: time and loss.

    python benchmarks/paper_fig10.py --device cuda --ranks 8 --link 4gbit --out runs/bench -- --data FOLDER

Fixed cosines, and the paper's threshold, which falls with the loss.
"""

from compare_tools import Cell, Study, main, step_seconds

from luffy.report import style
from luffy.report.compare_figures import COLOURS

RECIPES = (
    "none=vanilla_dedup;0.95=vanilla_dedup --condense static:0.95;0.9=vanilla_dedup --condense static:0.9;"
    "0.8=vanilla_dedup --condense static:0.8;0.5=vanilla_dedup --condense static:0.5;"
    "paper=vanilla_dedup --condense paper"
)
SMALL_RECIPES = (
    "none=vanilla_dedup;0.9=vanilla_dedup --condense static:0.9;0.5=vanilla_dedup --condense static:0.5;"
    "paper=vanilla_dedup --condense paper"
)


def cells(s):
    return [Cell("moe-gpt2", SMALL_RECIPES if s.small else RECIPES, s.model("moe-gpt2"))]


def table(found):
    rows = [
        [s["label"], f"{100 * (s['copies_kept'] if s.get('copies_kept') is not None else 1):.0f} %",
         f"{step_seconds(s):.3f}", f"{s['speedup_over'].get('none', 1.0):.2f}", f"{s['valid_loss']:.3f}"]
        for s in found["moe-gpt2"]
    ]  # fmt: skip
    return ["threshold", "copies kept", "s/step", "over none", "held-out loss"], rows


def figure(found):
    picture, axes = style.new_figure()
    for s, colour in zip(found["moe-gpt2"], COLOURS, strict=False):
        low, middle, high = s["step_seconds"]
        axes.plot([low, high], [s["valid_loss"]] * 2, color=colour, linewidth=1, alpha=0.6)
        axes.plot(middle, s["valid_loss"], marker="o", linestyle="none", color=colour, label=s["label"])
    axes.set(xlabel="seconds a step (median, quartiles)", ylabel="held-out loss (nats)")
    axes.margins(0.1)
    axes.grid()
    style.titles(axes, "Threshold: time against loss", "lower left is better")
    style.legend_below(axes, columns=4)
    return picture


STUDY = Study("paper_fig10", "Condensation's threshold: time and loss", cells, table, figure, steps=80)

if __name__ == "__main__":
    main(STUDY)
