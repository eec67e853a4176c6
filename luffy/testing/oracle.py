"""The dense oracle: what the transformer computes, written as plainly as it can be said.

Everything here runs in one process, in float64, one sequence at a time, with explicit matrices and loops, straight
from the configuration and the papers. It shares nothing with the model but `ModelConfig` and the names of the
parameters: no batching, no exchange, no permutation, no fused kernel. So when the distributed model agrees with it to
ten digits, an error would have to be made twice, in two different ways.

* attention: Vaswani et al. (1706.03762); rotary 2104.09864; relative positions and memory 1901.02860
* mixture of experts: "for each expert, the tokens that chose it"; balance loss 2101.03961; z-loss 2202.08906

A *step* is a list of micro-batches, a micro-batch a list of sequences (objects with `tokens` and `labels`, NumPy
arrays of one length), whichever rank may hold them: no function here knows of ranks. Parameters are a dict of full
tensors; those of the E experts of a layer are stacked, [E, ...].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from luffy.config import ModelConfig

IGNORED = -100  # the label of a place that is not trained on
Params = Mapping[str, Tensor]
Memory = list[list[Tensor]]  # by block, then by sequence: [at most M, D]


@dataclass(frozen=True)
class LayerChoices:
    """One MoE layer, all sequences of a micro-batch. Lists have one entry a sequence, of [length, E].

    probabilities: normalised scores. chosen: the top-k choices. served: those that capacity let through.
    logsumexp: of the router's logits, [length].
    """

    probabilities: list[Tensor]
    chosen: list[Tensor]
    served: list[Tensor]
    logsumexp: list[Tensor]


@dataclass(frozen=True)
class OracleOutput:
    """`loss`: this micro-batch's part of the step's loss. `token_loss`: its cross-entropy part alone.

    `logits`: [length, V] a sequence. `layers`: what each MoE layer chose. `balance`, `z`, `locality`, `seat`: a number
    for each MoE layer. `memory`: for the next segment.
    """

    loss: Tensor
    token_loss: Tensor
    balance: list[Tensor]
    z: list[Tensor]
    locality: list[Tensor]
    seat: list[Tensor]
    logits: list[Tensor]
    layers: list[LayerChoices]
    memory: Memory


def linear(config: ModelConfig, params: Params, name: str, x: Tensor) -> Tensor:
    y = x @ params[name + ".weight"].T
    return y + params[name + ".bias"] if config.bias else y


def norm(config: ModelConfig, params: Params, name: str, x: Tensor) -> Tensor:
    if config.norm == "rmsnorm":
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * params[name + ".weight"]
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return centred / deviation * params[name + ".weight"] + params[name + ".bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def activate(config: ModelConfig, x: Tensor) -> Tensor:
    if config.activation == "gelu":
        return gelu(x)
    gate, value = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return gate * torch.sigmoid(gate) * value


def softmax(scores: Tensor) -> Tensor:
    exponentials = (scores - scores.max(-1, keepdim=True).values.detach()).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions for one head, [L, hd]: the pair (i, i + hd/2) of row p turns by p * base^(-2i/hd)."""
    length, size = x.shape
    half, turned = size // 2, torch.empty_like(x)
    for i in range(half):
        angle = torch.arange(length, dtype=torch.float64) * base ** (-2 * i / size)
        a, b = x[:, i], x[:, i + half]
        turned[:, i] = a * angle.cos() - b * angle.sin()
        turned[:, i + half] = a * angle.sin() + b * angle.cos()
    return turned


