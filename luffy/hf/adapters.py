"""LoRA on experts and routers as PEFT means it, on experts that are spread over ranks, and adapters in PEFT's files.

PEFT adapts the stacked weights of all experts by a wrapper around the module that holds them, one around the other
where several are adapted, with the factors of all experts in two matrices: A [E * r, in], B [out, r * E]. Here each
rank keeps the factors of its own experts, A [n, r, in] and B [n, out, r], and adds B A x to an expert's product instead
of making the sum of the weights, which for a layer of many experts would be a second copy of them (luffy.hf.parts).
"""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from luffy.comm.sharding import whole
from luffy.errors import UserError
from luffy.hf.parts import LibraryExperts
from luffy.hf.targets import check_targets
from luffy.train.checkpoint import everyone

if TYPE_CHECKING:
    from luffy.hf.model import ParallelModel

STACKED = ("gate_up_proj", "down_proj")
_FACTOR = re.compile(r"\.experts\.(lora_[AB])\.(\w+)$")


@dataclass(frozen=True)
class ExpertAdapter:
    """Low-rank factors of all experts for one stacked parameter: a [E, r, in], b [E, out, r]; W + scaling * B A."""

    parameter: str
    a: Tensor
    b: Tensor
    scaling: float
    trained: bool = True


def take_adapters(block: Any) -> list[ExpertAdapter]:
    """Unwrap `block.experts` of PEFT's wrappers, in place, and give what they held, the innermost first.

    UserError for what cannot be spread over ranks.
    """
    found: list[ExpertAdapter] = []
    while hasattr(block.experts, "base_layer"):
        wrapper = block.experts
        if not hasattr(wrapper, "get_delta_factors") and not hasattr(wrapper, "parameter_name"):
            raise UserError(f"{type(wrapper).__name__} around experts: adapt their weights by LoRA's target_parameters")
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if len(wrapper.lora_A) != 1 or len(active) != 1:
            raise UserError(
                f"experts have {len(wrapper.lora_A)} adapters, {len(active)} of them active: one is possible"
            )
        a, b, experts = wrapper.lora_A[active[0]].weight, wrapper.lora_B[active[0]].weight, wrapper.num_experts
        found.append(
            ExpertAdapter(
                wrapper.parameter_name,
                a.detach().reshape(experts, -1, a.shape[1]),
                b.detach().reshape(b.shape[0], -1, experts).permute(2, 0, 1),
                float(wrapper.scaling[active[0]]),
                a.requires_grad,
            )
        )
        block.experts = wrapper.base_layer
    return found[::-1]


