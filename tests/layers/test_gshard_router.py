"""GShard's router against a queue walked token by token: places, gates, gradients, balance loss, random second experts."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor

from model_zoo.layers.gshard_router import GShardRouter
from model_zoo.layers.routers import Routing
from model_zoo.layers.sequence import Sequence

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 4
LENGTHS = [9, 1, 0, 4, 17, 3]
#: five tokens whose first choices are experts 0, 0, 1, 0, 0
GOLDEN = torch.tensor([[2.2, 1, 0], [2, 0, 1], [1, 2, 0], [3, 0, 1], [1.8, 1.1, 0]], dtype=torch.double)


def build(num_experts: int = 4, seed: int = 0, **options) -> GShardRouter:
    """A router whose gates lie far apart."""
    router = GShardRouter(DIM, num_experts, **options).double()
    torch.nn.init.normal_(router.linear.weight, generator=torch.Generator().manual_seed(seed))
    return router.eval()


def golden_router(**options) -> tuple[GShardRouter, Sequence]:
    """Capacity 2 for the five golden tokens, which are their own logits."""
    router = GShardRouter(3, 3, capacity_factor_eval=0.6, **options).double().eval()
    with torch.no_grad():
        router.linear.weight.copy_(torch.eye(3))
    return router, Sequence.from_vectors(GOLDEN.unsqueeze(0), torch.ones(1, 5, dtype=torch.bool))


def combine_weights(router: GShardRouter, tokens: Tensor, tried: Callable[[int, int], bool] = lambda *_: True) -> Tensor:
    """One row: gate of each of ``tokens [t, d]`` at each expert, ``[t, n]``, by walking each expert's queue.

    ``tried(choice, token)`` says whether a choice after the first is made at all.
    """
    total, experts = len(tokens), router.num_experts
    factor = router.capacity_factors[router.training]
    capacity = max(router.min_capacity, math.ceil(round(factor * router.topk * total / experts, 9)))
    best: list[list[int]] = []
    gates: list[list[Tensor]] = []
    for token in tokens:
        probability = (router.linear.weight @ token).softmax(-1)
        values = probability.tolist()
        order = sorted(range(experts), key=lambda e, values=values: (-values[e], e))[: router.topk]
        whole = sum(probability[e] for e in order) + 1e-9 if router.normalize else 1
        best.append(order)
        gates.append([probability[e] / whole for e in order])
    weights = [[tokens.new_zeros(()) for _ in range(experts)] for _ in range(total)]
    claims = [0] * experts
    queue = list(range(total)) if router.legacy_order else list(range(total))[::-1]
    for choice in range(router.topk):
        for token in queue:
            if choice and not tried(choice, token):
                continue
            expert = best[token][choice]
            claims[expert] += 1
            if claims[expert] <= capacity:
                weights[token][expert] = gates[token][choice]
    return torch.stack([torch.stack(row) for row in weights]) if total else tokens.new_zeros(0, experts)


def route_row(router: GShardRouter, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One row: who reads each token ``[t, n]`` and the experts' weights ``[n]``."""
    weights = combine_weights(router, tokens)
    if len(tokens) == 0:
        return weights > 0, tokens.new_zeros(router.num_experts)
    return weights > 0, weights[-1] if router.aggregate == "last" else weights.mean(0)


def balance(router: GShardRouter, vectors: Tensor, mask: Tensor) -> Tensor:
    """``n sum f m`` row by row, averaged over rows with tokens."""
    values = []
    for tokens in rows_of(vectors, mask):
        if len(tokens):
            gates = torch.stack([(router.linear.weight @ token).softmax(-1) for token in tokens])
            first = [int(row.argmax()) for row in gates]
            share = torch.tensor([first.count(e) / len(first) for e in range(router.num_experts)], dtype=gates.dtype)
            values.append(router.num_experts * (share * gates.mean(0)).sum())
    return torch.stack(values).mean()


