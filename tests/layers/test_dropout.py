"""Dropout by 16-bit draws: shares, scale, gradient, and where it stands in a model."""

import pytest
import torch
from golden_files import small_model
from torch import nn

from model_zoo.layers.dropout import Dropout, dropout_factors, use_fast_dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_zero_in_the_stated_share_and_have_mean_one(share, dtype):
    torch.manual_seed(0)
    factors = dropout_factors((301, 401), share, torch.empty(0, dtype=dtype))
    assert factors.dtype == dtype and set(factors.unique().tolist()) == {0.0, float(factors.max())}
    deviation = (share * (1 - share) / factors.numel()) ** 0.5
    assert abs(float((factors == 0).double().mean()) - share) < 4 * deviation
    torch.testing.assert_close(factors.max().double(), torch.tensor(1 / (1 - share)).double(), rtol=2e-4, atol=0)
    again = (torch.manual_seed(0), dropout_factors((301, 401), share, torch.empty(0, dtype=dtype)))[1]
    assert torch.equal(factors, again)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_nothing(share):
    assert dropout_factors((3, 5), share, torch.empty(0)).unique().tolist() == [1.0 - share]


def test_neighbouring_draws_are_independent():
    torch.manual_seed(1)
    kept = (dropout_factors((1 << 16,), 0.5, torch.empty(0)) != 0).double()
    for distance in (1, 2, 3, 4, 8):  # four draws share one 64-bit number
        both = float((kept[:-distance] * kept[distance:]).mean())
        assert abs(both - 0.25) < 4 * (0.1875 / (1 << 16)) ** 0.5


def test_the_gradient_passes_where_the_value_did_and_evaluation_changes_nothing():
    layer = Dropout(0.3)
    x = torch.randn(7, 9, requires_grad=True)
    answer = layer(x)
    answer.sum().backward()
    torch.testing.assert_close(x.grad * x, answer)
    assert torch.equal(layer.eval()(x), x)


def test_a_model_has_it_in_every_place_but_under_longctr_compat():
    def kinds(**settings):
        model = small_model("TWIN", net_dropout=0.2, **settings)
        return {type(m) for m in model.modules() if isinstance(m, nn.Dropout)}

    assert kinds() == {Dropout}
    assert kinds(longctr_compat=True) == {nn.Dropout}


def test_only_plain_dropout_is_replaced():
    block = nn.Sequential(nn.Dropout(0.25), nn.Sequential(nn.Dropout1d(0.5), nn.Dropout(0.75)))
    use_fast_dropout(block)
    assert [type(m) for m in (block[0], *block[1])] == [Dropout, nn.Dropout1d, Dropout]
    assert (block[0].p, block[1][1].p) == (0.25, 0.75)
