"""What do more experts cost? Top-2 of 8, 16, 32, ... experts on the same ranks.

    python benchmarks/scaling_experts.py --device cpu --ranks 4 --link 250mbit --out runs/bench

Copies are the fewer, the more of a token's experts share a rank; that does not change with the number of experts,
but the memory, the gradients' bytes and the size of each expert's batch do.
"""

from compare_tools import Cell, Study, by_recipe, lines, main, step_seconds


def cells(s):
    counts = (8, 16, 32) if s.small else (8, 16, 32, 64)
    recipes = "vanilla,vanilla_dedup,luffy"
    return [Cell(str(n), recipes, [*s.model("moe-gpt2"), "--experts", str(n)]) for n in counts if n % s.ranks == 0]


STUDY = Study(
    "scaling_experts",
    "Seconds a step (median) by number of experts",
    cells,
    lambda found: by_recipe(found, "experts", step_seconds),
    lambda found: lines(found, step_seconds, "Step time by experts", "experts in a layer", "seconds a step"),
)

if __name__ == "__main__":
    main(STUDY)
