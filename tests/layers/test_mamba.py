"""The Mamba block against its equations row by row: golden values, gradients, causality, padding, start values."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn

from model_zoo.errors import ConfigError
from model_zoo.layers import scan_autograd, selective_scan
from model_zoo.layers.mamba import Mamba, causal_conv
from model_zoo.layers.selective_scan import scan_loop
from model_zoo.layers.sequence import Sequence
from model_zoo.sequential_ctr import _initialise

# float64 sums of a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [7, 3, 0, 1, 5]


def mamba_of(dim: int = 6, seed: int = 3, **options) -> Mamba:
    torch.manual_seed(seed)
    layer = Mamba(dim, **{"d_state": 5, **options}).double()
    for name, weight in layer.named_parameters():
        if name not in ("A_log", "dt_proj.bias"):
            nn.init.normal_(weight, std=0.5)
    return layer


def mamba_row(layer: Mamba, tokens: Tensor) -> Tensor:
    """One row's real tokens ``[t, d]``: the block's seven steps, the convolution as a sum over taps."""
    channels, taps, states = layer.channels, layer.conv1d.weight.shape[2], layer.A_log.shape[1]
    projected = tokens @ layer.in_proj.weight.T
    u, z = projected[:, :channels], projected[:, channels:]
    convolved = []
    for t in range(len(tokens)):
        total = layer.conv1d.bias
        for j in range(taps):
            if t - taps + 1 + j >= 0:
                total = total + layer.conv1d.weight[:, 0, j] * u[t - taps + 1 + j]
        convolved.append(F.silu(total))
    c = torch.stack(convolved)
    parts = c @ layer.x_proj.weight.T
    low_rank, B, C = parts[:, : layer.dt_rank], parts[:, layer.dt_rank : -states], parts[:, -states:]
    scanned = [c, low_rank @ layer.dt_proj.weight.T, -torch.exp(layer.A_log), B, C, layer.D, z, layer.dt_proj.bias]
    at = {0, 1, 3, 4, 6}  # those with a position
    y, _ = scan_loop(*(s.unsqueeze(0) if i in at else s for i, s in enumerate(scanned)))
    return y[0] @ layer.out_proj.weight.T


def test_golden_block():
    def wave(function, scale, shift, *shape):
        return function(scale * torch.arange(math.prod(shape), dtype=torch.double) + shift).view(shape)

    layer = Mamba(4, d_state=3, d_conv=4, expand=2).double()
    with torch.no_grad():
        layer.in_proj.weight.copy_(0.5 * wave(torch.cos, 0.17, 0, 16, 4))
        layer.conv1d.weight.copy_(0.4 * wave(torch.sin, 0.23, 0.4, 8, 1, 4))
        layer.conv1d.bias.copy_(0.1 * wave(torch.cos, 1.0, 0, 8))
        layer.x_proj.weight.copy_(0.3 * wave(torch.sin, 0.11, 1, 7, 8))
        layer.dt_proj.weight.copy_(0.2 * wave(torch.cos, 0.5, 0, 8, 1))
        layer.dt_proj.bias.copy_(-2 + 0.1 * torch.arange(8))
        layer.out_proj.weight.copy_(0.25 * wave(torch.sin, 0.07, 0.3, 4, 8))
        layer.A_log.copy_(torch.arange(1.0, 4.0, dtype=torch.double).log().repeat(8, 1))  # in float64 as the rest
    tokens = Sequence.from_vectors(wave(torch.sin, 0.31, 0.2, 1, 5, 4), torch.ones(1, 5, dtype=torch.bool))
    expected = torch.tensor([
        [0.00802831, 0.03603485, 0.05303311, 0.05383030],
        [0.06106036, 0.18608698, 0.25426592, 0.24476922],
        [0.00420511, 0.00601238, 0.00598293, 0.00412576],
        [0.11528029, 0.17333282, 0.17843394, 0.12902532],
        [0.01635373, 0.02802463, 0.03113429, 0.02473274],
    ], dtype=torch.double).unsqueeze(0)  # fmt: skip
    torch.testing.assert_close(layer(tokens), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(layer.newest(tokens), expected[:, -1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_outputs_and_every_gradient_equal_the_equations_row_by_row(monkeypatch, taps, rows):
    monkeypatch.setitem(scan_autograd.SLICE_FLOATS, "cpu", rows * 12 * 5)
    layer, sequence = mamba_of(d_conv=taps), ragged(LENGTHS, 6, padding=2)
    leaves = [sequence.items, *layer.parameters()]
    rows_wanted = [mamba_row(layer, tokens) for tokens in rows_of(sequence.vectors, sequence.mask) if len(tokens)]
    expected = torch.cat(rows_wanted)
    full = layer(sequence)
    torch.testing.assert_close(full[sequence.mask], expected, **EXACT)
    assert torch.equal(full[~sequence.mask], torch.zeros_like(full[~sequence.mask]))
    for got, want in zip(gradients(full[sequence.mask], leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    newest, goal = layer.newest(sequence)[sequence.mask[:, -1]], torch.stack([row[-1] for row in rows_wanted])
    torch.testing.assert_close(newest, goal, **EXACT)
    for got, want in zip(gradients(newest, leaves), gradients(goal, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("length,rows", [(7, 1), (7, 3), (2, 5)])
def test_causal_convolution_equals_torchs(monkeypatch, length, rows):
    monkeypatch.setitem(scan_autograd.SLICE_FLOATS, "cpu", rows * length * 6)
    torch.manual_seed(0)
    conv = nn.Conv1d(6, 6, 4, groups=6, padding=3).double()
    u = torch.randn(5, length, 6, dtype=torch.double, requires_grad=True)
    mask = torch.arange(length) >= length - torch.tensor([7, 3, 0, 1, 5]).unsqueeze(1)
    weights = mask.unsqueeze(2)
    expected = F.silu(conv((u * weights).transpose(1, 2))[..., :length].transpose(1, 2)) * weights
    output = causal_conv(u, mask, conv.weight.squeeze(1), conv.bias)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [u, conv.weight, conv.bias]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_changing_an_item_changes_no_earlier_output():
    layer = mamba_of()
    vectors, mask = torch.randn(2, 9, 6, dtype=torch.double), torch.ones(2, 9, dtype=torch.bool)
    before = layer(Sequence.from_vectors(vectors, mask))
    for changed in range(9):
        other = vectors.clone()
        other[:, changed] += 1
        after = layer(Sequence.from_vectors(other, mask))
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert bool((after[:, changed:] != before[:, changed:]).any(2).all())


@pytest.mark.parametrize("padding", [1, 3, 20])
def test_left_padding_is_neutral_to_the_bit(padding):
    layer, plain, padded = mamba_of(), ragged([7, 3, 6, 1], 6), ragged([7, 3, 6, 1], 6, padding=padding)
    index = torch.cat([padded.index[:, :padding], plain.index], 1)
    padded = Sequence(plain.items, index, padded.mask)
    assert torch.equal(layer(padded)[:, padding:], layer(plain))
    assert torch.equal(layer.newest(padded), layer.newest(plain))


def test_padding_with_nan_is_never_read():
    layer, sequence = mamba_of(), ragged(LENGTHS, 6, padding=2)
    items = torch.cat([sequence.items.detach(), torch.full((1, 6), torch.nan, dtype=torch.double)])
    poisoned = Sequence(items, sequence.index.masked_fill(~sequence.mask, len(items) - 1), sequence.mask)
    real = sequence.mask[:, -1]
    assert torch.equal(layer(poisoned)[sequence.mask], layer(sequence)[sequence.mask])
    assert torch.equal(layer.newest(poisoned)[real], layer.newest(sequence)[real])


def test_parameters_are_mamba_ssms():
    layer = Mamba(64, d_state=32)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "A_log": (128, 32), "D": (128,), "in_proj.weight": (256, 64), "conv1d.weight": (128, 1, 4), "conv1d.bias": (128,),
        "x_proj.weight": (68, 128), "dt_proj.weight": (128, 4), "dt_proj.bias": (128,), "out_proj.weight": (64, 128),
    }  # fmt: skip
    assert sum(p.numel() for p in layer.parameters()) == 38_784
    assert torch.equal(layer.A_log[5], torch.arange(1.0, 33.0).log())
    assert torch.equal(layer.D, torch.ones(128))


@pytest.mark.parametrize("init", ["mamba", "recbole", "fuxictr"])
def test_start_values_survive_fuxictrs_reset(init):
    torch.manual_seed(0)
    model = nn.Sequential(Mamba(64, d_state=32, mamba_init=init))
    _initialise(list(model.modules()))
    layer = model[0]
    step = F.softplus(layer.dt_proj.bias.detach())
    assert torch.equal(layer.A_log[0], torch.arange(1.0, 33.0).log())
    if init == "mamba":
        assert 1e-3 * 0.999 <= float(step.min()) < 3e-3 < 3e-2 < float(step.max()) <= 0.1 * 1.001
        low = torch.log(step).mean().item()  # log-uniform: mean log 0.01, standard error 1.33 / sqrt(128)
        assert abs(low - math.log(1e-2)) < 4 * 1.33 / math.sqrt(128)
        assert float(layer.dt_proj.weight.detach().abs().max()) <= 4**-0.5
        assert float(layer.dt_proj.weight.detach().std()) == pytest.approx(4**-0.5 / math.sqrt(3), rel=0.1)
        assert float(layer.in_proj.weight.detach().abs().max()) <= 64**-0.5
        assert float(layer.conv1d.bias.detach().abs().max()) > 0
        assert float(layer.conv1d.weight.detach().abs().max()) <= 0.5
        return
    torch.testing.assert_close(step, torch.full_like(step, math.log(2)))
    if init == "recbole":
        for linear in (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj):
            assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert float(layer.conv1d.bias.detach().abs().max()) > 0
    else:
        assert float(layer.in_proj.weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 + 256)), rel=0.1)
        assert torch.equal(layer.conv1d.bias, torch.zeros(128))


def test_first_steps_reach_both_ends_of_their_range_and_no_further():
    torch.manual_seed(0)
    step = F.softplus(Mamba(32, expand=128).dt_proj.bias.detach())  # of 4096, a dozen lie within 2 % of either end
    assert 0.9999e-3 < float(step.min()) < 1.02e-3
    assert 0.98e-1 < float(step.max()) < 1.0001e-1


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_gradients_are_finite_over_200_positions(dtype):
    torch.manual_seed(0)
    layer = Mamba(16, d_state=8).to(dtype)
    sequence = ragged([200, 1, 0, 120], 16, num_items=50, dtype=dtype)
    for output in (layer(sequence), layer.newest(sequence)):
        assert output.dtype == dtype and bool(output.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in gradients(output, [sequence.items, *layer.parameters()]))


def test_autocast_scans_in_float32():
    torch.manual_seed(0)
    layer, sequence = Mamba(16, d_state=8), ragged([20, 7], 16, dtype=torch.float)
    exact = layer(sequence), layer.newest(sequence)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = layer(sequence), layer.newest(sequence)
        for output, goal in zip(rough, exact, strict=True):
            # projections in bfloat16 carry 8 bits
            torch.testing.assert_close(output.float(), goal, rtol=0.1, atol=0.03 * goal.abs().max().item())
            assert all(bool(g.isfinite().all()) for g in gradients(output.float(), layer.parameters()))


def test_sizes_and_choices_out_of_range_are_refused(monkeypatch):
    for key in ("d_state", "d_conv", "expand"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0"):
            Mamba(4, **{key: 0})
    with pytest.raises(ValueError, match="mamba_init must be mamba, recbole or fuxictr, not 'torch'"):
        Mamba(4, mamba_init="torch")
    monkeypatch.setattr(selective_scan, "_mamba_ssm", lambda: (None, "none here"))
    with pytest.raises(ConfigError, match="scan_kernel: cuda needs mamba-ssm"):
        Mamba(4, scan_kernel="cuda")


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    taps=st.integers(1, 5),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, taps, seed):
    layer, plain = mamba_of(d_conv=taps), ragged([*lengths, 2], 6, seed)
    columns = torch.zeros(len(lengths) + 1, padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    full, newest, real = layer(plain), layer.newest(plain), plain.mask[:, -1]
    torch.testing.assert_close(layer(padded)[:, padding:], full, **EXACT)
    torch.testing.assert_close(layer.newest(padded)[real], newest[real], **EXACT)
    order = torch.randperm(len(lengths) + 1, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(plain.select(order)), full[order], **EXACT)
    for row in real.nonzero().flatten():
        count = int(plain.lengths[row])
        alone = plain.select(row.view(1)).last(count)
        torch.testing.assert_close(layer(alone)[0], full[row, -count:], **EXACT)
        torch.testing.assert_close(layer.newest(alone)[0], newest[row], **EXACT)
        torch.testing.assert_close(newest[row], full[row, -1], **EXACT)


@pytest.mark.gpu
@pytest.mark.mamba
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mamba_ssms_block_agrees():
    mamba_ssm = pytest.importorskip("mamba_ssm", reason="needs mamba-ssm: pip install 'longctr-mos[mamba]'")
    torch.manual_seed(0)
    theirs = mamba_ssm.Mamba(64, d_state=16).cuda()
    x = torch.randn(4, 50, 64, device="cuda")
    tokens = Sequence.from_vectors(x, torch.ones(4, 50, dtype=torch.bool, device="cuda"))
    for kernel in ("torch", "cuda"):
        ours = Mamba(64, d_state=16, scan_kernel=kernel).cuda()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(tokens), theirs(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.newest(tokens), theirs(x)[:, -1], rtol=1e-3, atol=1e-3)