def assert_routed_row_by_row(router: GShardRouter, sequence: Sequence, routing: Routing) -> None:
    rows = [route_row(router, tokens) for tokens in rows_of(sequence.vectors, sequence.mask)]
    for got, real, (members, _) in zip(routing.members, sequence.mask, rows, strict=True):
        assert torch.equal(got[real], members)
    expected = torch.stack([gates for _, gates in rows])
    torch.testing.assert_close(routing.gates, expected, **EXACT)
    assert torch.equal(routing.gates > 0, expected > 0)
    leaves = [sequence.items, *router.parameters()]
    for got, want in zip(gradients(routing.gates, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# ---- golden values


def test_golden_most_recent_first():
    router, sequence = golden_router()
    expected = [[0, 0, 0], [0, 0, 0.268941], [0, 0.731059, 0], [0.880797, 0, 0.119203], [0.668188, 0.331812, 0]]
    torch.testing.assert_close(
        combine_weights(router, GOLDEN), torch.tensor(expected, dtype=torch.double), rtol=0, atol=5e-7
    )  # six printed digits
    routing = router(sequence)
    assert routing.members[0].int().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0]]
    torch.testing.assert_close(routing.gates[0], torch.tensor(expected[-1], dtype=torch.double), rtol=0, atol=5e-7)


def test_golden_chronological_order_drops_the_newest_token():
    router, sequence = golden_router(legacy_order=True)
    expected = [[0.768525, 0.231475, 0], [0.731059, 0, 0.268941], [0, 0.731059, 0], [0, 0, 0.119203], [0, 0, 0]]
    torch.testing.assert_close(
        combine_weights(router, GOLDEN), torch.tensor(expected, dtype=torch.double), rtol=0, atol=5e-7
    )
    routing = router(sequence)
    assert routing.members[0].int().tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert routing.gates.tolist() == [[0.0, 0.0, 0.0]]
    router.aggregate = "mean_gate"
    means = torch.tensor(expected, dtype=torch.double).mean(0)
    torch.testing.assert_close(router(sequence).gates[0], means, rtol=0, atol=5e-7)


def test_golden_balance_loss():
    router, sequence = golden_router(aux_weight=1.0)
    losses: list[Tensor] = []
    router.train()(sequence, losses)
    assert len(losses) == 1
    assert losses[0].item() == pytest.approx(1.627708, abs=5e-7)


# ---- against the queue walked token by token


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"legacy_order": True},
        {"aggregate": "mean_gate"},
        {"aggregate": "mean_gate", "legacy_order": True},
        {"normalize_gates": False},
        {"capacity_factor_train": 0.4, "capacity_factor_eval": 0.3},
        {"capacity_factor_train": 0.1, "capacity_factor_eval": 0.1, "min_capacity": 3, "aggregate": "mean_gate"},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_members_gates_and_gradients_equal_the_walked_queue(options, topk, training):
    for seed in range(3):
        router = build(seed=seed, topk_experts=topk, second_expert_threshold=0, **options).train(training)
        sequence = ragged(LENGTHS, DIM, seed, padding=seed)
        assert_routed_row_by_row(router, sequence, router(sequence))


def test_training_tries_second_experts_with_the_probability_of_their_gate():
    router = build(capacity_factor_train=10.0).train()
    sequence = ragged([200] * 50, DIM, num_items=9)
    members = router(sequence).members
    index, weights = sequence.index, [combine_weights(router, item.unsqueeze(0))[0].detach() for item in sequence.items]
    for item, gates in enumerate(weights):
        first, second = (int(e) for e in gates.argsort(descending=True)[:2])
        here = members[index == item]
        assert bool(here[:, first].all())
        chance = min(1.0, float(gates[second]) / 0.5)
        share, error = float(here[:, second].double().mean()), math.sqrt(chance * (1 - chance) / len(here))
        assert abs(share - chance) <= 5 * error
        assert int(here.sum()) == int(here[:, first].sum() + here[:, second].sum())


