"""Slow, literal forms of the layers: one row, one head, one expert, one window at a time.

They read the tested modules' own parameters, so outputs and every gradient can be compared.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model_zoo.backbones.twin import TwinBlock
from model_zoo.layers.mos import MoS
from model_zoo.layers.routers import ThemeRouter
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention

# at these sizes a second thread only waits; on a busy machine it makes the tests several times slower
torch.set_num_threads(1)


def ragged(
    lengths: list[int], dim: int, seed: int = 0, *, num_items: int = 9, padding: int = 0, dtype: torch.dtype = torch.double
) -> Sequence:
    """Right-aligned random histories of the given lengths over few distinct items (leaves), ``padding`` columns before.

    Padding positions point at real items' rows, so code that forgets the mask shows.
    """
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths, default=0) + padding
    items = torch.randn(num_items, dim, generator=generator, dtype=dtype).requires_grad_()
    index = torch.randint(num_items, (len(lengths), length), generator=generator)
    mask = torch.arange(length) >= length - torch.tensor(lengths).unsqueeze(1)
    return Sequence(items, index, mask)


def gradients(output: Tensor, inputs: Iterable[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a fixed random weighting of ``output``; zeros where an input has no part in it."""
    inputs = list(inputs)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
    found = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def rows_of(vectors: Tensor, mask: Tensor) -> list[Tensor]:
    """Each row's real vectors ``[t, d]``, oldest first."""
    return [row[real] for row, real in zip(vectors, mask, strict=True)]


def masked_attention(
    layer: TargetAttention, query: Tensor, vectors: Tensor, mask: Tensor, attend_padding: bool = False
) -> Tensor:
    """Attention with keys and values projected at every position, masked scores at -1e9, top-k by the full scores.

    Args:
        query: ``[B, d]``.
        vectors: ``[B, T, d]``.
        mask: ``[B, T]``; rows without a real token give zeros, or as LongCTR the mean of all T values.
    """
    batch, length, _ = vectors.shape
    if length == 0:
        return query.new_zeros(batch, layer.out_dim)
    heads = layer.num_heads
    q = layer.W_q(query).view(batch, heads, 1, -1)
    k = layer.W_k(vectors).view(batch, length, heads, -1).transpose(1, 2)
    v = layer.W_v(vectors).view(batch, length, heads, -1).transpose(1, 2)
    scores = (q * k).sum(-1) / math.sqrt(q.shape[-1])  # [B, h, T]
    scores = scores.masked_fill(~mask[:, None, :], -1e9)
    if layer.topk is not None and layer.topk < length:
        best = scores.detach().topk(layer.topk, dim=-1).indices
        scores = scores.gather(2, best)
        v = v.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, v.shape[-1]))
    answer = (scores.softmax(-1).unsqueeze(-1) * v).sum(2).reshape(batch, -1)
    answer = layer.W_o(answer)
    return answer if attend_padding else answer * mask.any(1, keepdim=True)


def attention(layer: TargetAttention, query: Tensor, tokens: Tensor) -> Tensor:
    """One row: query ``[d]``, real tokens ``[t, d]``; zeros if there is none."""
    everything = torch.ones(1, len(tokens), dtype=torch.bool)
    return masked_attention(layer, query.unsqueeze(0), tokens.unsqueeze(0), everything)[0]


def twin(block: TwinBlock, query: Tensor, tokens: Tensor) -> Tensor:
    """One row of TWIN: attention over the newest S - 1 tokens beside top-k attention over all."""
    assert isinstance(block.long_attention, TargetAttention)
    newest = tokens[max(len(tokens) - (block.short_seq_len - 1), 0) :]
    return torch.cat([attention(block.short_attention, query, newest), attention(block.long_attention, query, tokens)])


def longctr_twin(block: TwinBlock, query: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """LongCTR's TWIN: the same slice ``[-S:-1]`` on L + 1 items (the target last) and on L mask columns."""
    assert isinstance(block.long_attention, TargetAttention)
    with_target = torch.cat([vectors, query.unsqueeze(1)], 1)
    window = slice(-block.short_seq_len, -1)
    short = masked_attention(block.short_attention, query, with_target[:, window], mask[:, window], True)
    return torch.cat([short, masked_attention(block.long_attention, query, vectors, mask, True)], -1)


def block_answer(block: nn.Module, query: Tensor, tokens: Tensor) -> Tensor:
    """One row of any block that the tests use as an expert."""
    if isinstance(block, TwinBlock):
        return twin(block, query, tokens)
    assert isinstance(block, TargetAttention)
    return attention(block, query, tokens)


def windows(tokens: Tensor, size: int, stride: int, align: str = "right", divide_by: str = "count") -> Tensor:
    """Window means of one row's real tokens ``[t, d]``, in time order, ``[W, d]``."""
    total = len(tokens)
    means: list[Tensor] = []
    if align == "right":
        number = 0
        while total > (max((number - 1) * stride + size, number * stride) if number else 0):
            end = total - number * stride
            inside = [tokens[p] for p in range(end - size, end) if p >= 0]
            means.insert(0, torch.stack(inside).sum(0) / (len(inside) if divide_by == "count" else size))
            number += 1
    else:
        start = 0
        while start + size <= total:
            means.append(torch.stack([tokens[p] for p in range(start, start + size)]).sum(0) / size)
            start += stride
    return torch.stack(means) if means else tokens.new_zeros(0, tokens.shape[1])


def cosines(router: ThemeRouter, inputs: Tensor) -> Tensor:
    """Cosine of h(x) to each code, ``[..., n]``, by the formula."""
    hidden, codes = router.h(inputs), router.codebook.codes
    lengths = hidden.norm(dim=-1, keepdim=True).clamp(min=1e-8) * codes.norm(dim=-1)
    return (hidden @ codes.T) / lengths


def gate_row(router: ThemeRouter, inputs: Tensor) -> Tensor:
    """``G(x)`` of one input, a weight for each of the n experts, zero for those not chosen (eq. 2)."""
    scores = cosines(router, inputs) / router.temperature
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.detach().argsort(descending=True)[: router.topk]] = True
    if router.gate_norm == "softmax_then_mask":
        return scores.softmax(-1) * kept
    return scores.masked_fill(~kept, -torch.inf).softmax(-1)


