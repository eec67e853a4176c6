"""The command line. Every field of TrainOptions is an option; a user's mistake is one line and exit status 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from luffy.config import PRESETS
from luffy.errors import StoppedError, UserError
from luffy.hf.options import SHOWN, FinetuneOptions
from luffy.lab.cli import lab
from luffy.recipes import RECIPES
from luffy.train.commands import RunCommand
from luffy.train.option_parser import options_of, train_options
from luffy.train.options import TrainOptions
from luffy.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="luffy")
def cli() -> None:
    """Train Mixture-of-Experts models across slow links by moving fewer bytes."""


OFTEN = ("recipe", "model", "data", "out", "ranks", "steps", "batch_size", "lr", "device", "resume")


@cli.command(cls=RunCommand, first=OFTEN, short_help="Train a model.")
@train_options
def train(**values: Any) -> None:
    """Train a model: start --ranks ranks on this machine, or join the ranks that torchrun started."""
    from luffy.train.run import start

    start(TrainOptions(**values))


@cli.command(cls=RunCommand, first=OFTEN[1:], short_help="Train with several recipes and compare them.")
@click.option(
    "--recipes",
    required=True,
    help="Recipes to compare, separated by commas; with options of their own, by semicolons: "
    '"vanilla;luffy --locality-loss 0.02;fast=vanilla_dedup --wire int8" (fast is the name it gets).',
)
@click.option("--repeats", default=1, show_default=True, help="Runs of each recipe, in turn (A B A B ...).")
@click.option("--vary-seed", is_flag=True, help="Each repeat takes the next seed (default: all the same).")
@click.option("--target-loss", type=float, help="Held-out loss to reach (default: what the first recipe ends with).")
@click.option("--also", default="", help="Folders of runs made elsewhere, separated by commas, to show beside these.")
@click.option("--discard-checkpoints", is_flag=True, help="Remove a run's checkpoints when it is finished.")
@train_options
def compare(
    recipes: str,
    repeats: int,
    vary_seed: bool,
    target_loss: float | None,
    also: str,
    discard_checkpoints: bool,
    **values: Any,
) -> None:
    """Train with several recipes on the same data and seed, and compare them. --recipe is ignored.

    With --resume, finished runs are kept and a stopped run continues.
    """
    from luffy.train.compare import Comparison

    Comparison(
        recipes,
        TrainOptions(**values),
        repeats=repeats,
        vary_seed=vary_seed,
        target_loss=target_loss,
        also=tuple(name for name in also.split(",") if name),
        discard_checkpoints=discard_checkpoints,
    ).run()


@cli.command(short_help="Predict bytes and seconds on another cluster; give advice.")
@click.option(
    "--trace", required=True, type=click.Path(path_type=Path), help="A run, its trace folder, or one trace file."
)
@click.option("--topology", "spec", required=True, help="The cluster, such as 4x8:intra=200gbit,inter=25gbit.")
@click.option(
    "--recipes",
    default=",".join(sorted(RECIPES, key=lambda name: not name.startswith("vanilla"))),
    show_default=True,
    help="Recipes, separated by commas.",
)
@click.option(
    "--ep-size",
    type=int,
    help="Ranks that share experts; the others are copies of that group (default: as many as possible).",
)
@click.option("--wire", help="Format of rows, as in luffy train (default: each recipe's).")
@click.option(
    "--layout",
    type=click.Choice(["packed", "padded"]),
    default="packed",
    show_default=True,
    help="Attention over packed or padded batches.",
)
@click.option("--compute-seconds", type=float, help="Seconds of computation in a step; with it, step times are shown.")
@click.option(
    "--expert-flops",
    default=1e14,
    show_default=True,
    help="Floating-point operations per second of a rank (for fastermoe).",
)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the numbers here.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw them here (PNG).")
def plan(**values: Any) -> None:
    """Predict what every recipe sends on a cluster that you do not have, and say which one to take.

    The routing comes from a run with --trace-every 10. Bytes are counted by replaying it; seconds are predicted from
    the rates that --topology gives.
    """
    from luffy.train.plan import run_plan

    run_plan(**values)


@cli.command(short_help="Compare four recipes on a small model, in two minutes.")
@click.option("--out", default="runs/demo", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--data", default="stdlib", show_default=True, help="File or folder of text, or stdlib (offline).")
@click.option("--link", default="50mbit", show_default=True, help="Rate of emulated links, which need root; or none.")
@click.option("--start-steps", default=80, show_default=True, help="Steps of the model that all recipes begin from.")
@click.option("--steps", default=12, show_default=True, help="Steps of each recipe.")
@click.option("--since", type=float, help="Count the time from here (seconds of the epoch; default: now).")
def demo(out: Path, data: str, link: str, start_steps: int, steps: int, since: float | None) -> None:
    """Compare vanilla, luffy, luffy_paper and luffy_max on a small model, in about two minutes on two cores."""
    from luffy.train.demo import run_demo

    run_demo(out, data, start_steps, steps, None if link == "none" else link, since)


@cli.command("recipes")
def list_recipes() -> None:
    """List the recipes."""
    width = max(map(len, RECIPES))
    for recipe in RECIPES.values():
        click.echo(f"{recipe.name:<{width}}  {recipe.summary}")


@cli.command()
def models() -> None:
    """List the model presets."""
    width = max(map(len, PRESETS))
    for name, c in PRESETS.items():
        click.echo(
            f"{name:<{width}}  {c.num_layers} blocks x {c.hidden_size}, {c.router.num_experts} experts of "
            f"{c.expert_hidden_size}, top-{c.router.top_k}, {'decoder' if c.causal else 'encoder'}, "
            f"{c.position} positions, {c.norm_placement}-norm, length {c.max_sequence_length}"
        )


@cli.command(short_help="Write the HTML report of a run again.")
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write the HTML report again. RUN is the folder of a run or of a comparison."""
    from luffy.report.compare import COMPARE_FILE, write_compare_report
    from luffy.report.html import write_run_report

    click.echo(write_compare_report(run) if (run / COMPARE_FILE).exists() else write_run_report(run, "RUN"))


