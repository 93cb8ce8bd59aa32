"""MIRRN's filter against the Fourier transform that it stands for, one row and one length at a time."""

import pytest
import torch
from oracles import gradients
from torch import nn

from model_zoo.layers.fourier_filter import FourierFilter, hilbert_kernels

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 8


def build(max_length=12, **options):
    torch.manual_seed(0)
    layer = FourierFilter(DIM, max_length, **options).double()
    nn.init.normal_(layer.complex_weight)
    nn.init.normal_(layer.LayerNorm.weight)
    nn.init.normal_(layer.LayerNorm.bias)
    return layer


def literal(layer, tokens):
    """One row's real tokens ``[t, d]`` through the transform, LayerNorm with its epsilon inside the root."""
    weight = layer.complex_weight
    if weight.dim() == 4:  # LongCTR's product over blocks, of which only the diagonals take part
        spectrum = torch.fft.rfft(tokens, dim=0, norm="ortho").view(-1, 4, DIM // 4)
        spectrum = torch.einsum("lnd,ndd->lnd", spectrum, torch.view_as_complex(weight)).reshape(-1, DIM)
    else:
        spectrum = torch.fft.rfft(tokens, dim=0, norm="ortho") * torch.view_as_complex(weight)
    summed = torch.fft.irfft(spectrum, n=len(tokens), dim=0, norm="ortho") + tokens
    centred = summed - summed.mean(1, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-12)
    return layer.LayerNorm.weight * normal + layer.LayerNorm.bias


@pytest.mark.parametrize("full_blocks", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 5, 12])
def test_every_row_is_filtered_over_its_own_length(columns, full_blocks):
    layer = build(full_blocks=full_blocks)
    lengths = [n for n in (12, 7, 6, 3, 2, 1) if n <= columns]
    vectors = torch.randn(len(lengths), columns, DIM, dtype=torch.double, requires_grad=True)
    mask = torch.arange(columns) >= columns - torch.tensor(lengths).unsqueeze(1)
    output = layer(vectors, mask)[mask]
    expected = torch.cat([literal(layer, row[real]) for row, real in zip(vectors, mask)])
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [vectors, *layer.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("length", range(1, 10))
def test_the_imaginary_part_turns_oscillations_and_drops_the_mean(length):
    kernel = hilbert_kernels(9)[length, 8 - torch.arange(length)]  # h_n(0 .. n - 1)
    time = torch.arange(length, dtype=torch.double)
    matrix = torch.stack([kernel[(i - torch.arange(length)) % length] for i in range(length)])
    for frequency in range(length // 2 + 1):
        angle = 2 * torch.pi * frequency * time / length
        turns = 0 < 2 * frequency < length
        torch.testing.assert_close(matrix @ angle.cos(), -angle.sin() if turns else 0 * angle, **EXACT)
        torch.testing.assert_close(matrix @ angle.sin(), angle.cos() if turns else 0 * angle, **EXACT)


def test_only_the_diagonals_of_longctrs_blocks_take_part():
    """4 blocks of 6 x 6 complex weights: 240 of 288 weights are dead; without them 48 weights give the same."""
    full = FourierFilter(24, 6, full_blocks=True).double()
    vectors = torch.randn(3, 6, 24, dtype=torch.double)
    mask = torch.ones(3, 6, dtype=torch.bool)
    output = full(vectors, mask)
    (grad,) = gradients(output, [full.complex_weight])
    diagonal = torch.eye(6, dtype=torch.bool).expand(4, 6, 6)
    assert full.complex_weight.numel() == 288 and int((grad == 0).sum()) == 240
    assert bool((grad[diagonal] != 0).all()) and not grad[~diagonal].any()
    lean = FourierFilter(24, 6).double()
    assert lean.complex_weight.numel() == 48
    with torch.no_grad():
        lean.complex_weight.copy_(full.complex_weight[diagonal])
    torch.testing.assert_close(lean(vectors, mask), output, **EXACT)


def test_columns_outside_a_rows_length_do_not_matter():
    layer = build()
    vectors = torch.randn(2, 6, DIM, dtype=torch.double, requires_grad=True)
    mask = torch.arange(6) >= torch.tensor([[4], [0]])
    output = layer(vectors, mask)
    (grad,) = gradients(output[mask], [vectors])
    assert not grad[~mask].any() and bool(grad[mask].any(1).all())
    moved = torch.where(mask.unsqueeze(2), vectors, 7.0)
    assert torch.equal(layer(moved, mask)[mask], output[mask])


def test_dropout_acts_on_the_filtered_values_in_training_only():
    layer = build(dropout=0.99)
    vectors, mask = torch.randn(2, 6, DIM, dtype=torch.double), torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(layer.eval()(vectors, mask), torch.stack([literal(layer, row) for row in vectors]), **EXACT)
    unfiltered = layer.LayerNorm(vectors)
    dropped = layer.train()(vectors, mask)
    same = torch.isclose(dropped, unfiltered).all(2)  # tokens of which every channel was dropped
    assert bool(same.any()) and not torch.equal(dropped, layer.eval()(vectors, mask))


def test_the_kernels_are_no_part_of_a_checkpoint():
    assert set(build().state_dict()) == {"complex_weight", "LayerNorm.weight", "LayerNorm.bias"}
    assert float(FourierFilter(4_000, 3).complex_weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_full_blocks_need_a_width_of_four_parts():
    with pytest.raises(ValueError, match=r"width of an item vector \(10\) must be a multiple of 4"):
        FourierFilter(10, 3, full_blocks=True)
    FourierFilter(10, 3)