def members(router: ThemeRouter, inputs: Tensor) -> Tensor:
    """``[t, n]`` bool: which experts read each of ``inputs [t, d]``."""
    best = cosines(router, inputs).detach().argsort(dim=-1, descending=True)[:, : router.topk]
    reads = torch.zeros(len(inputs), router.codebook.num_themes, dtype=torch.bool)
    return reads.scatter_(1, best, True)


def branch_tokens(layer: MoS, tokens: Tensor, branch: str) -> Tensor:
    """What the branch routes for one row: its items, or its windows."""
    if branch == "item":
        return tokens
    if layer.short_history == "skip" and len(tokens) < layer.window_size:
        return tokens[:0]
    return windows(tokens, layer.window_size, layer.window_stride, layer.window_align, layer.window_divide_by)


def router_inputs(layer: MoS, query: Tensor, tokens: Tensor) -> Tensor:
    """What the row's tokens look like to the router."""
    return torch.cat([tokens, query.expand_as(tokens)], 1) if layer.router_input == "item_target" else tokens


def mos(layer: MoS, query: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """MoS with every expert run for every row on its own subsequence, then weighted by the gates (eq. 5-8)."""
    answers = []
    for target, tokens in zip(query, rows_of(vectors, mask), strict=True):
        overall = block_answer(layer.global_expert, target, tokens)
        global_weight = 1 - layer.alpha_item - layer.alpha_window
        answer = torch.zeros_like(overall)
        for alpha, branch in ((layer.alpha_item, "item"), (layer.alpha_window, "window")):
            if alpha == 0:
                continue
            experts, router = getattr(layer, f"{branch}_experts"), getattr(layer, f"{branch}_router")
            routed = branch_tokens(layer, tokens, branch)
            if len(routed) == 0:
                global_weight = global_weight + alpha
                continue
            inputs = router_inputs(layer, target, routed)
            reads = members(router, inputs)
            if layer.gate_source == "target":
                gates = gate_row(router, router_inputs(layer, target, target.unsqueeze(0))[0])
            else:
                gates = gate_row(router, inputs[-1])
            for number, expert in enumerate(experts.experts):
                answer = answer + alpha * gates[number] * block_answer(expert, target, routed[reads[:, number]])
        answer = answer + global_weight * overall
        if layer.empty_history == "zeros" and len(tokens) == 0:
            answer = torch.zeros_like(answer)
        answers.append(answer)
    return torch.stack(answers)


def ema_batch_mean(codes: Tensor, decay: float, hidden: Tensor, themes: list[list[int]]) -> Tensor:
    """Eq. 4 by loops: ``hidden [N, D]`` of single occurrences and the themes of each."""
    updated = codes.clone()
    for theme in range(len(codes)):
        mine = [h for h, own in zip(hidden, themes, strict=True) if theme in own]
        if mine:
            updated[theme] = decay * codes[theme] + (1 - decay) * torch.stack(mine).mean(0)
    return updated


def ema_counts(
    sizes: Tensor, sums: Tensor, decay: float, hidden: Tensor, themes: list[list[int]], eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """One VQ-VAE step by loops: ``(codes, sizes, sums)``; a code that never had a member is given as nan."""
    sizes, sums = sizes.clone(), sums.clone()
    for theme in range(len(sizes)):
        mine = [h for h, own in zip(hidden, themes, strict=True) if theme in own]
        sizes[theme] = decay * sizes[theme] + (1 - decay) * len(mine)
        sums[theme] = decay * sums[theme] + (1 - decay) * sum(mine, torch.zeros_like(sums[theme]))
    total = sizes.sum()
    codes = torch.full_like(sums, torch.nan)
    for theme in range(len(sizes)):
        if sizes[theme] > 0:
            codes[theme] = sums[theme] / ((sizes[theme] + eps) / (total + len(sizes) * eps) * total)
    return codes, sizes, sums


def occurrences_by_row(layer: MoS, query: Tensor, sequence: Sequence, branch: str) -> tuple[Tensor, list[list[int]]]:
    """h of every real token of every row, one by one, and its themes: what eq. 4 averages over."""
    router: ThemeRouter = getattr(layer, f"{branch}_router")
    hidden: list[Tensor] = []
    themes: list[list[int]] = []
    with torch.no_grad():
        for target, tokens in zip(query, rows_of(sequence.vectors, sequence.mask), strict=True):
            inputs = router_inputs(layer, target, branch_tokens(layer, tokens, branch))
            hidden.extend(router.h(inputs))
            themes.extend(row.nonzero().flatten().tolist() for row in members(router, inputs))
    return torch.stack(hidden), themes
