"""Expert Choice against experts that sort all tokens and take the best: members, gates, gradients, ties, groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor

from model_zoo.layers.expert_choice_router import ExpertChoiceRouter, best_tokens
from model_zoo.layers.sequence import Sequence

# float64 sums of at most a few dozen terms of order one, taken in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 4
LENGTHS = [9, 1, 0, 4, 17, 3]
GOLDEN = torch.tensor([[2.2, 1, 0], [2, 0, 1], [1, 2, 0], [3, 0, 1], [1.8, 1.1, 0]], dtype=torch.double)


def build(num_experts: int = 4, seed: int = 0, **options) -> ExpertChoiceRouter:
    """A router whose scores lie far apart."""
    router = ExpertChoiceRouter(DIM, num_experts, **options).double()
    generator = torch.Generator().manual_seed(seed)
    for value in router.parameters():
        torch.nn.init.normal_(value, generator=generator)
    return router.eval()


def golden_router(**options) -> tuple[ExpertChoiceRouter, Sequence]:
    """Capacity 2 (one expert per token on average) for the five golden tokens, which are their own logits."""
    router = ExpertChoiceRouter(3, 3, topk_experts=1, **options).double().eval()
    with torch.no_grad():
        router.linear.weight.copy_(torch.eye(3))
    return router, Sequence.from_vectors(GOLDEN.unsqueeze(0), torch.ones(1, 5, dtype=torch.bool))


def route_group(router: ExpertChoiceRouter, rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's readers ``[t, n]`` and gates ``[t, n]``, the rows' tokens ``[t, d]`` in one group."""
    experts = router.num_experts
    scores = [
        torch.stack([(router.linear.weight @ token + router.linear.bias).softmax(-1) for token in tokens])
        if len(tokens)
        else tokens.new_zeros(0, experts)
        for tokens in rows
    ]
    members = [torch.zeros(len(tokens), experts, dtype=torch.bool) for tokens in rows]
    total = sum(map(len, rows))
    capacity = max(1, math.ceil(router.topk * total / experts))
    for expert in range(experts):
        candidates = [
            (-row[position, expert].item(), len(row) - position, number)  # best, then newest, then lowest row
            for number, row in enumerate(scores)
            for position in range(len(row))
        ]
        for _, from_end, number in sorted(candidates)[:capacity]:
            members[number][len(rows[number]) - from_end, expert] = True
    return members, [row * (own if router.last_gate == "chosen" else 1) for row, own in zip(scores, members, strict=True)]


