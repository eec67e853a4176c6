"""A MoE module that somebody else wrote, taken apart: gate, experts, shared experts.

Parts are found by their names. What names do not tell is tried: how the gate scores, what lies between an expert's two
products, which way its matrices lie. A copy of the module with random weights must answer as the parts do that Luffy
would call. What does not is refused, never guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luffy.config import RouterConfig
from luffy.data.batch import Layout, SequenceTable
from luffy.errors import UserError
from luffy.kernels.activation import Activation, activate
from luffy.model.found_experts import FoundExperts, find_experts
from luffy.model.library import LibraryRouter, SharedExperts, score_told
from luffy.model.router import Router, RouterBase, wide

_TOP_K = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "k")
_ACTIVATION = ("act_fn", "activation_fn", "activation", "act", "1")
_NUM_TOKENS = 8
_MORE = "it answers with more than its output and its router's logits"


@dataclass(frozen=True)
class Taken:
    """router: makes logits, choices and weights as the module does. answers_logits: the module answers with its
    output and the router's logits [T, E]."""

    router: RouterBase
    experts: FoundExperts
    activation: Activation
    shared: nn.Module | None
    answers_logits: bool


@dataclass(frozen=True)
class Parts:
    gate: nn.Module | Tensor
    triple: bool  # the gate answers (logits, weights, ids), as those of transformers do
    experts: FoundExperts
    shared: nn.Module | None


def refusal(module: nn.Module, why: str) -> UserError:
    return UserError(
        f"from_module: {type(module).__name__} cannot be taken: {why}; build a MoEBlock and copy the weights, or use "
        "luffy.hf.parallelize for a model of transformers (docs/own_model.md)"
    )


def take(module: nn.Module, router: RouterConfig, top_k: int | None) -> Taken:
    """The parts of `module`, holding its own tensors. router: weights of Luffy's losses, and the bias's rate.

    Raises UserError, saying why, for modules of another build.
    """
    if any(t.is_meta for t in [*module.parameters(), *module.buffers()]):
        raise refusal(module, "it has no weights yet (meta device)")
    try:
        probe = copy.deepcopy(module)
    except Exception as error:  # whatever a module's own code finds wrong
        raise refusal(module, f"it cannot be copied for a trial ({error})") from error
    _randomize(probe)
    parts = find_parts(probe)
    E = parts.experts.num_experts
    K = top_k or _setting(probe, parts, _TOP_K)
    if K is None:
        raise refusal(module, f"none of {', '.join(_TOP_K)} says how many experts a token has; give top_k=")
    if not 1 <= K <= E:
        raise UserError(f"from_module: top_k={K}: give a whole number from 1 to the {E} experts")
    config = replace(router, num_experts=E, top_k=K)
    config, lies, which, answers_logits = _tried(probe, parts, config)
    own = find_parts(module)
    activation = _activations(module, own)[which]
    experts = replace(own.experts, lies=lies)
    return Taken(_router(module, own, config), experts, activation, own.shared, answers_logits)


def find_parts(module: Any) -> Parts:
    """Parts by name; UserError where one is missing, or left over."""
    experts = find_experts(module)
    if isinstance(experts, str):
        raise refusal(module, experts)
    gate, triple = _gate(module, experts)
    names = [n for n in ("shared_expert", "shared_experts") if isinstance(getattr(module, n, None), nn.Module)]
    shared_gate = getattr(module, "shared_expert_gate", None)
    shared = SharedExperts(getattr(module, names[0]), shared_gate) if names else None
    used = {id(p) for p in experts.parameters()} | {id(p) for p in ([] if shared is None else shared.parameters())}
    used |= {id(p) for p in ([gate] if isinstance(gate, Tensor) else gate.parameters())}
    if rest := [n for n, p in module.named_parameters() if id(p) not in used]:
        raise refusal(module, f"it has weights that are not known: {', '.join(rest[:4])}")
    return Parts(gate, triple, experts, shared)


