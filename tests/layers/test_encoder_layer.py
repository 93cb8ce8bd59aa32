"""The encoder layer against torch's own, whole rows and one row of real tokens at a time; masks, causality, dropout."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients
from torch import nn

from model_zoo.layers.encoder_layer import EncoderLayer

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH = 8
LENGTHS = [6, 1, 0, 4]


def build(**options: Any) -> EncoderLayer:
    torch.manual_seed(5)
    layer = EncoderLayer(WIDTH, **{"num_heads": 2, "inner": 12, **options}).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def torchs(layer: EncoderLayer, activation: str = "relu", norm: str = "post", dropout: float = 0.0) -> Any:
    """torch's layer that reads ``layer``'s own parameters."""
    theirs = nn.TransformerEncoderLayer(
        WIDTH, layer.self_attn.num_heads, layer.linear1.out_features, dropout, activation, batch_first=True,
        norm_first=norm == "pre", layer_norm_eps=layer.norm1.eps, dtype=torch.double,
    )  # fmt: skip
    theirs.train(layer.training)

    def call(tokens: torch.Tensor, src_mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.func.functional_call(theirs, dict(layer.named_parameters()), (tokens, src_mask))

    call.layer = theirs
    return call


def tokens_and_mask(lengths=LENGTHS, padding: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(lengths, default=0) + padding
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(lengths), length, WIDTH, generator=generator, dtype=torch.double).requires_grad_()
    return tokens, torch.arange(length) >= length - torch.tensor(lengths).unsqueeze(1)


def assert_same(output, expected, leaves) -> None:
    torch.testing.assert_close(output, expected, **EXACT)
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_full_rows_equal_torchs_layer_with_every_gradient(heads, activation, norm):
    layer = build(num_heads=heads, activation=activation, norm=norm, eps=1e-3)
    tokens, mask = tokens_and_mask([5, 5, 5])
    expected = torchs(layer, activation, norm)(tokens)
    assert_same(layer(tokens, mask), expected, [tokens, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_each_rows_real_tokens_are_encoded_as_if_alone(norm, causal):
    layer = build(norm=norm)
    tokens, mask = tokens_and_mask(padding=2)
    rows = []
    for row, real in zip(tokens, mask, strict=True):
        length = int(real.sum())
        later = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
        if length:
            rows.append(torchs(layer, norm=norm)(row[real].unsqueeze(0), later)[0])
    assert_same(layer(tokens, mask, causal)[mask], torch.cat(rows), [tokens, *layer.parameters()])


@pytest.mark.parametrize("causal", [False, True])
def test_real_tokens_pass_no_gradient_to_padding(causal):
    layer = build()
    tokens, mask = tokens_and_mask(padding=1)
    (grad,) = gradients(layer(tokens, mask, causal)[mask], [tokens])
    assert not grad[~mask].any()
    assert bool(grad[mask].abs().sum(1).all())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_rows_and_prefixes_without_a_real_token_are_finite_with_finite_gradients(causal, dtype):
    layer = build().to(dtype)
    tokens, mask = tokens_and_mask([0, 3, 0])
    tokens = tokens.detach().to(dtype).requires_grad_()
    output = layer(tokens, mask, causal)
    assert output.dtype == dtype and bool(output.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in gradients(output, [tokens, *layer.parameters()]))


def test_a_token_that_may_attend_to_nothing_adds_the_output_bias_alone():
    layer = build()
    tokens, mask = tokens_and_mask([0])
    tokens = torch.cat([tokens, torch.randn(1, 3, WIDTH, dtype=torch.double)], 1)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    attended = layer.norm1(tokens + layer.self_attn.out_proj.bias)
    inner = torch.relu(layer.linear1(attended))
    torch.testing.assert_close(layer(tokens, mask), layer.norm2(attended + layer.linear2(inner)), **EXACT)


def test_causal_answers_do_not_depend_on_later_tokens():
    layer = build()
    tokens, mask = tokens_and_mask([6])
    output = layer(tokens, mask, causal=True)
    for column in range(6):
        (grad,) = gradients(output[:, column], [tokens])
        assert grad[0].abs().sum(1).gt(0).tolist() == [other <= column for other in range(6)]


@pytest.mark.parametrize("rates", [(0.4, None, None), (0.4, 0.0, 0.0), (0.0, 0.4, 0.0), (0.0, 0.0, 0.4)])
def test_dropout_stands_where_torchs_does(rates):
    """From the same random state both layers draw the same (for one row: torch's keeps batches in another layout)."""
    dropout, attention, inner = rates
    layer = build(dropout=dropout, attention_dropout=attention, inner_dropout=inner)
    theirs = torchs(layer, dropout=dropout)
    theirs.layer.self_attn.dropout = dropout if attention is None else attention
    theirs.layer.dropout.p = dropout if inner is None else inner
    tokens, mask = tokens_and_mask([7])
    torch.manual_seed(11)
    output = layer(tokens, mask)
    torch.manual_seed(11)
    expected = theirs(tokens)
    assert_same(output, expected, [tokens, *layer.parameters()])
    layer.eval()
    assert not torch.allclose(layer(tokens, mask), output)
    assert torch.equal(layer(tokens, mask), layer(tokens, mask))


def test_state_dicts_and_first_values_are_torchs():
    torch.manual_seed(1)
    ours = EncoderLayer(WIDTH, 2, 12)
    torch.manual_seed(1)
    theirs = nn.TransformerEncoderLayer(WIDTH, 2, 12)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_batches_without_columns_or_rows_are_returned_as_they_are():
    layer = build()
    assert layer(*tokens_and_mask([0, 0])).shape == (2, 0, WIDTH)
    assert layer(*tokens_and_mask([], padding=3)).shape == (0, 3, WIDTH)


@pytest.mark.parametrize("heads", [3, 0])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(ValueError, match=rf"num_heads \({heads}\) must divide the width of the tokens \(8\)"):
        build(num_heads=heads)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    padding=st.integers(1, 4),
    causal=st.booleans(),
    norm=st.sampled_from(["post", "pre"]),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, causal, norm, seed):
    layer = build(norm=norm)
    tokens, mask = tokens_and_mask(lengths, seed=seed)
    output = layer(tokens, mask, causal)
    noise = torch.randn(len(lengths), padding, WIDTH, dtype=torch.double)
    columns = torch.zeros(len(lengths), padding, dtype=torch.bool)
    padded = layer(torch.cat([noise, tokens], 1), torch.cat([columns, mask], 1), causal)[:, padding:]
    torch.testing.assert_close(padded[mask], output[mask], **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(tokens[order], mask[order], causal), output[order], **EXACT)
    alone = [layer(tokens[[row]], mask[[row]], causal) for row in range(len(lengths))]
    torch.testing.assert_close(torch.cat(alone), output, **EXACT)
