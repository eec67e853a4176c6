"""Ranks with a GPU each, over NCCL: `make test-multigpu`. What holds over gloo on the CPU holds here.

Every number of GPUs that this machine has is tried, of 2, 4 and 8. All cases of a number of ranks share one launch and
one process group (`run_together`), since to start NCCL takes longer than they do; each test looks at its own outcome.
The parent process never touches CUDA, so that ranks can be forked.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luffy.comm import Comm, build_mesh
from luffy.comm.sums import GradientSums
from luffy.lab.gpus import count_gpus
from luffy.recipes import Recipe, get_recipe
from luffy.testing import run_together
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer
from tests.model.cases import Case, check_exact, shrunk, train_on_ranks
from tests.model.condensing import check_condensed_exact, condensed_step

DEVICE, BACKEND = "cuda", "nccl"
GPUS = count_gpus()
WORLDS = [n for n in (2, 4, 8) if n <= GPUS]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multigpu,
    pytest.mark.skipif(not WORLDS, reason=f"{GPUS} GPUs here; these tests need two"),
]
RANDOM = Recipe("random", "random balanced plans", placement="random")
RECIPES = {
    "vanilla": get_recipe("vanilla"),
    "vanilla_dedup": get_recipe("vanilla_dedup"),
    "luffy": get_recipe("luffy"),
    "random moves": RANDOM,
    "netmoe": get_recipe("netmoe"),
    "luffy_paper, nothing condensed": replace(get_recipe("luffy_paper"), condense="none"),
    "janus": get_recipe("janus"),
    "fastermoe": get_recipe("fastermoe"),
}


@dataclass(frozen=True)
class Job:
    """A part of a launch: what each rank does, and what is asserted of what the ranks gave back."""

    work: tuple[Any, ...]
    check: Callable[[list[Any]], Any]


def exact(case: Case) -> Job:
    return Job((train_on_ranks, case), lambda results: check_exact(case, results))


def condensed(case: Case) -> Job:
    def check(results: list[Any]) -> None:
        assert check_condensed_exact(case, results) < 0.95

    return Job((condensed_step, case), check)


def five_steps(world: int, recipe: Recipe, overlap: bool, rehome: tuple[int, ...]) -> Job:
    config = shrunk("moe-llm-tiny", num_layers=3, num_shared_experts=1)
    return exact(
        Case(config, world=world, recipe=recipe, batch=8, micro_batches=2, steps=5, overlap=overlap,
             rehome_after=rehome, expert_flops=1e8, device=DEVICE)
    )  # fmt: skip


def two_groups(world: int) -> Job | None:
    if world < 4:
        return None
    return exact(
        Case(shrunk("moe-gpt2-tiny"), world=world, ep_size=2, batch=8, micro_batches=2, steps=5, device=DEVICE)
    )


def condensed_recipe(world: int, recipe: Recipe) -> Job:
    return condensed(Case(shrunk("moe-gpt2-tiny"), world=world, recipe=recipe, batch=8, device=DEVICE))


def _coded_sums(rank: int) -> list[bytes]:
    """Many sums under way at once on a stream of their own, beside other work and collectives of the main one."""
    comm = Comm.create(build_mesh(torch.device(DEVICE, rank)))
    world = comm.mesh.world_size
    sums = GradientSums(comm, comm.mesh.world_group, range(world), "int8")
    parts = [torch.randn(3_000_000, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    exact, work = torch.stack(parts).sum(0), torch.ones(500, 500, device=comm.mesh.device)
    pending = []
    for _ in range(8):
        doubled = 2 * parts[rank].to(comm.mesh.device)
        pending.append(sums.start(doubled))
        work = comm.all_reduce(work @ work / 500) / world
    found = [future.wait().cpu() for future in pending]
    assert all((f - 2 * exact).abs().max() < (world + 1) * 2 * 6 / 125 for f in found)
    return [f.numpy().tobytes() for f in found]


def coded_sums(world: int) -> Job:
    def check(results: list[list[bytes]]) -> None:
        assert all(each == results[0][0] for result in results for each in result)

    return Job((_coded_sums,), check)


def cases() -> dict[str, Callable[[int], Job | None]]:
    """By name, what each case is at a number of ranks; None where that is too few."""
    found: dict[str, Callable[[int], Job | None]] = {}
    for name, recipe in RECIPES.items():
        rehome = (1,) if "random" in name else ()
        for overlap in (False, True):
            label = f"{name}, overlap" if overlap else name
            found[label] = lambda world, r=recipe, o=overlap, h=rehome: five_steps(world, r, o, h)
    found["expert groups side by side"] = two_groups
    found["coded sums of gradients"] = coded_sums
    for scheme in ("static:0.5", "static:0.5,correct"):
        stay = Recipe("stay", "", condense=f"{scheme},local")
        found[f"condensed {scheme}"] = lambda world, r=stay: condensed_recipe(world, r)
        if "correct" not in scheme:  # which needs sequences to stay
            moving = replace(RANDOM, condense=scheme)
            found[f"condensed {scheme}, random moves"] = lambda world, r=moving: condensed_recipe(world, r)
    return found


CASES = cases()


# ---------------------------------------------------------------- runs that are continued


def train(rank: int, runs: list[TrainOptions]) -> None:
    for options in runs:
        Trainer(options, build_mesh(torch.device(DEVICE, rank), options.ep_size)).run()


class Resuming:
    """Runs of 6 steps: whole, and stopped after 3 steps at two ranks and continued at as many and at other numbers."""

    def __init__(self, corpus: dict[str, str], folder: Path) -> None:
        self.corpus, self.folder = corpus, folder

    def options(self, recipe: str, name: str, steps: int, resume: bool = False) -> TrainOptions:
        return TrainOptions(
            **self.corpus, out=str(self.folder / f"{recipe}-{name}"), recipe=recipe, device=DEVICE, dtype="float64",
            vocab_size=300, layers=2, hidden_size=32, heads=2, experts=8, expert_hidden_size=32, sequence_length=32,
            batch_size=8, steps=steps, warmup_steps=1, min_lr=1.0, eval_every=0, eval_batches=1, checkpoint_every=3,
            tensorboard=False, profile_attention=False, resume=resume, rehome_every=2,
        )  # fmt: skip

    def losses(self, recipe: str, name: str) -> list[float]:
        return [r["loss"] for r in read_metrics(self.folder / f"{recipe}-{name}" / "metrics.jsonl")]

    def job(self, world: int, recipe: str) -> Job:
        """At two ranks: what must come before all others."""
        runs = [self.options(recipe, f"at-{world}", 6, resume=True)]
        if world == 2:
            begun = [self.options(recipe, f"at-{n}", 3) for n in RESUMED]
            runs = [self.options(recipe, "whole", 6), *begun, *runs]

        def check(_: list[Any]) -> None:
            whole = self.losses(recipe, "whole")
            assert len(whole) == 6
            assert self.losses(recipe, f"at-{world}") == pytest.approx(whole, rel=1e-9)

        return Job((train, runs), check)


RESUMED = [2, 1, *WORLDS[1:]]
RESUMING = {f"resume {recipe}": recipe for recipe in ("vanilla_dedup", "luffy")}


# ---------------------------------------------------------------- one launch a number of ranks


class Launches:
    """Makes the launch of every number of ranks when the first outcome is asked for; two ranks go first."""

    def __init__(self, wanted: set[tuple[int, str]], resuming: Resuming) -> None:
        # What is resumed was begun at two ranks.
        wanted = wanted | {(2, name) for _, name in wanted if name in RESUMING}
        self.jobs: dict[int, dict[str, Job]] = {}
        for world in sorted({world for world, _ in wanted}, key=lambda n: (n != 2, n)):
            jobs = {n: CASES[n](world) for n in CASES if (world, n) in wanted}
            resumed = {n: resuming.job(world, r) for n, r in RESUMING.items() if (world, n) in wanted}
            self.jobs[world] = {n: job for n, job in (jobs | resumed).items() if job is not None}
        self.outcomes = {
            world: run_together({n: job.work for n, job in jobs.items()}, world, backend=BACKEND)
            for world, jobs in self.jobs.items()
        }

    def check(self, world: int, name: str) -> None:
        job = self.jobs[world].get(name)
        if job is None:
            pytest.skip(f"{world} ranks are too few: two groups of two need four")
        job.check(self.outcomes[world][name].get())


@pytest.fixture(scope="module")
def launches(request, corpus, tmp_path_factory):
    chosen = [i.callspec.params for i in request.session.items if "launches" in getattr(i, "fixturenames", ())]
    wanted = {(params["world"], params["name"]) for params in chosen}
    return Launches(wanted, Resuming(corpus, tmp_path_factory.mktemp("resuming")))


@pytest.mark.parametrize("world", WORLDS or [2])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(world, name, launches):
    """Five steps; or one that condenses, where the oracle is told the leaders."""
    launches.check(world, name)


@pytest.mark.parametrize("world", RESUMED)
@pytest.mark.parametrize("name", RESUMING)
def test_resume_continues_at_the_same_and_at_another_number_of_gpus(world, name, launches):
    launches.check(world, name)


def test_the_command_uses_nccl_with_a_gpu_each(corpus, tmp_path):
    world, out = WORLDS[-1], tmp_path / "run"
    command = [
        sys.executable, "-m", "luffy.train.cli", "train", "--recipe", "luffy", "--overlap", "--ranks", str(world),
        "--device", "cuda", "--backend", "nccl", "--steps", "4", "--batch-size", str(4 * world),
        "--data", corpus["data"], "--cache-dir", corpus["cache_dir"], "--vocab-size", "300",
        "--sequence-length", "64", "--eval-batches", "1", "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    summary = json.loads(Path(out, "summary.json").read_text())
    assert summary["world_size"] == world and summary["bytes"]["dispatch"] > 0
    assert summary["environment"]["device"] == "cuda"
