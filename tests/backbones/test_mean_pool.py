"""Mean pooling against means of rows, and FuxiCTR's pooling for LongCTR's padding."""

import pytest
import torch
from fuxictr.pytorch.layers import MaskedAveragePooling
from oracles import gradients, ragged, rows_of

from model_zoo.backbones.mean_pool import MeanPoolBlock
from model_zoo.layers.sequence import Sequence

# float64 sums of a dozen terms, taken in another order
EXACT = {"rtol": 1e-12, "atol": 1e-12}
DIM = 4
LENGTHS = [9, 1, 0, 4]


@pytest.mark.parametrize("padding", [0, 3])
def test_the_answer_is_the_mean_of_the_real_items(padding):
    block, sequence, query = MeanPoolBlock(DIM), ragged(LENGTHS, DIM, padding=padding), torch.zeros(4, DIM)
    expected = torch.stack([x.sum(0) / max(len(x), 1) for x in rows_of(sequence.vectors, sequence.mask)])
    output = block(query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    (got,), (want,) = gradients(output, [sequence.items]), gradients(expected, [sequence.items])
    torch.testing.assert_close(got, want, **EXACT)
    assert torch.equal(output[2], torch.zeros(DIM, dtype=torch.double)) and block.out_dim == DIM
    assert not list(block.parameters())


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_batches_without_rows_or_columns_give_zeros(lengths):
    nothing = torch.zeros(len(lengths), DIM, dtype=torch.double)
    assert torch.equal(MeanPoolBlock(DIM)(nothing, ragged(lengths, DIM)), nothing)


def test_longctr_compat_equals_fuxictrs_pooling_with_padding_in_the_sum():
    """Half of a history's columns padding: their vectors are in the sum, not in the count; without items, over 1e-12."""
    sequence = ragged(LENGTHS, DIM, padding=2)
    expected = MaskedAveragePooling()(sequence.vectors, sequence.mask)
    found = MeanPoolBlock(DIM, longctr_compat=True)(torch.zeros(4, DIM), sequence)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)  # FuxiCTR counts in float32
    assert float(found[2].detach().abs().max()) > 1e10
    (got,), (want,) = gradients(found, [sequence.items]), gradients(expected, [sequence.items])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


def test_padding_content_changes_longctrs_mean_and_not_the_defaults():
    plain = ragged(LENGTHS, DIM, padding=2)
    other = Sequence(plain.items, plain.index.masked_fill(~plain.mask, 5), plain.mask)
    for compat in (False, True):
        block = MeanPoolBlock(DIM, longctr_compat=compat)
        query = torch.zeros(4, DIM)
        assert torch.equal(block(query, plain), block(query, other)) != compat
