"""Cases and literal forms shared by the tests of the blocks with a short branch and a searched long one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged
from torch import Tensor, nn

from model_zoo.errors import ConfigError
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 8
LENGTHS = [12, 1, 0, 4, 7, 3]


def prepared(block: nn.Module) -> Any:
    """The block in float64 with weights large enough for every path to matter."""
    torch.manual_seed(2)
    for weight in block.parameters():
        nn.init.normal_(weight)
    return block.double().eval()


def case(lengths: list[int] = LENGTHS, seed: int = 0, padding: int = 0, num_items: int = 9) -> tuple[Tensor, Sequence]:
    """Targets (leaves) and histories."""
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding, num_items=num_items)


def one_item_a_position(query: Tensor, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Sequence]:
    """Leaves for a batch that carries a vector per position, as LongCTR's do."""
    vectors = vectors.detach().requires_grad_()
    return query.detach().requires_grad_(), Sequence.from_vectors(vectors, mask)


def assert_same(output: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Output and the gradients of all leaves."""
    torch.testing.assert_close(output, expected, **EXACT)
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def by_row(row: Callable[[Tensor, Tensor], Tensor], query: Tensor, sequence: Sequence) -> Tensor:
    """``row(target [d], real tokens [t, d])`` of every row."""
    return torch.stack([row(q, v[m]) for q, v, m in zip(query, sequence.vectors, sequence.mask, strict=True)])


def attend(
    layer: TargetAttention, target: Tensor, tokens: Tensor, real: Tensor | None = None, scale: bool = True
) -> Tensor:
    """Multi-head target attention of one row by the formula; masked scores are -1e9; zeros without a token.

    Args:
        target: ``[d]``.
        tokens: ``[t, d]``.
        real: ``[t]`` bool, default all.
        scale: divide scores by the square root of a head's width.
    """
    if len(tokens) == 0:
        return torch.zeros_like(target)
    if layer.use_qkvo:
        q, k, v = layer.W_q(target), layer.W_k(tokens), layer.W_v(tokens)
    else:
        q, k, v = target, tokens, tokens
    answer = []
    for part in torch.arange(len(q)).chunk(layer.num_heads):
        scores = k[:, part] @ q[part] / (math.sqrt(len(part)) if scale else 1.0)
        if real is not None:
            scores = scores.masked_fill(~real, -1e9)
        answer.append(scores.softmax(0) @ v[:, part])
    joined = torch.cat(answer)
    return layer.W_o(joined) if layer.use_qkvo else joined


def longctr_short(block: Any, query: Tensor, vectors: Tensor, mask: Tensor, scale: bool = True) -> Tensor:
    """LongCTR's short branch: the slice ``[-S:-1]`` of L + 1 items (the target last) and of L mask columns."""
    window = slice(-block.short_seq_len, -1)
    items = torch.cat([vectors, query.unsqueeze(1)], 1)[:, window]
    rows = zip(query, items, mask[:, window], strict=True)
    return torch.stack([attend(block.short_attention, q, v, m, scale) for q, v, m in rows])


def newest(block: Any, tokens: Tensor) -> Tensor:
    """What the short branch reads of one row's real tokens."""
    return tokens[max(len(tokens) - (block.short_seq_len - 1), 0) :]


def distances(target: Tensor, tokens: Tensor, rotations: Tensor) -> Tensor:
    """Hamming distances ``[t]`` to the target under rotations ``[d, bits]``."""
    return ((tokens @ rotations > 0) != (target @ rotations > 0)).sum(-1)


def padded(sequence: Sequence, columns: int) -> Sequence:
    """The same histories behind more padding, which points at a real item's row."""
    index = F.pad(sequence.index, (columns, 0))
    return Sequence(sequence.items, index, F.pad(sequence.mask, (columns, 0)))


def other_padding(sequence: Sequence) -> Sequence:
    """The same histories, padding columns pointing at other items."""
    other = (sequence.index + 1) % len(sequence.items)
    return Sequence(sequence.items, torch.where(sequence.mask, sequence.index, other), sequence.mask)


def padding_gap(block: Any) -> Tensor:
    """``[2, width]`` by how much other padding moves the answers of a one-item and of an empty row."""
    query, sequence = case([1, 0], padding=6)
    return (block(query, other_padding(sequence)) - block(query, sequence)).detach().abs()


def check_padding_reaches_longctrs_short_branch(build: Callable[..., Any], short: slice) -> None:
    """The padding vector moves columns ``short`` of every answer under longctr_compat, and nothing by default."""
    assert float(padding_gap(build(longctr_compat=True))[:, short].amax(1).min()) > 1e-3
    assert float(padding_gap(build(longctr_compat=False)).max()) == 0.0


def any_histories(**options: st.SearchStrategy) -> Callable[..., Any]:
    """Run a test ``(lengths, padding, seed, **options)`` on drawn history lengths, and on draws of a block's options."""
    lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)
    drawn = given(lengths=lengths, padding=st.integers(1, 6), seed=st.integers(0, 100), **options)
    return lambda test: settings(derandomize=True, deadline=None, max_examples=25)(drawn(test))