def adapt(
    parallel: ParallelModel,
    rank: int,
    alpha: int = 16,
    seed: int = 0,
    on: Collection[str] = ("attention",),
    dora: bool = False,
    tokens: Sequence[int] = (),
) -> None:
    """Put LoRA adapters of `rank` on `on` (luffy.hf.targets) of a parallel model, float32 at least; freeze all else.

    The same as PEFT would make of target_modules and target_parameters. dora: split the weights of attention in
    magnitude and direction. tokens: ids whose rows in embedding and head are trained as well. For adapters of another
    kind make a PEFT model first and give that to `parallelize`.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    family = parallel.family
    check_targets(on, dora, parallel.units is not None)
    torch.manual_seed(seed)  # the same adapters on every rank
    modules: Any = list(family.attention) if "attention" in on else []
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=DUMMY_TARGET_MODULES if list(on) == ["experts"] else modules,  # PEFT takes no empty list
        target_parameters=["router.gate.weight"] if "router" in on else None,
        trainable_token_indices=_rows_of(parallel, tokens),
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    if "experts" in on:
        generator = torch.Generator().manual_seed(seed)
        for moe in parallel.moe_layers:
            assert isinstance(moe.experts, LibraryExperts)
            for name in STACKED:
                _begin_adapter(moe.experts, name, rank, alpha / rank, moe.slot_of_expert, parallel, generator)
    library: Any = parallel.library
    made: Any = get_peft_model(library, config, autocast_adapter_dtype=False)
    parallel.library = made
    for name, p in made.named_parameters():
        p.requires_grad_(p.requires_grad or _FACTOR.search(name) is not None)
        if p.requires_grad:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    # What plain PEFT has to be asked for to make the same of the library's model.
    block = family.block
    parameters = [f"{block}.experts.{name}" for name in STACKED] if "experts" in on else []
    parameters += [f"{block}.{family.gate}.weight"] if "router" in on else []
    made.peft_config["default"].target_parameters = parameters or None
    made.peft_config["default"].target_modules = set(modules)


def _rows_of(parallel: ParallelModel, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """What PEFT calls them: rows of the embedding, and of the head where that is another weight."""
    lm = parallel.causal_lm
    ends = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    ends = ends[:1] if ends[0].weight is ends[1].weight else ends
    names = {id(module): name.rpartition(".")[2] for name, module in lm.named_modules()}
    return {names[id(end)]: list(tokens) for end in ends} if tokens else None


def _begin_adapter(
    experts: LibraryExperts,
    name: str,
    rank: int,
    scaling: float,
    slot_of_expert: Tensor,
    parallel: ParallelModel,
    generator: torch.Generator,
) -> None:
    """As PEFT begins one: A uniform, B zero. Every rank draws for all experts and keeps its own."""
    width_in, width_out = experts.factor_widths(name)
    total = len(slot_of_expert)
    bound = 1 / math.sqrt(width_in)  # kaiming_uniform_ with a = sqrt(5)
    a = torch.empty(total, rank, width_in).uniform_(-bound, bound, generator=generator)
    first = parallel.runtime.comm.mesh.ep_rank * experts.num_local
    mine = slot_of_expert.argsort()[first : first + experts.num_local].cpu()
    b = torch.zeros(experts.num_local, width_out, rank)
    experts.add_adapter(ExpertAdapter(name, a[mine], b, scaling), experts.device)


def _others(parallel: ParallelModel) -> list[tuple[str, nn.Parameter]]:
    """Parameters that PEFT may want to save, but for the experts'."""
    kinds = (".lora_", ".modules_to_save.", ".token_adapter.")
    named = [(n, p) for n, p in parallel.library.named_parameters() if _FACTOR.search(n) is None]
    return [(n, p) for n, p in named if p.requires_grad or any(kind in n for kind in kinds)]


def save_adapter(parallel: ParallelModel, folder: Path | str) -> None:
    """Write the adapter as plain PEFT reads it, configuration and safetensors; all ranks call it."""
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    library: Any = parallel.library
    adapter = library.active_adapter
    others = {name: whole(p).detach() for name, p in _others(parallel)}
    state = {name.replace(f".{adapter}.", "."): value for name, value in _experts_state(parallel).items()}

    def write() -> None:
        # PEFT picks and names what it knows, by the modules that it finds: under their names here.
        known = get_peft_model_state_dict(library, others, adapter_name=adapter, save_embedding_layers=False)
        state.update({parallel.library_path(name): value for name, value in known.items()})
        config = copy.deepcopy(library.peft_config[adapter])
        config.inference_mode = True
        if parallel.folder is not None:
            config.base_model_name_or_path = str(parallel.folder)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tensors = {name: value.to("cpu", copy=True).contiguous() for name, value in state.items()}
            save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            config.save_pretrained(str(folder))
            if parallel.tokenizer is not None:
                shutil.copytree(parallel.tokenizer, folder, dirs_exist_ok=True)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--out: {folder} not written: {error}") from error

    everyone(parallel.runtime.comm.mesh, write, only_first=True)


def _experts_state(parallel: ParallelModel) -> dict[str, Tensor]:
    """The factors of all experts as PEFT has them in its model."""
    library: Any = parallel.library
    state = {}
    for name, p in library.named_parameters():
        factor = _FACTOR.search(name)
        if factor is not None:
            key, value = _whole_factor(parallel, name, factor[1], factor[2], p.detach(), library.active_adapter)
            state[key] = value
    return state


def _whole_factor(
    parallel: ParallelModel, name: str, factor: str, parameter: str, value: Tensor, adapter: str
) -> tuple[str, Tensor]:
    """PEFT's name and matrix of the factors of all experts of a layer."""
    moe: Any = parallel.library.get_submodule(name[: name.index(".experts.")])
    full = parallel.runtime.comm.all_gather_ep(value.contiguous()).flatten(0, 1)[moe.slot_of_expert]
    order = list(moe.experts.scaling)  # of wrappers, the innermost first
    inner = ".base_layer" * (len(order) - 1 - order.index(parameter))
    key = f"{name[: name.index('.experts.')]}.experts{inner}.{factor}.{adapter}.weight"
    if factor == "lora_A":
        return key, full.flatten(0, 1)
    return key, full.permute(1, 2, 0).flatten(1).contiguous()
