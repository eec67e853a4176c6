"""At which rates of links does which recipe win? One lab a rate, the same model in each.

    sudo .venv/bin/python benchmarks/bandwidth_sweep.py --ranks 4 --link 100mbit,250mbit,1gbit --out runs/bench

Needs root, as it makes networks. What the links really give is measured in every lab and stands in the JSON.
"""

from compare_tools import Cell, Study, by_recipe, lines, main, step_seconds


def cells(s):
    recipes = "vanilla,vanilla_dedup,luffy" if s.small else "vanilla,vanilla_dedup,janus,luffy"
    return [Cell(link or "not shaped", recipes, s.model("moe-gpt2"), link=link) for link in s.links]


STUDY = Study(
    "bandwidth_sweep",
    "Seconds a step (median) by rate of a rank's link",
    cells,
    lambda found: by_recipe(found, "link", step_seconds),
    lambda found: lines(found, step_seconds, "Step time by bandwidth", "rate of a rank's link", "seconds a step"),
    cpu_links=("100mbit", "250mbit", "1gbit"),
    gpu_links=("1gbit", "4gbit", "8gbit"),
)

if __name__ == "__main__":
    main(STUDY)