def route(router: ExpertChoiceRouter, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Every row's readers ``[t, n]``, and the experts' weights ``[B, n]``."""
    if router.choice_group == "batch":
        members, gates = route_group(router, rows)
    else:
        parts = [route_group(router, [row]) for row in rows]
        members, gates = [m[0] for m, _ in parts], [g[0] for _, g in parts]
    pick = (lambda g: g[-1]) if router.aggregate == "last" else (lambda g: g.mean(0))
    return members, torch.stack([pick(g) if len(g) else g.new_zeros(router.num_experts) for g in gates])


def route_row(router: ExpertChoiceRouter, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One row on its own: readers ``[t, n]`` and weights ``[n]``."""
    members, gates = route(router, [tokens])
    return members[0], gates[0]


def assert_routed_literally(router: ExpertChoiceRouter, sequence: Sequence) -> None:
    routing = router(sequence)
    members, expected = route(router, rows_of(sequence.vectors, sequence.mask))
    for got, real, want in zip(routing.members, sequence.mask, members, strict=True):
        assert torch.equal(got[real], want)
        assert not got[~real].any()
    torch.testing.assert_close(routing.gates, expected, **EXACT)
    assert torch.equal(routing.gates > 0, expected > 0)
    leaves = [sequence.items, *router.parameters()]
    for got, want in zip(gradients(routing.gates, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# ---- golden values


def test_golden_choices_and_weights():
    router, sequence = golden_router(aggregate="mean_gate")
    expected = torch.zeros(5, 3, dtype=torch.double)
    expected[[3, 0], 0] = torch.tensor([0.843795, 0.708217], dtype=torch.double)
    expected[[2, 4], 1] = torch.tensor([0.665241, 0.298809], dtype=torch.double)
    expected[[1, 3], 2] = torch.tensor([0.244728, 0.114195], dtype=torch.double)
    routing = router(sequence)
    assert torch.equal(routing.members[0], expected > 0)
    torch.testing.assert_close(routing.gates[0], expected.mean(0), rtol=0, atol=5e-7)  # six printed digits
    torch.testing.assert_close(route_group(router, [GOLDEN])[1][0], expected, rtol=0, atol=5e-7)


def test_golden_newest_token_is_held_by_one_expert():
    gates = golden_router()[0](golden_router()[1]).gates[0]
    torch.testing.assert_close(gates, torch.tensor([0, 0.298809, 0], dtype=torch.double), rtol=0, atol=5e-7)
    router, sequence = golden_router(last_gate="softmax")
    torch.testing.assert_close(router(sequence).gates[0], GOLDEN[-1].softmax(-1), **EXACT)


# ---- against experts that sort all tokens


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("topk", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"aggregate": "mean_gate"}, {"last_gate": "softmax"}, {"last_gate": "softmax", "aggregate": "mean_gate"}],
    ids=lambda options: ",".join(options.values()) or "default",
)
def test_members_gates_and_gradients_equal_sorting_all_tokens(options, topk, group):
    for seed in range(3):
        # few distinct items: every history has copies of equal score
        router = build(seed=seed, topk_experts=topk, choice_group=group, **options)
        assert_routed_literally(router, ragged(LENGTHS, DIM, seed, padding=seed))
        assert_routed_literally(router, ragged(LENGTHS, DIM, seed, num_items=200))


def test_each_expert_reads_its_capacity_of_real_tokens():
    router = build(5)
    sequence = ragged([0, 1, 2, 3, 5, 6, 100], DIM, padding=2)
    assert router(sequence).members.sum(1).tolist() == [[c] * 5 for c in (0, 1, 1, 2, 2, 3, 40)]
    assert torch.equal(router.train()(sequence).members, router.eval()(sequence).members)


def test_among_equal_scores_the_newest_tokens_are_chosen():
    router = build(4, topk_experts=1)
    one = torch.randn(1, DIM, dtype=torch.double)
    mask = torch.tensor([[False, True, True, True, True, True, True, True, True]])
    members = router(Sequence(one, torch.zeros(1, 9, dtype=torch.long), mask)).members[0]
    assert members.T.tolist() == [[False] * 7 + [True] * 2] * 4


def test_among_equal_scores_of_a_batch_the_newest_tokens_of_the_lowest_rows_are_chosen():
    router = build(4, topk_experts=1, choice_group="batch")
    one = torch.randn(1, DIM, dtype=torch.double)
    mask = torch.tensor([[True, True, True, True], [False, False, False, True], [True, True, True, True]])
    members = router(Sequence(one, torch.zeros(3, 4, dtype=torch.long), mask)).members[..., 0]
    assert members.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]  # capacity ceil(9 / 4) = 3
    mask[1, 3] = False
    members = router(Sequence(one, torch.zeros(3, 4, dtype=torch.long), mask)).members[..., 0]
    assert members.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]  # capacity 2
    mask[0, 0] = mask[1, 2:] = True
    members = router(Sequence(one, torch.zeros(3, 4, dtype=torch.long), mask)).members[..., 0]
    assert members.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]]  # capacity 3, ten tokens


def test_capacity_is_counted_in_integers():
    for total, per_token, experts in ((7, 3, 7), (25, 2, 5), (49, 1, 49), (50, 3, 10)):
        members = best_tokens(torch.rand(1, total, experts), torch.ones(1, total, dtype=torch.bool), per_token)
        assert members.sum(1).unique().tolist() == [math.ceil(round(per_token * total / experts, 9))]


# ---- the newest token, losses


def test_a_newest_token_that_no_expert_chose_gets_no_gate():
    router, _ = golden_router()
    pairs = torch.tensor([[3, 3, 0], [3, 0, 3], [0, 3, 3], [0, 0, 0]], dtype=torch.double)  # the last is second to two each
    routing = router(Sequence.from_vectors(pairs.unsqueeze(0), torch.ones(1, 4, dtype=torch.bool)))
    assert routing.members[0].int().tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]]
    assert not routing.gates.any()


