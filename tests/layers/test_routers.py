"""The theme router: gates, membership, gradients, stability."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cosines, gate_row, gradients, members, ragged, rows_of
from torch import nn

from model_zoo.layers.routers import ThemeRouter, occurrences
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.theme_codebook import ThemeCodebook

# float64 cosines and softmaxes of at most five terms
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [4, 1, 6, 3]


def router(topk: int = 2, themes: int = 5, dim: int = 4, *, learned: bool = False, **options) -> ThemeRouter:
    """With biases: at this width, without them one random input in sixteen has h = 0, where all themes tie."""
    torch.manual_seed(1)
    codebook = ThemeCodebook(themes, 4, learned=learned)
    return ThemeRouter(dim, codebook, codebook_dim=4, topk=topk, **{"bias": True, **options}).double()


def example_router(topk: int, **options) -> ThemeRouter:
    """Identity h and the codes (2, 0), (0, 5), (-1, 0)."""
    book = ThemeCodebook(3, 2)
    book.codes.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]))
    return ThemeRouter(2, book, codebook_dim=2, topk=topk, encoder=nn.Identity(), **options)


def example_gates(layer: ThemeRouter) -> list[float]:
    """Gates of h = (3, 4), by expert."""
    routing = layer(Sequence.from_vectors(torch.tensor([[[3.0, 4.0]]]), torch.ones(1, 1)))
    return routing.gates[0].tolist()


def test_gates_of_the_worked_example():
    # fp32 rounding of the printed six digits
    assert example_gates(example_router(2)) == pytest.approx([0.450166, 0.549834, 0.0], abs=1e-6)
    assert example_gates(example_router(1)) == [0.0, 1.0, 0.0]


def test_temperature_divides_the_cosines_before_the_softmax():
    want = math.exp(0.8 / 0.1) / (math.exp(0.8 / 0.1) + math.exp(0.6 / 0.1))
    assert example_gates(example_router(2, temperature=0.1))[1] == pytest.approx(want, abs=1e-6)


def test_softmax_then_mask_keeps_the_full_softmax_shares():
    parts = [math.exp(value) for value in (0.6, 0.8, -0.6)]
    got = example_gates(example_router(1, gate_norm="softmax_then_mask"))
    assert got == pytest.approx([0.0, parts[1] / sum(parts), 0.0], abs=1e-6)


@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("gate_norm", ["topk_softmax", "softmax_then_mask"])
def test_experts_and_gates_equal_the_formulas_row_by_row(topk, gate_norm):
    layer = router(topk, gate_norm=gate_norm, temperature=0.5)
    tokens = ragged(LENGTHS, 4, padding=2)
    routing = layer(tokens)
    for row, inputs in enumerate(rows_of(tokens.vectors, tokens.mask)):
        assert torch.equal(routing.members[row][tokens.mask[row]], members(layer, inputs))
        torch.testing.assert_close(routing.gates[row], gate_row(layer, inputs[-1]), **EXACT)


@pytest.mark.parametrize("topk, gate_norm, trained", [(1, "topk_softmax", False), (2, "topk_softmax", True),
                                                      (1, "softmax_then_mask", True)])  # fmt: skip
def test_h_has_a_gradient_only_when_the_gates_depend_on_it(topk, gate_norm, trained):
    layer = router(topk, gate_norm=gate_norm)
    tokens = ragged(LENGTHS, 4)
    gates = layer(tokens).gates
    assert gates.requires_grad == trained
    if trained:
        assert all(float(g.abs().sum()) > 0 for g in gradients(gates, layer.h.parameters()))


def test_gate_gradients_are_those_of_the_formula_and_reach_the_gating_item_alone():
    layer = router(2)
    tokens = ragged(LENGTHS, 4)
    routing = layer(tokens)
    rows = [gate_row(layer, inputs[-1]) for inputs in rows_of(tokens.vectors, tokens.mask)]
    expected = torch.stack(rows)
    leaves = [tokens.items, *layer.h.parameters()]
    got = gradients(routing.gates, leaves)
    for grad, want in zip(got, gradients(expected, leaves), strict=True):
        torch.testing.assert_close(grad, want, **EXACT)
    touched = set(got[0].abs().sum(1).nonzero().flatten().tolist())
    assert touched == set(tokens.index[:, -1].tolist())


@pytest.mark.parametrize("learned", [False, True])
def test_the_codebook_has_a_gradient_only_when_it_is_learned(learned):
    layer = router(2, learned=learned)
    gates = layer(ragged(LENGTHS, 4)).gates
    (gates * torch.arange(5.0)).sum().backward()  # kept gates alone sum to 1
    grad = layer.codebook.codes.grad
    assert (grad is not None and float(grad.abs().sum()) > 0) == learned


def test_given_gating_inputs_choose_the_experts_and_weigh_them():
    layer = router(2)
    tokens = ragged(LENGTHS, 4)
    gating = torch.randn(4, 4, dtype=torch.double)
    routing = layer(tokens, gating)
    assert torch.equal(routing.members, layer(tokens).members)
    for row in range(4):
        torch.testing.assert_close(routing.gates[row], gate_row(layer, gating[row]), **EXACT)


def test_the_shape_of_h():
    def shapes(**options):
        layer = ThemeRouter(3, ThemeCodebook(5, 4), codebook_dim=4, **options)
        return [tuple(p.shape) for p in layer.h.parameters()]

    assert shapes() == [(4, 3), (4, 4)]
    assert shapes(bias=True) == [(4, 3), (4,), (4, 4), (4,)]
    assert shapes(hidden=7) == [(7, 3), (4, 7)]
    assert shapes(linear=True) == [(4, 3)]
    assert shapes(linear=True, bias=True) == [(4, 3), (4,)]


@pytest.mark.parametrize("bias", [False, True])
def test_without_biases_the_length_of_a_vector_does_not_change_its_routing(bias):
    layer = router(2, bias=bias, hidden=32)
    tokens = ragged(LENGTHS, 4)
    with torch.no_grad():
        for parameter in layer.h.parameters():
            nn.init.normal_(parameter)
    routing, shorter = layer(tokens), layer(Sequence(tokens.items * 1e-3, tokens.index, tokens.mask))
    same = torch.equal(routing.members, shorter.members) and torch.allclose(routing.gates, shorter.gates, atol=1e-12)
    assert same == (not bias)


@pytest.mark.parametrize("top1", [False, True])
def test_codebook_members_are_all_kept_themes_or_the_best_one(top1):
    layer = router(2, ema_assign_top1=top1)
    tokens = ragged(LENGTHS, 4, padding=2)
    seen = []
    layer.codebook.ema_update = lambda *batch: seen.append(batch)
    layer(tokens, update_codebook=True)
    ((hidden, themes, weight),) = seen
    torch.testing.assert_close(hidden, layer.h(tokens.items), **EXACT)
    order = cosines(layer, tokens.items).argsort(dim=-1, descending=True)
    assert torch.equal(themes, order[:, : 1 if top1 else 2])
    assert weight.tolist() == [int((tokens.index[tokens.mask] == item).sum()) for item in range(len(tokens.items))]


def test_the_codebook_moves_only_on_request_and_after_scoring():
    layer = router(2)
    tokens = ragged(LENGTHS, 4)
    before = layer.codebook.codes.clone()
    plain = layer(tokens)
    assert torch.equal(layer.codebook.codes, before)
    updating = layer(tokens, update_codebook=True)
    assert not torch.equal(layer.codebook.codes, before)
    assert torch.equal(updating.gates, plain.gates)


def test_occurrences_count_real_positions_only():
    sequence = Sequence(
        torch.zeros(4, 2), torch.tensor([[0, 1, 1], [3, 3, 3]]), torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    )
    assert occurrences(sequence).tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("topk", [1, 2])
def test_commitment_is_the_mean_distance_of_real_tokens_to_their_codes(topk):
    layer = router(topk)
    tokens = ragged(LENGTHS, 4, padding=2)
    distances = []
    for inputs in rows_of(tokens.vectors, tokens.mask):
        for hidden, reads in zip(layer.h(inputs), members(layer, inputs), strict=True):
            gaps = [(hidden - layer.codebook.codes[n]).square().sum() for n in reads.nonzero().flatten()]
            distances.append(torch.stack(gaps).mean())
    expected = torch.stack(distances).mean()
    got = layer.commitment(tokens)
    torch.testing.assert_close(got, expected, **EXACT)
    leaves = [tokens.items, *layer.h.parameters()]
    for grad, want in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(grad, want, **EXACT)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(seed=st.integers(0, 100_000), topk=st.integers(1, 4), share=st.floats(0.0, 0.999))
def test_close_router_vectors_have_the_same_experts(seed, topk, share):
    """Theorem B.1: if cos(h1, h2) >= 1 - delta with delta < gap^2 / 8, the top-k sets agree.

    gap is the difference of the k-th and (k + 1)-th best cosine of h1; h2 leans from h1 in a random direction, or straight
    towards the (k + 1)-th code and away from the k-th, by an angle with delta = share * gap^2 / 8.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = ThemeRouter(3, ThemeCodebook(5, 3), codebook_dim=3, topk=topk, encoder=nn.Identity()).double()
    codes = torch.randn(5, 3, generator=generator, dtype=torch.double)
    layer.codebook.codes.copy_(codes)
    first = nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.double), dim=0)
    scores, order = cosines(layer, first).sort(descending=True)
    unit = nn.functional.normalize(codes, dim=1)
    worst = unit[order[topk]] - unit[order[topk - 1]]
    delta = share * float(scores[topk - 1] - scores[topk]) ** 2 / 8
    for direction in (torch.randn(3, generator=generator, dtype=torch.double), worst):
        across = nn.functional.normalize(direction - (direction @ first) * first, dim=0)
        second = 3.0 * ((1 - delta) * first + math.sqrt(1 - (1 - delta) ** 2) * across)
        tokens = Sequence.from_vectors(torch.stack([first, second]).unsqueeze(0), torch.ones(1, 2))
        kept = layer(tokens).members[0]
        assert set(kept[0].tolist()) == set(kept[1].tolist())


def test_close_vectors_on_two_sides_of_a_border_have_different_experts():
    """Beyond the theorem's bound (here gap^2 / 8 is 6e-6 and delta 5e-5), so the property above is not empty."""
    layer = example_router(1)
    first, second = torch.tensor([1.0, 0.99]), torch.tensor([0.99, 1.0])
    kept = layer(Sequence.from_vectors(torch.stack([first, second]).unsqueeze(0), torch.ones(1, 2))).members
    assert kept[0, 0].tolist() != kept[0, 1].tolist()


def test_under_autocast_routing_stays_in_full_precision():
    layer = router(2).float()
    tokens = ragged(LENGTHS, 4, dtype=torch.float)
    expected = layer(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(tokens)
    assert torch.equal(got.members, expected.members)
    assert torch.equal(got.gates, expected.gates)
