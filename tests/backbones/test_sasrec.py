"""SASRec against attention computed query by query: outputs, gradients, positions, dropout, rare rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn

from model_zoo.backbones import sasrec as sasrec_module
from model_zoo.backbones.sasrec import SASRecBlock
from model_zoo.layers.sequence import Sequence

# float64 sums of a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-9, "atol": 1e-10}
LENGTHS = [7, 3, 0, 1, 5]


def block_and_query(batch: int = 5, **options) -> tuple[SASRecBlock, Tensor]:
    torch.manual_seed(3)
    block = SASRecBlock(6, **{"hidden_dropout": 0.0, "attention_dropout": 0.0, "max_positions": 20, **options}).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.7)
    return block, torch.randn(batch, 6, dtype=torch.double, requires_grad=True)


def sasrec_row(block: SASRecBlock, tokens: Tensor) -> Tensor:
    """The interest of one row's real tokens ``[t, d]``: every query of every layer, head by head."""
    total, dim = tokens.shape
    if total == 0:
        return tokens.new_zeros(dim)
    ages = [min(total - 1 - p, len(block.positions) - 1) for p in range(total)]
    x = [token + block.positions[age] for token, age in zip(tokens, ages, strict=True)]
    for layer in block.layers:
        attention = layer.self_attn
        heads, width = attention.num_heads, dim // attention.num_heads
        projected = [F.linear(layer.norm1(v), attention.in_proj_weight, attention.in_proj_bias) for v in x]
        attended = []
        for p in range(total):
            answers = []
            for head in range(heads):
                q, k, v = (slice(i * dim + head * width, i * dim + (head + 1) * width) for i in range(3))
                scores = torch.stack([projected[p][q] @ projected[j][k] / math.sqrt(width) for j in range(p + 1)])
                answers.append(sum(a * projected[j][v] for j, a in enumerate(scores.softmax(0))))
            attended.append(x[p] + attention.out_proj(torch.cat(answers)))
        x = [a + layer.linear2(torch.relu(layer.linear1(layer.norm2(a)))) for a in attended]
    return block.norm(x[-1])


def sasrec(block: SASRecBlock, query: Tensor, sequence: Sequence) -> Tensor:
    rows = torch.stack([sasrec_row(block, tokens) for tokens in rows_of(sequence.vectors, sequence.mask)])
    return (rows * query).sum(1, keepdim=True) if block.head == "dot" else rows


@pytest.mark.parametrize("options", [
    {}, {"num_layers": 1, "num_heads": 3}, {"num_layers": 3, "num_heads": 1, "inner_dim": 10}, {"max_positions": 4},
])  # fmt: skip
@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_output_and_every_gradient_equal_attention_query_by_query(options, head):
    block, query = block_and_query(head=head, **options)
    sequence = ragged(LENGTHS, 6, padding=2)
    output, expected = block(query, sequence), sasrec(block, query, sequence)
    assert output.shape == (5, block.out_dim) == (5, 1 if head == "dot" else 6)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_items_beyond_the_table_share_the_oldest_position():
    block, query = block_and_query(1, num_layers=1, max_positions=3)
    sequence = ragged([7], 6)
    swapped = sequence.index[:, [1, 0, 3, 2, 4, 5, 6]]  # all of these have the oldest position
    expected = block(query, sequence)
    torch.testing.assert_close(block(query, Sequence(sequence.items, swapped, sequence.mask)), expected, **EXACT)
    newer = sequence.index[:, [0, 1, 2, 3, 5, 4, 6]]
    moved = block(query, Sequence(sequence.items, newer, sequence.mask))
    assert float((moved - expected).detach().abs().max()) > 1e-3


def test_the_newest_positions_answer_is_the_last_column_of_all_answers():
    block, _ = block_and_query()
    sequence = ragged(LENGTHS, 6, padding=1)
    real = sequence.mask[:, -1]
    for layer in block.layers:
        every = layer(sequence.vectors, sequence.mask, causal=True)
        torch.testing.assert_close(layer.newest(sequence.vectors, sequence.mask)[real], every[real, -1], **EXACT)


@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_rows_without_an_item_give_exact_zeros_and_no_gradient(head):
    block, query = block_and_query(head=head)
    sequence = ragged(LENGTHS, 6, padding=1)
    output = block(query, sequence)
    assert torch.equal(output[2], torch.zeros(block.out_dim, dtype=torch.double))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(output[2], [sequence.items, *block.parameters()]))
    assert all(bool(g.isfinite().all()) for g in gradients(output, [sequence.items, *block.parameters()]))
    none = Sequence.from_vectors(torch.zeros(5, 0, 6, dtype=torch.double), torch.zeros(5, 0, dtype=torch.bool))
    assert torch.equal(block(query, none), torch.zeros(5, block.out_dim, dtype=torch.double))
    assert block(query[:0], ragged([], 6)).shape == (0, block.out_dim)


def test_dropout_acts_in_training_only():
    for options in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        for layers in (1, 2):
            block, query = block_and_query(num_layers=layers, **options)
            sequence = ragged([7, 3, 4, 6, 5], 6)
            block.eval()
            torch.testing.assert_close(block(query, sequence), sasrec(block, query, sequence), **EXACT)
            block.train()
            assert not torch.equal(block(query, sequence), block(query, sequence))


def test_attention_dropout_drops_whole_values_their_bias_included(monkeypatch):
    block, _ = block_and_query(1, num_layers=1, attention_dropout=0.5)
    (layer,) = block.layers
    layer.dropout1.p = layer.dropout.p = layer.dropout2.p = 0.0
    sequence = ragged([5], 6)
    kept = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]], dtype=torch.double)  # [h, T]
    monkeypatch.setattr(sasrec_module.F, "dropout", lambda x, rate, *_: x * kept / 0.5 if rate else x)
    pooled = []
    layer.self_attn.out_proj.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    layer.train().newest(sequence.vectors, sequence.mask)
    attention = layer.self_attn
    projected = F.linear(layer.norm1(sequence.vectors[0]), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = projected.view(5, 3, 2, 3).unbind(1)  # [T, h, e]
    weights = torch.einsum("he,the->ht", query[-1], key).div(math.sqrt(3)).softmax(1) * kept / 0.5
    torch.testing.assert_close(pooled[0][0], torch.einsum("ht,the->he", weights, value).flatten(), **EXACT)


def test_settings_out_of_range_are_refused():
    for key in ("num_layers", "inner_dim", "max_positions"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0"):
            SASRecBlock(6, **{key: 0})
    for key in ("hidden_dropout", "attention_dropout"):
        with pytest.raises(ValueError, match=rf"{key} must lie in 0\.\.1, not -1"):
            SASRecBlock(6, **{key: -1})
    with pytest.raises(ValueError, match=r"num_heads \(4\) must divide"):
        SASRecBlock(6, num_heads=4)


def test_float32_works():
    torch.manual_seed(0)
    block, sequence = SASRecBlock(6), ragged([20, 0, 3], 6, dtype=torch.float)
    output = block(torch.randn(3, 6), sequence)
    assert output.dtype == torch.float
    assert all(bool(g.isfinite().all()) for g in gradients(output, [sequence.items, *block.parameters()]))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    layers=st.integers(1, 2),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, layers, seed):
    block, query = block_and_query(len(lengths), num_layers=layers, max_positions=5)
    plain = ragged(lengths, 6, seed)
    columns = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    output = block(query, plain)
    torch.testing.assert_close(block(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