@cli.command(
    cls=RunCommand,
    first=("model", "data", *(name for name in OFTEN[3:] if name != "device"), "lora"),
    short_help="Fine-tune a Hugging Face MoE model.",
)
@options_of(FinetuneOptions, SHOWN)
def finetune(**values: Any) -> None:
    """Fine-tune a Hugging Face MoE model. The result, OUT/model, opens in plain transformers."""
    from luffy.hf.finetune import start

    start(FinetuneOptions(**values))


@cli.command(short_help="Make an MoE model of a dense one.")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Folder of a dense Llama or Qwen3 model.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the MoE model.")
@click.option("--experts", default=8, show_default=True, help="Copies of each feed-forward.")
@click.option("--top-k", default=2, show_default=True, help="Experts per token.")
@click.option("--noise", default=0.02, show_default=True, help="Standard deviation of the new routers' weights.")
@click.option("--seed", default=0, show_default=True, help="Seed of the routers' weights.")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
def upcycle(**values: Any) -> None:
    """Make a Mixture-of-Experts of a dense model. Every expert is a copy of its feed-forward: the loss is the same."""
    from luffy.hf.upcycle import upcycle as run

    run(**values)


@cli.command(short_help="Show versions, GPUs, measured links, models that fit.")
@click.option("--ranks", type=click.IntRange(1), help="Ranks to measure links between (default: one per GPU or core).")
def doctor(ranks: int | None) -> None:
    """Show what is installed, what this machine has, how fast its links are, and which models fit."""
    from luffy.train.doctor import diagnose

    diagnose(ranks)


cli.add_command(lab)


def run_group(group: click.Group, program: str, speaker: str, arguments: list[str] | None = None) -> None:
    """Run a group of commands as `program`: one line and status 2 for a user's mistake, 130 for Ctrl-C, 1 for a defect.

    speaker: who the line says the error is from.
    """

    def fail(message: str, status: int) -> None:
        print(f"{speaker}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(status)

    try:
        group.main(args=arguments, prog_name=program, standalone_mode=False)
    except UserError as error:
        fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        fail(error.format_message().replace("\n", " "), 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("transformers", "peft"):
            raise
        fail(f"this needs the package {package}, which is not installed: pip install 'luffy-moe[hf]'", 2)
    except StoppedError as error:
        print(f"{speaker}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except (click.Abort, KeyboardInterrupt):
        fail("stopped", 130)
    except RuntimeError as error:
        fail(str(error), 1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `luffy`."""
    run_group(cli, "luffy", "luffy", arguments)


if __name__ == "__main__":
    main()
