"""DSelect-k against selectors spelled out bit by bit: weights, gradients, regularisers, initial state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor

from model_zoo.layers.dselect_k_router import DSelectKRouter
from model_zoo.layers.sequence import Sequence

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 4
LENGTHS = [5, 1, 0, 9, 3]


def build(num_experts: int = 5, seed: int = 0, spread: float = 0.2, **options) -> DSelectKRouter:
    """A router some of whose smooth-steps are saturated and others not."""
    router = DSelectKRouter(DIM, num_experts, **options).double()
    generator = torch.Generator().manual_seed(seed)
    for value in router.parameters():
        torch.nn.init.normal_(value, std=spread, generator=generator)
    return router.eval()


def golden_router(**options) -> tuple[DSelectKRouter, Sequence]:
    """One selector over five experts, z = (0.2, -0.1, 0.6) for any token."""
    router = DSelectKRouter(DIM, 5, topk_experts=1, **options).double().eval()
    with torch.no_grad():
        router.z.weight.zero_()
        router.z.bias.copy_(torch.tensor([0.2, -0.1, 0.6], dtype=torch.double))
    return router, ragged([3], DIM)


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    if z <= -gamma / 2:
        return torch.zeros_like(z)
    if z >= gamma / 2:
        return torch.ones_like(z)
    return -2 / gamma**3 * z**3 + 3 / (2 * gamma) * z + 0.5


def selectors(router: DSelectKRouter, token: Tensor) -> Tensor:
    """r of one token ``[d]``: ``[k, n]``."""
    bits = math.ceil(math.log2(router.num_experts))
    rows = []
    for j in range(router.topk):
        steps = []
        for b in range(bits):
            number = j * bits + b
            steps.append(smooth_step(router.z.weight[number] @ token + router.z.bias[number], router.gamma))
        weights = []
        for expert in range(router.num_experts):
            product = token.new_ones(())
            for step, digit in zip(steps, format(expert, f"0{bits}b") if bits else "", strict=True):
                product = product * (step if digit == "1" else 1 - step)
            weights.append(product)
        rows.append(torch.stack(weights))
    return torch.stack(rows)


def gate(router: DSelectKRouter, token: Tensor) -> Tensor:
    """g of one token ``[d]``: ``[n]``."""
    mix = (router.w.weight @ token + router.w.bias).softmax(-1)
    found = sum(mix[j] * row for j, row in enumerate(selectors(router, token)))
    assert isinstance(found, Tensor)
    total = found.sum()
    return found / total if router.renormalize and total > 0 else found


def route_row(router: DSelectKRouter, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One row: readers ``[t, n]`` and the experts' weights ``[n]``."""
    if len(tokens) == 0:
        return torch.zeros(0, router.num_experts, dtype=torch.bool), tokens.new_zeros(router.num_experts)
    gates = torch.stack([gate(router, token) for token in tokens])
    return gates > 0, gates[-1] if router.aggregate == "last" else gates.mean(0)


# ---- golden values


def test_golden_selector():
    router, sequence = golden_router()
    expected = torch.tensor([0, 0.139968, 0, 0.076032, 0], dtype=torch.double)
    torch.testing.assert_close(router.selectors(sequence.items[:1])[0, 0], expected, **EXACT)
    routing = router(sequence)
    torch.testing.assert_close(routing.gates[0], expected, **EXACT)
    assert torch.equal(routing.members[0], (expected > 0).expand(3, 5))
    assert routing.gates.sum().item() == pytest.approx(0.216, abs=1e-12)
    router.renormalize = True
    torch.testing.assert_close(router(sequence).gates[0], expected / 0.216, **EXACT)


def test_codes_are_the_experts_numbers_most_significant_bit_first():
    assert DSelectKRouter(DIM, 5).codes.int().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]]
    for experts, bits in ((1, 0), (2, 1), (3, 2), (4, 2), (8, 3), (9, 4), (10, 4)):
        assert DSelectKRouter(DIM, experts, topk_experts=1).codes.shape == (experts, bits)