def test_a_second_choice_that_is_not_tried_claims_no_place():
    router = build(3, capacity_factor_train=0.7).train()
    sequence = ragged([12] * 4, DIM, 1)
    torch.manual_seed(5)
    routing = router(sequence)
    torch.manual_seed(5)
    draws = torch.rand(4, 12, dtype=torch.double).flip(1)
    seconds = []
    for row, (tokens, draw) in enumerate(zip(sequence.vectors, draws, strict=True)):
        gates = torch.stack([(router.linear.weight @ token).softmax(-1) for token in tokens]).topk(2).values
        made = [bool(d * 0.5 < g[1] / (g.sum() + 1e-9)) for d, g in zip(draw, gates, strict=True)]
        weights = combine_weights(router, tokens, lambda _, token, made=made: made[token])
        assert torch.equal(routing.members[row], weights > 0)
        torch.testing.assert_close(routing.gates[row], weights[-1], **EXACT)
        seconds += made
    assert 5 < sum(seconds) < 43


def test_the_seed_repeats_the_random_choices_and_evaluation_makes_none():
    router = build()
    sequence = ragged([40] * 6, DIM)
    state = torch.get_rng_state()
    first = router(sequence)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(router(sequence).members, first.members)
    router.train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(router(sequence).members)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# ---- capacity


@pytest.mark.parametrize(
    ("training", "topk", "expected"), [(True, 2, [1, 1, 1, 2, 3, 5, 50]), (False, 1, [1, 1, 1, 2, 2, 4, 40])]
)
def test_capacity_in_training_and_evaluation(training, topk, expected):
    router = build(5, topk_experts=topk).train(training)
    assert router.capacity(torch.tensor([0, 1, 2, 4, 5, 10, 100])).tolist() == expected


def test_capacity_is_not_rounded_up_by_floating_point():
    assert math.ceil(1.1 * 2 * 25 / 5) == 12
    assert build(5, capacity_factor_eval=1.1).capacity(torch.tensor([24, 25, 26, 50])).tolist() == [11, 11, 12, 22]


def test_no_expert_reads_more_than_its_capacity_and_the_newest_go_first():
    router = build(topk_experts=1, capacity_factor_eval=1.0)
    one = torch.randn(1, DIM, dtype=torch.double)
    sequence = Sequence(one, torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.bool))
    members = router(sequence).members[0].any(-1)
    assert members.tolist() == [False] * 6 + [True] * 2
    router.legacy_order = True
    routing = router(sequence)
    assert routing.members[0].any(-1).tolist() == [True] * 2 + [False] * 6
    assert not routing.gates.any()


# ---- gates and losses


def test_a_single_expert_per_token_counts_with_its_raw_probability():
    router = build(topk_experts=1, aux_weight=0.0)
    sequence = ragged([3, 1], DIM)
    expected = (sequence.last_vectors @ router.linear.weight.T).softmax(-1).max(-1).values
    gates = router(sequence).gates
    torch.testing.assert_close(gates.sum(1), expected, **EXACT)
    assert gradients(gates, [router.linear.weight])[0].abs().max() > 1e-3


def test_equal_gates_prefer_lower_numbered_experts():
    router = build(6)
    with torch.no_grad():
        router.linear.weight.zero_()
    routing = router(ragged([1], DIM))
    assert routing.members[0, 0].tolist() == [True, True, False, False, False, False]
    torch.testing.assert_close(routing.gates[0, :2], torch.full((2,), 0.5, dtype=torch.double), rtol=0, atol=1e-8)  # 1e-9