def test_z_loss_is_the_mean_over_real_tokens_in_training_only():
    router = build(z_loss_weight=0.5)
    sequence = ragged(LENGTHS, DIM, padding=2)
    losses: list[Tensor] = []
    router(sequence, losses)
    assert losses == []
    router.train()(sequence, losses)
    tokens = torch.cat(rows_of(sequence.vectors, sequence.mask))
    values = [(router.linear.weight @ token + router.linear.bias).exp().sum().log() ** 2 for token in tokens]
    expected = 0.5 * torch.stack(values).mean()
    torch.testing.assert_close(losses[0], expected, **EXACT)
    leaves = [sequence.items, *router.parameters()]
    for got, want in zip(gradients(losses[0], leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    unweighted: list[Tensor] = []
    build().train()(sequence, unweighted)
    assert unweighted == []


# ---- batches


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    topk=st.integers(1, 4),
    aggregate=st.sampled_from(["last", "mean_gate"]),
    group=st.sampled_from(["sequence", "batch"]),
    last_gate=st.sampled_from(["chosen", "softmax"]),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, topk, aggregate, group, last_gate, seed):
    router = build(seed=seed, topk_experts=topk, aggregate=aggregate, choice_group=group, last_gate=last_gate)
    plain = ragged(lengths, DIM, seed)
    before = torch.randint(9, (len(lengths), padding))
    padded = Sequence(
        plain.items, torch.cat([before, plain.index], 1), torch.cat([torch.zeros_like(before).bool(), plain.mask], 1)
    )
    routing, other = router(plain), router(padded)
    torch.testing.assert_close(other.gates, routing.gates, **EXACT)
    assert torch.equal(other.members[padded.mask], routing.members[plain.mask])
    if group == "batch":
        return
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    shuffled = router(plain.select(order))
    torch.testing.assert_close(shuffled.gates, routing.gates[order], **EXACT)
    assert torch.equal(shuffled.members[plain.mask[order]], routing.members[order][plain.mask[order]])
    for row in range(len(lengths)):
        alone = router(plain.select(torch.tensor([row])))
        torch.testing.assert_close(alone.gates[0], routing.gates[row], **EXACT)
        assert torch.equal(alone.members[0][plain.mask[row]], routing.members[row][plain.mask[row]])


def test_in_a_batch_group_a_row_depends_on_its_batch_mates():
    """The published grouping leaks between users; it is offered for comparison, not for serving."""
    router = build(topk_experts=1, choice_group="batch")
    sequence = ragged([6, 6, 6, 6], DIM, num_items=50)
    together = router(sequence)
    alone = [router(sequence.select(torch.tensor([row]))) for row in range(4)]
    assert any(not torch.equal(one.members[0], members) for one, members in zip(alone, together.members, strict=True))
    assert any(not torch.equal(one.gates[0], gates) for one, gates in zip(alone, together.gates, strict=True))
    own = build(topk_experts=1)
    assert torch.equal(torch.stack([own(sequence.select(torch.tensor([row]))).members[0] for row in range(4)]),
                       own(sequence).members)  # fmt: skip


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("padding", [0, 2])
def test_batches_without_tokens_give_no_gates(lengths, padding, group):
    router = build(choice_group=group, z_loss_weight=1.0).train()
    losses: list[Tensor] = []
    routing = router(ragged(lengths, DIM, padding=padding), losses)
    assert routing.members.shape == (len(lengths), padding, 4)
    assert routing.gates.shape == (len(lengths), 4)
    assert not routing.gates.any()
    assert not routing.members.any()
    assert all(loss.item() == 0.0 for loss in losses)


def test_routing_is_computed_in_float32_under_autocast():
    router = build().float()
    sequence = ragged(LENGTHS, DIM, dtype=torch.float32)
    expected = router(sequence)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(sequence)
    assert torch.equal(routing.gates, expected.gates)
    assert torch.equal(routing.members, expected.members)


def test_init_weights_draws_small_scores_again():
    torch.manual_seed(0)
    router = ExpertChoiceRouter(200, 50, router_init_std=0.02)
    for value in router.parameters():
        torch.nn.init.ones_(value)
    router.init_weights()
    assert router.linear.weight.std().item() == pytest.approx(0.02, rel=0.05)  # 10,000 draws
    assert not router.linear.bias.any()


@pytest.mark.parametrize("topk", [0, 5])
def test_more_experts_per_token_than_experts_are_refused(topk):
    with pytest.raises(ValueError, match=rf"topk_experts \({topk}\) must lie in 1..4"):
        ExpertChoiceRouter(DIM, 4, topk_experts=topk)