def test_at_the_start_all_experts_read_all_tokens_almost_evenly():
    torch.manual_seed(0)
    router = DSelectKRouter(DIM, 5, topk_experts=2, reachability_weight=1.0)
    torch.nn.init.ones_(router.z.weight)
    torch.nn.init.ones_(router.w.bias)
    router.init_weights()
    for value in router.z.parameters():
        assert 0 < float(value.detach().abs().max()) <= 0.01
    for value in router.w.parameters():
        assert 0 < float(value.detach().abs().max()) <= 0.05
    assert float(router.w.weight.detach().abs().max()) > 0.01
    sequence = Sequence(torch.zeros(1, DIM), torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool))
    losses: list[Tensor] = []
    routing = router.train()(sequence, losses)
    assert bool(routing.members.all())
    # here |z| <= 0.01, so a step is within 0.015 of 1/2 and a product of three within 0.012 of 1/8
    torch.testing.assert_close(routing.gates, torch.full((2, 5), 0.125), rtol=0, atol=0.012)
    assert losses[0].item() == pytest.approx(1.6, rel=0.1)


def test_initial_z_scales_with_gamma():
    torch.manual_seed(0)
    router = DSelectKRouter(50, 9, gamma=10.0)
    assert 0.09 < float(router.z.weight.detach().abs().max()) <= 0.1