@torch.no_grad()
def give_back(
    module: nn.Module, router: RouterBase, shared: Any, weights: tuple[Tensor | None, ...], lies: bool
) -> None:
    """Write into `module`, of the build that was taken: its gate, shared experts, and experts [E, ..] as `_own` has."""
    parts = find_parts(module)
    experts = replace(parts.experts, lies=lies)
    w_in, w_out, b_in, b_out = weights
    assert w_in is not None and w_out is not None
    if len(w_in) != experts.num_experts or w_out.shape[2] != experts.hidden_size:
        raise UserError(f"copy_to: {type(module).__name__} is not of the size of the module that was taken")
    for e in range(experts.num_experts):
        experts.put(e, w_in[e], w_out[e], None if b_in is None else b_in[e], None if b_out is None else b_out[e])
    if isinstance(parts.gate, Tensor):
        weight = next(router.parameters())
        parts.gate.detach().copy_(weight if parts.gate.shape == weight.shape else weight.t())
    else:
        assert isinstance(router, LibraryRouter)
        parts.gate.load_state_dict(router.gate.state_dict())
    if parts.shared is not None:
        parts.shared.load_state_dict(shared.state_dict())


def _gate(module: Any, experts: FoundExperts) -> tuple[nn.Module | Tensor, bool]:
    gate = next((g for n in ("gate", "router", "gate_weight", "router_weight", "w_gate")
                 if isinstance(g := getattr(module, n, None), nn.Module)
                 or (isinstance(g, nn.Parameter) and g.dim() == 2)), None)  # fmt: skip
    if gate is None:
        raise refusal(module, "it has neither gate nor router")
    if isinstance(gate, Tensor):
        return gate, False
    parameters = list(gate.parameters())
    if not isinstance(gate, nn.Linear):
        rows = parameters[0].new_zeros(2, experts.hidden_size) if parameters else torch.zeros(2, experts.hidden_size)
        try:
            with torch.no_grad():
                answer = gate(rows)
        except Exception:  # a gate that is called in another way: its weight may still be all there is to it
            answer = None
        if isinstance(answer, tuple) and len(answer) == 3 and answer[0].shape == (2, experts.num_experts):
            return gate, True
    if len(parameters) != 1:
        raise refusal(module, "its gate is more than one matrix without a bias")
    return parameters[0], False