def refused(*more: tuple[dict[str, Any], str]) -> Any:
    """Run a test ``(options, message)`` on settings that every block refuses, and on more of its own."""
    every = [
        ({"short_seq_len": 1}, "short_seq_len must be at least 2, not 1"),
        ({"num_heads": 5}, "must be a multiple of num_heads"),
    ]
    return pytest.mark.parametrize("options, message", [*more, *every])


def check_refused(build: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    """Settings out of range raise a ValueError that names them."""
    with pytest.raises(ValueError, match=message):
        build(**options)


def check_refuses_short_batches(build: Callable[..., Any], literal: Callable[..., Tensor]) -> None:
    """Batches padded to less than the short branch's window: longctr_compat refuses them, the default reads them."""
    query, sequence = case([4, 2])
    with pytest.raises(ConfigError, match="padded to 4 items when short_seq_len is 5; set longctr_compat: False"):
        build(longctr_compat=True)(query, sequence)
    block = build()
    torch.testing.assert_close(block(query, sequence), literal(block, query, sequence), **EXACT)


def check_draws(
    build: Callable[..., Any], literal: Callable[..., Tensor], shape: tuple[int, ...], take: Any = ...
) -> None:
    """Without reuse of rotations, evaluation repeats; training draws ``shape`` by the global seed, and draws anew.

    Args:
        build: the block's.
        literal: the block's, with ``rotations=``.
        shape: of the drawn rotations.
        take: what the literal form takes of them.
    """
    block = build(reuse_hash=False)
    query, sequence = case()
    assert torch.equal(block(query, sequence), block(query, sequence))
    torch.testing.assert_close(block(query, sequence), literal(block, query, sequence), **EXACT)
    block.train()
    torch.manual_seed(3)
    output = block(query, sequence)
    torch.manual_seed(3)
    drawn = torch.randn(shape, dtype=torch.double)[take]
    leaves = [query, sequence.items, *block.parameters()]
    assert_same(output, literal(block, query, sequence, rotations=drawn), leaves)
    assert not torch.allclose(block(query, sequence), output)


def check_longctr_draws(
    block: Any,
    longctr: Callable[..., Tensor],
    draw: Callable[[], Any],
    lengths: list[int],
    moves: bool = True,
) -> None:
    """Under longctr_compat: LongCTR's forward with its draws ``draw()``, which another seed moves if ``moves``."""
    query, sequence = case(lengths)
    query, sequence = one_item_a_position(query, sequence.vectors, sequence.mask)
    torch.manual_seed(4)
    output = block(query, sequence)
    torch.manual_seed(4)
    expected = longctr(block, query, sequence.vectors, sequence.mask, draw())
    assert_same(output, expected, [query, sequence.items, *block.parameters()])
    torch.manual_seed(6)
    assert not moves or not torch.allclose(block(query, sequence), output)  # random in evaluation too


def check_padding_order_and_mates(block: Any, lengths: list[int], padding: int, seed: int) -> None:
    """A row's answer does not depend on padding, on the rows' order or on the other rows."""
    query, plain = case(lengths, seed)
    output = block(query, plain)
    torch.testing.assert_close(block(query, padded(plain, padding)), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = [block(query[[b]], plain.select(torch.tensor([b])).last(max(n, 1))) for b, n in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(alone), output, **EXACT)


def check_empty(block: Any, width: int) -> None:
    """Empty rows, batches without columns and batches without rows give zeros; gradients are finite."""
    query, sequence = case()
    output = block(query, sequence)
    assert torch.equal(output[LENGTHS.index(0)], torch.zeros(width, dtype=torch.double))
    none = Sequence(sequence.items, sequence.index[:, :0], sequence.mask[:, :0])
    for tokens in (none, padded(none, 3)):
        output = block(query, tokens)
        assert torch.equal(output, torch.zeros(len(query), width, dtype=torch.double))
    assert all(bool(g.isfinite().all()) for g in gradients(output, [query, sequence.items, *block.parameters()]))
    assert block(query[:0], sequence.select(torch.tensor([], dtype=torch.long))).shape == (0, width)


def check_single_precision(block: Any) -> None:
    """Finite values and gradients in float32, with empty and one-item rows in the batch."""
    block = block.float()
    query, sequence = case()
    query, items = query.detach().float().requires_grad_(), sequence.items.detach().float().requires_grad_()
    output = block(query, Sequence(items, sequence.index, sequence.mask))
    assert output.dtype == torch.float32 and bool(output.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in gradients(output, [query, items, *block.parameters()]))