# ---- against selectors spelled out


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("num_experts", [4, 5, 10])
@pytest.mark.parametrize(
    "options",
    [{}, {"aggregate": "mean_gate"}, {"gamma": 0.3}, {"gamma": 4.0}, {"renormalize": True, "spread": 0.5}],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_members_gates_and_gradients_equal_the_spelled_out_form(options, num_experts, topk):
    router = build(num_experts, seed=topk, topk_experts=topk, **options)
    sequence = ragged(LENGTHS, DIM, topk, padding=topk)
    routing = router(sequence)
    rows = [route_row(router, tokens) for tokens in rows_of(sequence.vectors, sequence.mask)]
    for got, real, (members, _) in zip(routing.members, sequence.mask, rows, strict=True):
        assert torch.equal(got[real], members)
    expected = torch.stack([gates for _, gates in rows])
    torch.testing.assert_close(routing.gates, expected, **EXACT)
    assert torch.equal(routing.gates > 0, expected > 0)
    leaves = [sequence.items, *router.parameters()]
    for got, want in zip(gradients(routing.gates, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_saturated_selectors_choose_k_experts_exactly():
    router = DSelectKRouter(DIM, 5, topk_experts=2).eval()
    with torch.no_grad():
        router.z.weight.zero_()
        router.z.bias.copy_(torch.tensor([-0.5, 0.5, 7.0, 0.5, -9.0, -0.5]))  # codes 011 and 100
        router.w.weight.zero_()
        router.w.bias.copy_(torch.tensor([math.log(3.0), 0.0]))
    routing = router(ragged([4], DIM, dtype=torch.float32))
    assert routing.members[0].int().tolist() == [[0, 0, 0, 1, 1]] * 4
    torch.testing.assert_close(routing.gates, torch.tensor([[0, 0, 0, 0.75, 0.25]]))


@pytest.mark.parametrize("gamma", [0.1, 0.3, 1.0, 7.0])
def test_weights_are_never_negative_and_exactly_zero_beyond_the_step(gamma):
    router = DSelectKRouter(1, 2, topk_experts=1, gamma=gamma)
    with torch.no_grad():
        router.z.weight.fill_(1.0)
        router.z.bias.zero_()
    z = torch.linspace(-gamma, gamma, 2001).unsqueeze(1)
    weights = router.selectors(z)[:, 0]  # [U, 2]
    assert bool((weights >= 0).all())
    assert bool((weights <= 1).all())
    outside = z.squeeze(1).abs() >= 0.501 * gamma
    assert bool(((weights == 0) | (weights == 1))[outside].all())
    torch.testing.assert_close(weights.sum(1), torch.ones(2001))


def test_mass_on_codes_of_no_expert_leaves_rows_unserved_but_finite():
    router = DSelectKRouter(DIM, 5, topk_experts=1, reachability_weight=1.0, entropy_weight=1.0, renormalize=True).double()
    with torch.no_grad():
        router.z.weight.zero_()
        router.z.bias.fill_(9.0)  # code 111
    sequence = ragged([3, 2], DIM)
    losses: list[Tensor] = []
    routing = router(sequence, losses)
    assert not routing.gates.any()
    assert not routing.members.any()
    total = torch.stack([*losses, routing.gates.sum()]).sum()
    assert bool(total.isfinite())
    assert all(bool(g.isfinite().all()) for g in gradients(total, [sequence.items, *router.parameters()]))


# ---- regularisers


@pytest.mark.parametrize("num_experts", [3, 5, 10])
def test_regularisers_and_their_gradients_equal_means_over_tokens_and_selectors(num_experts):
    router = build(num_experts, spread=0.1, entropy_weight=0.3, reachability_weight=0.7).train()
    sequence = ragged(LENGTHS, DIM, padding=2)
    losses: list[Tensor] = []
    router(sequence, losses)
    every = torch.cat([selectors(router, token) for token in torch.cat(rows_of(sequence.vectors, sequence.mask))])
    entropy = torch.stack([-sum(r * torch.log(r + 1e-6) for r in row) for row in every]).mean()
    reachability = torch.stack([1 / row.sum() for row in every]).mean()
    leaves = [sequence.items, router.z.weight, router.z.bias]
    for got, expected in zip(losses, (0.3 * entropy, 0.7 * reachability), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
        for mine, want in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(mine, want, **EXACT)


def test_golden_reachability_loss():
    router, sequence = golden_router(reachability_weight=1.0)
    losses: list[Tensor] = []
    router.train()(sequence, losses)
    assert losses[0].item() == pytest.approx(1 / 0.216, rel=1e-12)


@pytest.mark.parametrize(("num_experts", "expected"), [(1, 0), (2, 0), (4, 0), (8, 0), (3, 1), (5, 1), (10, 1)])
def test_reachability_is_asked_for_only_where_codes_are_left_over(num_experts, expected):
    losses: list[Tensor] = []
    build(num_experts, topk_experts=1).train()(ragged(LENGTHS, DIM), losses)
    assert len(losses) == expected


def test_losses_only_in_training_and_only_if_weighted():
    sequence = ragged(LENGTHS, DIM)
    for router, expected in (
        (build(entropy_weight=1.0), 0),
        (build(entropy_weight=1.0).train(), 2),
        (build(reachability_weight=0.0).train(), 0),
    ):
        losses: list[Tensor] = []
        router(sequence, losses)
        assert len(losses) == expected
        router(sequence)


# ---- batches


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    aggregate=st.sampled_from(["last", "mean_gate"]),
    num_experts=st.integers(2, 6),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, aggregate, num_experts, seed):
    router = build(num_experts, seed=seed, aggregate=aggregate).train()  # nothing is drawn in training either
    plain = ragged(lengths, DIM, seed)
    before = torch.randint(9, (len(lengths), padding))
    padded = Sequence(
        plain.items, torch.cat([before, plain.index], 1), torch.cat([torch.zeros_like(before).bool(), plain.mask], 1)
    )
    losses: list[Tensor] = []
    routing, other = router(plain, losses), router(padded, losses)
    torch.testing.assert_close(other.gates, routing.gates, **EXACT)
    assert torch.equal(other.members[padded.mask], routing.members[plain.mask])
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(router(plain.select(order), losses).gates, routing.gates[order], **EXACT)
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], **EXACT)
    for row in range(len(lengths)):
        alone = router(plain.select(torch.tensor([row])))
        torch.testing.assert_close(alone.gates[0], routing.gates[row], **EXACT)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("padding", [0, 2])
def test_batches_without_tokens_give_no_gates(lengths, padding):
    router = build(entropy_weight=1.0).train()
    losses: list[Tensor] = []
    routing = router(ragged(lengths, DIM, padding=padding), losses)
    assert routing.members.shape == (len(lengths), padding, 5)
    assert routing.gates.shape == (len(lengths), 5)
    assert not routing.gates.any()
    assert all(loss.item() == 0.0 for loss in losses)


def test_one_expert_reads_everything_with_weight_one():
    router = build(1, topk_experts=1)
    sequence = ragged([3, 0], DIM)
    routing = router(sequence)
    assert routing.gates.tolist() == [[1.0], [0.0]]
    assert bool(routing.members.all())


def test_routing_is_computed_in_float32_under_autocast():
    router = build().float()
    sequence = ragged(LENGTHS, DIM, dtype=torch.float32)
    expected = router(sequence)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(sequence)
    assert torch.equal(routing.gates, expected.gates)
    assert torch.equal(routing.members, expected.members)


def test_codes_are_not_part_of_a_checkpoint():
    assert set(build().state_dict()) == {"z.weight", "z.bias", "w.weight", "w.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"topk_experts": 6}, r"topk_experts \(6\) must lie in 1..5"), ({"gamma": 0.0}, r"gamma \(0.0\) must be positive")],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DSelectKRouter(DIM, 5, **options)