def _setting(module: Any, parts: Parts, names: tuple[str, ...]) -> int | None:
    for owner in (module, parts.gate, getattr(module, "router", None), getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _router(module: nn.Module, parts: Parts, config: RouterConfig) -> RouterBase:
    if parts.triple:
        bias = next((n for n, _ in parts.gate.named_buffers() if n == "e_score_correction_bias"), None)  # type: ignore[union-attr]
        if config.bias_update_rate > 0 and bias is None:
            raise refusal(module, "bias_update_rate: its gate has no bias for the choice")
        return LibraryRouter(parts.gate, config, bias)  # type: ignore[arg-type]
    E, D, weight = config.num_experts, parts.experts.hidden_size, parts.gate
    assert isinstance(weight, Tensor)
    if weight.shape not in ((E, D), (D, E)):
        raise refusal(module, f"its gate is {list(weight.shape)}, not {E} experts by {D} columns")
    router = Router(config, D)
    if isinstance(weight, nn.Parameter) and weight.shape == (E, D):
        router.weight = weight
    else:
        router.weight = nn.Parameter(weight.detach().t().clone(), requires_grad=weight.requires_grad)
    router.choice_bias = router.choice_bias.to(weight.device)
    return router


def _gated(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return act(gate) * up


def _activations(module: Any, parts: Parts) -> list[Activation]:
    """What may lie between an expert's two products: Luffy's own, the common ones, and the module's."""
    tanh = partial(F.gelu, approximate="tanh")
    known: list[Any] = [F.silu, F.gelu, tanh, F.relu]
    for owner in (parts.experts.one, module):
        known += [f for n in _ACTIVATION if callable(f := getattr(owner, n, None))]
    if parts.experts.gated:
        return ["swiglu", *(partial(_gated, act) for act in known[1:])]
    return ["gelu", *known]


@torch.no_grad()
def _randomize(probe: nn.Module) -> None:
    """Weights and buffers as no initialisation leaves them, float32 at least, so that nothing is alike by chance."""
    for tensors in [(m._parameters, m._buffers) for m in probe.modules()]:
        for held in tensors:
            for t in held.values():
                if t is not None and t.is_floating_point():
                    t.data = t.data.to(wide(t.dtype))
    generator = torch.Generator().manual_seed(0)
    for t in [*probe.parameters(), *probe.buffers()]:
        if t.is_floating_point():
            scale = max(t.shape[-2:], default=1) ** -0.5 if t.dim() > 1 else 0.3
            t.copy_(2 * scale * torch.randn(t.shape, generator=generator))


@torch.no_grad()
def _tried(probe: nn.Module, parts: Parts, config: RouterConfig) -> tuple[RouterConfig, bool, int, bool]:
    """What agrees with the probe's answers: scores, how matrices lie, which of the activations; and whether it
    answers with logits."""
    T, D = _NUM_TOKENS, parts.experts.hidden_size
    like = parts.experts.example
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(like.device, like.dtype)
    wanted, logits = _answers(probe, x)
    activations = _activations(probe, parts)
    layout = Layout(SequenceTable(np.array([T]), np.array([0])), 0, x.device)
    shared = 0 if parts.shared is None else parts.shared(x)[:, None]
    tolerance = wanted.abs().max() * (1e-5 if x.dtype == torch.float64 else 1e-4)  # some gates round to float32
    for scored in _scores(config, parts.triple):
        router = _router(probe, parts, scored)
        routing, stats = router(x, layout, torch.arange(config.num_experts, device=x.device))
        weights = routing.topk_weights.to(x.dtype)[..., None, None]
        for lies in parts.experts.ways():
            answers = _expert_answers(replace(parts.experts, lies=lies), routing.topk_expert_ids, x, activations)
            off = (wanted[:, None] - (weights * answers).sum(1) - shared).abs().amax((0, 2))
            if off.min() > tolerance:
                continue
            if logits is not None and not _alike(logits, stats.logits):
                raise refusal(probe, _MORE)
            if parts.triple:
                told = score_told(stats.logits, routing.topk_weights, routing.topk_expert_ids)
                if told is None:
                    raise refusal(probe, "its gate's weights are neither softmax nor sigmoid of its logits")
                scored = replace(scored, score=told[0], normalize_topk=told[1])
            return scored, lies, int(off.argmin()), logits is not None
    raise refusal(probe, "it computes something else than its gate, experts and shared experts tell")


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, atol=1e-4)


def _scores(config: RouterConfig, triple: bool) -> Iterator[RouterConfig]:
    """What is tried of a gate that is only a matrix; another one weighs its choices itself."""
    if triple:
        yield config
        return
    for score in ("softmax", "sigmoid"):
        for normalize in (True, False):
            yield replace(config, score=score, normalize_topk=normalize)


def _answers(probe: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the module, in training and not: [T, D], and logits [T, E] if it answers with them."""
    found = []
    for mode in (True, False):
        probe.train(mode)
        try:
            answer = probe(x[None].clone())
        except Exception as error:  # whatever another build's code says
            raise refusal(probe, f"it does not take rows [B, S, D] ({error})") from error
        out, *more = answer if isinstance(answer, tuple) else (answer,)
        if not isinstance(out, Tensor) or out.numel() != x.numel() or len(more) > 1:
            raise refusal(probe, _MORE)
        if more and not (isinstance(more[0], Tensor) and more[0].numel() % len(x) == 0):
            raise refusal(probe, _MORE)
        found.append((out.reshape(x.shape), more[0].reshape(len(x), -1) if more else None))
    if not torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6):
        raise refusal(probe, "it computes something else in training (dropout or noise: set it to 0)")
    return found[0]


def _expert_answers(experts: FoundExperts, ids: Tensor, x: Tensor, activations: list[Activation]) -> Tensor:
    """[T, K, A, D]: of every choice, by activation; nan where an activation cannot be computed."""
    out = x.new_full((*ids.shape, len(activations), x.shape[1]), torch.nan)
    for e in ids.unique().tolist():
        w_in, w_out, b_in, b_out = experts.weights(e)
        token, choice = (ids == e).nonzero(as_tuple=True)
        hidden = x[token] @ w_in + (0 if b_in is None else b_in)
        for i, activation in enumerate(activations):
            try:
                out[token, choice, i] = activate(hidden, activation) @ w_out + (0 if b_out is None else b_out)
            except Exception:  # an attribute that is no activation
                continue
    return out.nan_to_num(torch.inf)
