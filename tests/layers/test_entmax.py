"""Entmax against bisection by plain Python and against its definition; masked rows; gradients."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.layers.entmax import entmax, masked_softmax

# float64: a square root or a power of sums of a few dozen terms below one
EXACT = {"rtol": 1e-9, "atol": 1e-12}
ALPHAS = [1.05, 1.2, 1.5, 1.7, 2.0]


def by_bisection(scores: list[float], alpha: float) -> list[float]:
    """One row, by the definition: tau halved into place until no float lies between its bounds."""
    scaled = [(alpha - 1) * score for score in scores]
    low, high = max(scaled) - 1, max(scaled)
    for _ in range(200):
        tau = (low + high) / 2
        if sum(max(s - tau, 0.0) ** (1 / (alpha - 1)) for s in scaled) >= 1:
            low = tau
        else:
            high = tau
    return [max(s - low, 0.0) ** (1 / (alpha - 1)) for s in scaled]


def random_scores(rows: int, columns: int, scale: float = 1.5, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("columns", [1, 2, 7, 40])
def test_every_row_equals_bisection_by_the_definition(alpha, columns):
    scores = random_scores(6, columns)
    weight = entmax(scores, alpha)
    expected = torch.tensor([by_bisection(row, alpha) for row in scores.tolist()], dtype=torch.double)
    torch.testing.assert_close(weight, expected, **EXACT)
    torch.testing.assert_close(weight.sum(1), torch.ones(6, dtype=torch.double), **EXACT)


def test_weak_scores_get_exact_zeros():
    weight = entmax(torch.tensor([[0.0, 0.1, -5.0, 3.0, 2.5]]))
    assert weight[0, :3].tolist() == [0, 0, 0]
    assert bool((weight[0, 3:] > 0).all())


def test_alpha_2_is_the_projection_onto_the_simplex():
    """Over every support: the nearest point of the simplex is the one feasible projection that keeps the rest at zero."""
    scores = random_scores(1, 5)[0]
    best = None
    for size in range(1, 6):
        for support in combinations(range(5), size):
            point = torch.zeros(5, dtype=torch.double)
            chosen = scores[list(support)]
            point[list(support)] = chosen - (chosen.sum() - 1) / size
            distance = (point - scores).square().sum()
            if bool((point >= 0).all()) and (best is None or distance < best[0]):
                best = (distance, point)
    torch.testing.assert_close(entmax(scores, 2.0), best[1], **EXACT)


def test_alpha_near_1_approaches_softmax():
    scores = random_scores(4, 6)
    errors = [float((entmax(scores, alpha) - scores.softmax(1)).abs().max()) for alpha in (1.1, 1.01, 1.001)]
    assert errors[2] < errors[1] / 5 < errors[0] / 25  # linear in alpha - 1
    assert errors[2] < 1e-3


def test_the_sorted_form_of_one_and_a_half_is_the_limit_of_bisected_neighbours():
    scores = random_scores(5, 9)
    torch.testing.assert_close(entmax(scores, 1.5), entmax(scores, 1.5 + 1e-9), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_equal_finite_differences(alpha):
    scores = random_scores(3, 6).requires_grad_()
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, True], [False] * 5 + [True]])
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha), scores)
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha, mask), scores)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_masked_entries_are_as_if_absent(alpha):
    scores = random_scores(4, 8).requires_grad_()
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    shouting = scores.detach().masked_fill(~mask, 1e6).requires_grad_()  # the largest entries, were they read
    weight = entmax(shouting, alpha, mask)
    direction = random_scores(4, 8, seed=2)
    (grad,) = torch.autograd.grad((weight * direction).sum(), shouting)
    for row in range(4):
        real = mask[row]
        alone = entmax(scores[row, real], alpha)
        torch.testing.assert_close(weight[row, real], alone, **EXACT)
        (alone_grad,) = torch.autograd.grad((alone * direction[row, real]).sum(), scores)
        torch.testing.assert_close(grad[row, real], alone_grad[row, real], **EXACT)
    assert not weight[~mask].any() and not grad[~mask].any()


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_rows_without_an_entry_are_zeros_and_pass_no_gradient(alpha):
    scores = random_scores(2, 5).requires_grad_()
    mask = torch.tensor([[False] * 5, [True] * 5])
    weight = entmax(scores, alpha, mask)
    (grad,) = torch.autograd.grad((weight * torch.arange(5.0)).sum(), scores)
    assert not weight[0].any() and not grad[0].any()
    assert bool(weight[1].any() and grad[1].any())


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_extreme_scores_stay_finite(alpha):
    scores = torch.tensor([[1e30, 0.0, -1e30], [1e4, 1e4, 1e4 - 1], [0.0, -torch.inf, 0.0]], requires_grad=True)
    weight = entmax(scores, alpha)
    (grad,) = torch.autograd.grad((weight * torch.arange(3.0)).sum(), scores)
    assert bool(weight.isfinite().all() and grad.isfinite().all())
    torch.testing.assert_close(weight[0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(weight[2], torch.tensor([0.5, 0, 0.5]))


@pytest.mark.parametrize("alpha", [1.3, 1.5])
def test_nan_spoils_its_own_row_only(alpha):
    weight = entmax(torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), alpha)
    assert bool(weight[0].isnan().any())
    torch.testing.assert_close(weight[1], torch.tensor([0.5, 0.5]))


def test_long_rows_of_float32_add_up_to_one():
    scores = random_scores(3, 4000).float()
    for alpha in (1.2, 1.5, 2.0):
        weight = entmax(scores, alpha)
        expected = entmax(scores.double(), alpha).float()
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)  # float32 cumulative sums of thousands of terms
        torch.testing.assert_close(weight.sum(1), torch.ones(3), rtol=0, atol=1e-4)


def test_half_types_are_computed_in_float32_and_empty_rows_are_empty():
    scores = random_scores(2, 6).bfloat16()
    assert torch.equal(entmax(scores), entmax(scores.float()))
    assert entmax(torch.zeros(3, 0)).shape == (3, 0)
    assert entmax(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0, 2.1])
def test_other_alphas_are_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha must be above 1 and at most 2, not {alpha}"):
        entmax(torch.zeros(1, 2), alpha)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    columns=st.integers(1, 12),
    alpha=st.sampled_from(ALPHAS),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 1000),
)
def test_shifts_change_nothing_and_orders_are_kept(columns, alpha, shift, seed):
    scores = random_scores(3, columns, seed=seed)
    weight = entmax(scores, alpha)
    # adding the shift rounds scores by 1e-14, which alpha near 1 magnifies twentyfold
    torch.testing.assert_close(entmax(scores + shift, alpha), weight, rtol=1e-7, atol=1e-10)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(entmax(scores[:, order], alpha), weight[:, order], **EXACT)
    ranked = weight.gather(1, scores.sort(1, descending=True).indices)
    assert bool((ranked[:, 1:] <= ranked[:, :-1] + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.half])
def test_masked_softmax_is_softmax_of_the_real_entries(dtype):
    scores = random_scores(3, 5).to(dtype).requires_grad_()
    mask = torch.tensor([[True] * 5, [False, True, False, True, True], [False] * 5])
    weight = masked_softmax(scores, mask)
    torch.testing.assert_close(weight[0], scores[0].softmax(0))
    torch.testing.assert_close(weight[1, mask[1]], scores[1, mask[1]].softmax(0))
    assert not weight[~mask].any()
    (grad,) = torch.autograd.grad((weight * torch.arange(5.0)).sum(), scores)
    assert bool(grad.isfinite().all()) and not grad[~mask].any()