@pytest.mark.parametrize("padding", [0, 3])
def test_balance_loss_and_its_gradient_equal_the_row_by_row_form(padding):
    router = build(aux_weight=0.3).train()
    sequence = ragged(LENGTHS, DIM, padding=padding)
    losses: list[Tensor] = []
    router(sequence, losses)
    expected = 0.3 * balance(router, sequence.vectors, sequence.mask)
    torch.testing.assert_close(losses[0], expected, **EXACT)
    leaves = [sequence.items, router.linear.weight]
    for got, want in zip(gradients(losses[0], leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_balance_loss_is_one_at_balance_and_n_at_collapse():
    router = GShardRouter(3, 3, aux_weight=1.0).double().train()
    sharp = 50 * torch.eye(3, dtype=torch.double)
    with torch.no_grad():
        router.linear.weight.copy_(sharp)
    everything = torch.ones(1, 6, dtype=torch.bool)
    items = torch.eye(3, dtype=torch.double)
    for index, expected in (([0, 1, 2, 2, 1, 0], 1.0), ([1] * 6, 3.0)):
        losses: list[Tensor] = []
        router(Sequence(items, torch.tensor([index]), everything), losses)
        assert losses[0].item() == pytest.approx(expected, abs=1e-12)
    with torch.no_grad():
        router.linear.weight.zero_()  # even gates, whoever is first
    losses = []
    router(Sequence(items, torch.tensor([[0, 1, 2, 2, 1, 0]]), everything), losses)
    assert losses[0].item() == pytest.approx(1.0, abs=1e-12)


def test_losses_only_in_training_and_only_if_weighted():
    sequence = ragged(LENGTHS, DIM)
    for router, expected in ((build(), 0), (build().train(), 1), (build(aux_weight=0.0).train(), 0)):
        losses: list[Tensor] = []
        router(sequence, losses)
        assert len(losses) == expected
        router(sequence)


# ---- batches


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    topk=st.integers(1, 3),
    aggregate=st.sampled_from(["last", "mean_gate"]),
    legacy_order=st.booleans(),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, topk, aggregate, legacy_order, seed):
    router = build(seed=seed, topk_experts=topk, aggregate=aggregate, legacy_order=legacy_order)
    plain = ragged(lengths, DIM, seed)
    before = torch.randint(9, (len(lengths), padding))
    padded = Sequence(
        plain.items, torch.cat([before, plain.index], 1), torch.cat([torch.zeros_like(before).bool(), plain.mask], 1)
    )
    routing, other = router(plain), router(padded)
    torch.testing.assert_close(other.gates, routing.gates, **EXACT)
    assert torch.equal(other.members[padded.mask], routing.members[plain.mask])
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    shuffled = router(plain.select(order))
    torch.testing.assert_close(shuffled.gates, routing.gates[order], **EXACT)
    assert torch.equal(shuffled.members[plain.mask[order]], routing.members[order][plain.mask[order]])
    for row in range(len(lengths)):
        alone = router(plain.select(torch.tensor([row])))
        torch.testing.assert_close(alone.gates[0], routing.gates[row], **EXACT)
        assert torch.equal(alone.members[0][plain.mask[row]], routing.members[row][plain.mask[row]])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("padding", [0, 2])
def test_batches_without_tokens_give_no_gates(lengths, padding):
    router = build(aux_weight=1.0).train()
    losses: list[Tensor] = []
    routing = router(ragged(lengths, DIM, padding=padding), losses)
    assert routing.members.shape == (len(lengths), padding, 4)
    assert routing.gates.shape == (len(lengths), 4)
    assert not routing.gates.any()
    assert all(loss.item() == 0.0 for loss in losses)


def test_routing_is_computed_in_float32_under_autocast():
    router = build().float()
    sequence = ragged(LENGTHS, DIM, dtype=torch.float32)
    expected = router(sequence)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(sequence)
    assert torch.equal(routing.gates, expected.gates)
    assert torch.equal(routing.members, expected.members)


def test_init_weights_draws_small_gates_again():
    torch.manual_seed(0)
    router = GShardRouter(200, 50, router_init_std=0.02)
    torch.nn.init.ones_(router.linear.weight)
    router.init_weights()
    assert router.linear.weight.std().item() == pytest.approx(0.02, rel=0.05)  # 10,000 draws
    assert router.linear.bias is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk_experts": 5}, r"topk_experts \(5\) must lie in 1..4"),
        ({"topk_experts": 0}, r"topk_experts \(0\)"),
        ({"capacity_factor_train": 0.0}, r"capacity_factor_train \(0.0\)"),
        ({"min_capacity": -1}, r"min_capacity \(-1\)"),
        ({"second_expert_threshold": -0.1}, r"second_expert_threshold \(-0.1\)"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GShardRouter(DIM, 4, **options)