@cache
def sinusoid(distance: int, size: int) -> Tensor:
    """Transformer-XL's embedding of a signed distance, [size]: sines of all frequencies, then cosines."""
    angles = [distance / 10000.0 ** (2 * i / size) for i in range((size + 1) // 2)]
    waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(waves[:size], dtype=torch.float64)


def attention(config: ModelConfig, params: Params, name: str, x: Tensor, memory: Tensor) -> Tensor:
    """One sequence: x [L, D] attends to memory [M, D] (the states before it) and to itself."""
    D, H, hd = config.hidden_size, config.num_heads, config.head_size
    M, L = memory.shape[0], x.shape[0]
    qkv = linear(config, params, name + ".qkv", torch.cat([memory, x]))  # [M + L, 3 D]
    # Query i stands at position M + i; key j at position j.
    distance = [[M + i - j for j in range(M + L)] for i in range(L)]
    if config.position == "relative":
        waves = torch.stack([torch.stack([sinusoid(d, D) for d in row]) for row in distance])
    heads = []
    for h in range(H):
        q, k, v = (qkv[:, part * D + h * hd : part * D + (h + 1) * hd] for part in range(3))
        if config.qk_norm:
            q, k = norm(config, params, name + ".q_norm", q), norm(config, params, name + ".k_norm", k)
        if config.position == "rope":
            q, k = rotate(q, config.rope_base), rotate(k, config.rope_base)
        q = q[M:]
        if config.position == "relative":
            # (q + u) . k + (q + v) . W_r R(distance)
            far = waves @ params[name + ".relative.weight"][h * hd : (h + 1) * hd].T  # [L, M + L, hd]
            content = (q + params[name + ".content_bias"][h]) @ k.T
            position = ((q + params[name + ".position_bias"][h])[:, None, :] * far).sum(-1)
            scores = (content + position) / math.sqrt(hd)
        else:
            scores = q @ k.T / math.sqrt(hd)
        if config.causal:
            scores = scores.masked_fill(torch.tensor(distance) < 0, -math.inf)
        heads.append(softmax(scores) @ v)
    return linear(config, params, name + ".out", torch.cat(heads, dim=1))


def feed_forward(config: ModelConfig, params: Params, name: str, x: Tensor) -> Tensor:
    inner = activate(config, linear(config, params, name + ".w_in", x))
    return linear(config, params, name + ".w_out", inner)


def expert(config: ModelConfig, params: Params, name: str, e: int, x: Tensor) -> Tensor:
    b_in, b_out = (params[name + bias][e] if config.bias else 0 for bias in (".b_in", ".b_out"))
    return activate(config, x @ params[name + ".w_in"][e] + b_in) @ params[name + ".w_out"][e] + b_out


def best_groups(ranking: Tensor, num_groups: int, limit: int, top_k: int) -> Tensor:
    """Scores [L, E] with minus infinity outside each token's best groups, by the sum of their best scores."""
    out, size = torch.full_like(ranking, -math.inf), ranking.shape[1] // num_groups
    for t in range(ranking.shape[0]):
        groups = [ranking[t, g * size : (g + 1) * size] for g in range(num_groups)]
        totals = [float(g.sort(descending=True).values[: max(1, top_k // limit)].sum()) for g in groups]
        for g in sorted(range(num_groups), key=lambda g: -totals[g])[:limit]:
            out[t, g * size : (g + 1) * size] = groups[g]
    return out


@dataclass
class Condensing:
    """What stands for each token at each expert of one layer: `leader` int64 [all tokens, E], the token itself or
    another. centroid: the mean of all that have this leader. compensate: adds x - c to the expert's answer.
    """

    leader: Tensor
    centroid: bool = False
    compensate: bool = False

    def inputs(self, expert: int, everyone: Tensor) -> Tensor:
        """everyone [all tokens, D] -> what the expert sees for each token, [all tokens, D]."""
        leader = self.leader[:, expert]
        if not self.centroid:
            return everyone[leader]
        return torch.stack([everyone[leader == leader[t]].mean(0) for t in range(len(everyone))])


def mixture(
    config: ModelConfig,
    params: Params,
    name: str,
    x: Tensor,
    seen: LayerChoices,
    condensing: Condensing | None = None,
    everyone: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """One sequence through the experts, x [L, D] -> [L, D]; notes in `seen` what was chosen.

    condensing, with the rows of all sequences and where this one's begin: see there.
    """
    router, E, K = config.router, config.router.num_experts, config.router.top_k
    logits = x @ params[name + ".router.weight"].T  # [L, E]
    scores = softmax(logits) if router.score == "softmax" else torch.sigmoid(logits)
    ranking = scores.detach()
    if router.bias_update_rate > 0:
        ranking = ranking + params[name + ".router.choice_bias"]  # moves the choice, never the weight
    if router.num_groups:
        ranking = best_groups(ranking, router.num_groups, router.top_k_groups, K)
    chosen = torch.zeros(logits.shape, dtype=torch.bool)
    for t in range(x.shape[0]):
        chosen[t, ranking[t].argsort(descending=True)[:K]] = True
    weights = scores * chosen
    if router.normalize_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    served = chosen
    if router.capacity_factor is not None:  # each expert takes the first so many of this sequence's tokens
        capacity = math.ceil(router.capacity_factor * x.shape[0] * K / E)
        served = chosen & (chosen.cumsum(0) <= capacity)
    seen_by_experts = x
    if config.latent_size:
        seen_by_experts = x @ params[name + ".latent.enter.weight"].T
    total = torch.zeros_like(seen_by_experts)
    for e in range(E):
        tokens = served[:, e].nonzero().flatten()
        rows = seen_by_experts[tokens]
        if condensing is not None and everyone is not None:
            rows = condensing.inputs(e, everyone)[first + tokens]
        answers = expert(config, params, name + ".experts", e, rows)
        if condensing is not None and condensing.compensate:
            answers = answers + x[tokens] - rows
        total = total.index_add(0, tokens, weights[tokens, e][:, None] * answers)
    if config.latent_size:
        total = total @ params[name + ".latent.out.weight"].T
    if config.num_shared_experts:
        total = total + feed_forward(config, params, name + ".shared_experts", x)
    seen.probabilities.append(scores / scores.sum(-1, keepdim=True))
    seen.chosen.append(chosen)
    seen.served.append(served)
    seen.logsumexp.append(logits.logsumexp(-1))
    return total


def first_half(config: ModelConfig, params: Params, layer: int, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence through the attention of block `layer`: the stream after it, and what the second half sees.

    memory [M, D] holds raw states, normed as this segment's are.
    """
    name = f"blocks.{layer}"
    if config.norm_placement == "post":
        x = x + attention(config, params, name + ".attention", x, memory)
        x = norm(config, params, name + ".attention_norm", x)
        return x, x
    normed, normed_memory = (norm(config, params, name + ".attention_norm", y) for y in (x, memory))
    x = x + attention(config, params, name + ".attention", normed, normed_memory)
    return x, norm(config, params, name + ".ffn_norm", x)


def blocks(
    config: ModelConfig,
    params: Params,
    layer: int,
    hidden: list[Tensor],
    memories: Sequence[Tensor],
    seen: LayerChoices,
    condensing: Condensing | None,
) -> list[Tensor]:
    """All sequences through block `layer`."""
    name, out, first = f"blocks.{layer}", [], 0
    halves = [first_half(config, params, layer, x, m) for x, m in zip(hidden, memories, strict=True)]
    everyone = torch.cat([y for _, y in halves])
    for x, y in halves:
        if config.is_moe_layer(layer):
            total = x + mixture(config, params, name + ".moe", y, seen, condensing, everyone, first)
        else:
            total = x + feed_forward(config, params, name + ".ffn", y)
        out.append(norm(config, params, name + ".ffn_norm", total) if config.norm_placement == "post" else total)
        first += len(x)
    return out


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum()


def seat_price(form: str, p: Tensor, topic: int, num_topics: int, top_k: int) -> Tensor:
    """What one token with probabilities p [E] pays for the experts away from its topic's."""
    size = len(p) // num_topics
    mass = [p[c * size : (c + 1) * size].sum() for c in range(num_topics)]
    if form == "mass":
        return 1 - mass[topic]
    away = [m for c, m in enumerate(mass) if c != topic]
    return torch.stack([1 - torch.exp(-top_k * m) for m in away]).sum()


def head(config: ModelConfig, params: Params, x: Tensor) -> Tensor:
    """[L, D] -> logits [L, V]; an encoder transforms first, as BERT's masked-language-model head does."""
    if config.norm_placement == "pre":
        x = norm(config, params, "final_norm", x)
    if not config.causal:
        x = norm(config, params, "head_norm", gelu(linear(config, params, "head_transform", x)))
    return x @ params["token_embedding.weight" if config.tie_embeddings else "head"].T


def forward(
    config: ModelConfig,
    params: Params,
    sequences: Sequence[Any],
    tokens: int,
    labels: int,
    memory: Memory | None,
    condensing: Sequence[Condensing] | None = None,
    num_topics: int = 0,
) -> OracleOutput:
    """One micro-batch. `tokens`, `labels`: numbers of them in the whole step, which normalise the losses.

    condensing: of each MoE layer; None where every token reaches its own experts. num_topics: > 0 where sequences have
    a `topic`.
    """
    hidden = []
    for sequence in sequences:
        x = params["token_embedding.weight"][torch.as_tensor(sequence.tokens)]
        if config.position == "learned":
            x = x + params["position_embedding.weight"][: len(sequence.tokens)]
        hidden.append(norm(config, params, "embedding_norm", x) if config.norm_placement == "post" else x)

    layers: list[LayerChoices] = []
    new_memory = []
    for i in range(config.num_layers):
        before = memory[i] if memory else [x[:0] for x in hidden]
        # The last M states, kept without gradient, as Transformer-XL does.
        states = [torch.cat([m, x]).detach() for m, x in zip(before, hidden, strict=True)]
        new_memory.append([s[max(0, len(s) - config.memory_length) :] for s in states])
        seen = LayerChoices([], [], [], [])
        condensed = condensing[len(layers)] if condensing is not None and config.is_moe_layer(i) else None
        hidden = blocks(config, params, i, hidden, before, seen, condensed)
        if config.is_moe_layer(i):
            layers.append(seen)

    logits = [head(config, params, x) for x in hidden]
    token_loss = torch.zeros((), dtype=torch.float64)
    for sequence, z in zip(sequences, logits, strict=True):
        log_probability = z - z.logsumexp(-1, keepdim=True)
        for t in (sequence.labels != IGNORED).nonzero()[0]:
            token_loss = token_loss - log_probability[t, sequence.labels[t]] / labels

    balance, z_loss, locality, seat, num_tokens = [], [], [], [], sum(len(s.tokens) for s in sequences)
    for seen in layers:
        share = torch.cat(seen.chosen).double().mean(0) / config.router.top_k
        balance.append(config.router.num_experts * (share * torch.cat(seen.probabilities).mean(0)).sum())
        z_loss.append(torch.cat(seen.logsumexp).pow(2).mean())
        of_sequences = sum(len(p) / num_tokens * entropy(p.mean(0)) for p in seen.probabilities if len(p))
        in_use = entropy(torch.cat(seen.probabilities).mean(0))
        locality.append(of_sequences - in_use)
        if num_topics:
            paid = [
                seat_price(config.router.seat_loss_form, p, s.topic, num_topics, config.router.top_k)
                for s, ps in zip(sequences, seen.probabilities, strict=True)
                for p in ps
            ]
            seat.append(torch.stack(paid).sum() / num_tokens - in_use)
    auxiliary = config.router.balance_loss * sum(balance) + config.router.z_loss * sum(z_loss)
    if config.router.locality_loss:
        auxiliary = auxiliary + config.router.locality_loss * sum(locality) / max(1, len(locality))
    if config.router.seat_loss and num_topics:
        auxiliary = auxiliary + config.router.seat_loss * sum(seat) / max(1, len(seat))
    loss = token_loss + auxiliary * num_tokens / tokens
    return OracleOutput(loss, token_loss, balance, z_loss, locality, seat, logits, layers, new_memory)
