"""Experts in a map's place against every expert computed for every token; the sole expert; the balance loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients
from torch import Tensor, nn

from model_zoo.layers.token_experts import GatedFeedForward, TokenExperts, mix_linear

# float64 sums of a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def experts_of(number: int, topk: int, linear: bool = True) -> TokenExperts:
    torch.manual_seed(0)
    make, mix = (lambda: nn.Linear(4, 3), mix_linear) if linear else (lambda: GatedFeedForward(4, 3), GatedFeedForward.mix)
    layer = TokenExperts(make, mix, 5, number, topk).double()
    for weight in layer.parameters():
        nn.init.normal_(weight)
    return layer


def inputs(rows: int = 4, columns: int = 6, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, read = (torch.randn(rows, columns, w, generator=generator, dtype=torch.double) for w in (4, 5))
    mask = torch.arange(columns) >= torch.randint(0, columns + 1, (rows, 1), generator=generator)
    return tokens.requires_grad_(), read.requires_grad_(), mask


def by_token(layer: TokenExperts, tokens: Tensor, read: Tensor) -> Tensor:
    """Token by token, all experts answering; those that were not chosen weigh nothing."""
    answers = []
    for x, r in zip(tokens.flatten(0, 1), read.flatten(0, 1), strict=True):
        logits = layer.gate.weight @ r
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: layer.topk]
        total = sum(logits[e].exp() for e in (chosen if layer.topk > 1 else range(len(logits))))
        answers.append(sum(logits[e].exp() / total * layer.experts[e](x) for e in chosen))
    return torch.stack(answers).unflatten(0, tokens.shape[:2])


@given(linear=st.booleans(), number=st.integers(2, 5), data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_outputs_and_gradients_equal_every_expert_on_every_token(linear, number, data, rows, columns):
    layer = experts_of(number, data.draw(st.integers(1, number)), linear)
    tokens, read, mask = inputs(rows, columns, data.draw(st.integers(0, 99)))
    output, expected = layer(tokens, read, mask), by_token(layer, tokens, read)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [tokens, read, *layer.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_one_expert_is_the_map_itself_without_a_gate():
    layer = experts_of(1, 1)
    tokens, read, mask = inputs()
    assert torch.equal(layer(tokens, read, mask), layer.experts[0](tokens))
    assert not [name for name, _ in layer.named_parameters() if "gate" in name]


def test_identical_experts_are_one_whatever_the_gates():
    layer = experts_of(4, 3)
    for expert in layer.experts:
        expert.load_state_dict(layer.experts[0].state_dict())
    tokens, read, mask = inputs()
    torch.testing.assert_close(layer(tokens, read, mask), layer.experts[0](tokens), **EXACT)


def test_with_one_choice_the_gate_is_the_probability_and_still_learns():
    layer = experts_of(3, 1)
    tokens, read, mask = inputs()
    assert float(gradients(layer(tokens, read, mask), [layer.gate.weight])[0].abs().max()) > 1e-3


def test_balance_loss_is_its_weight_where_gates_are_even_and_more_where_one_expert_has_all():
    layer = experts_of(4, 2).train()
    tokens, _, mask = inputs()
    even, one = torch.zeros(4, 6, 5, dtype=torch.double), torch.ones(4, 6, 5, dtype=torch.double)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[9.0], [0], [0], [0]]).expand(4, 5))
    losses: list[Tensor] = []
    layer(tokens, even, mask, losses, 0.5)
    layer(tokens, one, mask, losses, 0.5)
    # even gates: sum_e f_e / 4 * 4 = 1; the gate of 45 against 0 is 1 to 1e-18: 4 * 1 * 1
    torch.testing.assert_close(torch.stack(losses), torch.tensor([0.5, 2.0], dtype=torch.double), **EXACT)
    # rows that each have an expert of their own are as even as can be: f = m = 1/4, as far as the gates of 45 against 0 go
    with torch.no_grad():
        layer.gate.weight.zero_()[:, :4] = 45 * torch.eye(4)
    own = torch.eye(4, 5, dtype=torch.double).unsqueeze(1).expand(4, 6, 5)
    layer(tokens, own, torch.ones(4, 6, dtype=torch.bool), losses, 0.5)
    torch.testing.assert_close(losses.pop(), torch.tensor(0.5, dtype=torch.double), **EXACT)
    # padding counts for nothing: of two rows with the same expert only one has tokens
    with torch.no_grad():
        layer.gate.weight[1].copy_(layer.gate.weight[0])
        layer.gate.weight[1, 0] -= 45
    real = torch.ones(4, 6, dtype=torch.bool)
    real[1:] = False
    layer(tokens, own, real, losses, 0.5)
    torch.testing.assert_close(losses.pop(), torch.tensor(2.0, dtype=torch.double), **EXACT)
    layer(tokens, one, mask, losses, 0.0)
    layer.eval()(tokens, one, mask, losses, 0.5)
    assert len(losses) == 2


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match=r"layer_topk \(3\) must lie in 1..layer_experts \(2\)"):
        experts_of(2, 3)
