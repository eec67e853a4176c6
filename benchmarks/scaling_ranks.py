"""How do tokens per second grow with ranks? Weak scaling: four sequences a rank, the same 16 experts.

    python benchmarks/scaling_ranks.py --device cpu --ranks 8 --link 250mbit --out runs/bench

Ranks are 2, 4, 8, ... up to --ranks. They share this machine's cores (or its GPUs): compare recipes, not sizes.
"""

from compare_tools import Cell, Study, by_recipe, lines, main


def cells(s):
    sizes = [n for n in (2, 4, 8, 16) if n <= s.ranks]
    options = [*s.model("moe-gpt2"), "--experts", "16"]
    return [Cell(str(n), "vanilla,vanilla_dedup,luffy", options, ranks=n) for n in sizes]


def rate(summary):
    return summary["tokens_per_second"] / 1e3


STUDY = Study(
    "scaling_ranks",
    "Thousand tokens per second by number of ranks",
    cells,
    lambda found: by_recipe(found, "ranks", rate, "{:.2f}"),
    lambda found: lines(found, rate, "Throughput by ranks", "ranks (they share one machine)", "thousand tokens/s"),
)

if __name__ == "__main__":
    main(STUDY)
