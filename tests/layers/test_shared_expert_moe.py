"""A shared expert beside routed ones: against every expert row by row, reductions to the plain block, fallback, stats."""

import copy
import inspect
from typing import Any, Literal

import pytest
import test_dselect_k_router as dselect_k
import test_expert_choice_router as expert_choice
import test_gshard_router as gshard
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn

from model_zoo.layers.routing_usage import mean_routing_stats
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.shared_expert_moe import DSelectK, ExpertChoice, GShard, SharedExpertMoE

# float64: at most some hundred terms of order one, summed in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 4
LENGTHS = [8, 1, 0, 4, 12, 3]
METHODS = [GShard, DSelectK, ExpertChoice]


class DecayBlock(nn.Module):
    """``W [q ; sum_j x_(newest - j) / 2^j]``: reads order, length and target; an empty history gives ``W [q ; 0]``."""

    out_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * DIM, 3)

    def forward(self, query: Tensor, sequence: Sequence) -> Tensor:
        age = torch.arange(sequence.index.shape[1] - 1, -1, -1).to(query.dtype)
        history = (sequence.vectors * (sequence.mask * 0.5**age).unsqueeze(2)).sum(1)
        return self.linear(torch.cat([query, history], 1))


class FussyBlock(DecayBlock):
    """A block with a loss of its own."""

    has_losses = True

    def forward(self, query: Tensor, sequence: Sequence, losses: list[Any] | None = None) -> Tensor:
        if losses is not None:
            losses.append(self.linear.weight.square().sum())
        return super().forward(query, sequence)


def build(method: type[SharedExpertMoE], seed: int = 0, block=DecayBlock, **options) -> SharedExpertMoE:
    """A small layer in evaluation, its router's choices far apart."""
    layer = method(block, DIM, **{"n_experts": 3, **options}).double()  # type: ignore[call-arg, arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(generator=generator)
        for value in layer.router.parameters() if method is DSelectK and layer.router else ():
            value.mul_(0.3)
    return layer.eval()


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0) -> tuple[Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding)


def route(layer: SharedExpertMoE, rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's readers ``[t, n]`` and weights ``[n]``, by the routers' literal forms."""
    if isinstance(layer, ExpertChoice):
        members, gates = expert_choice.route(layer.router, rows)
        return members, list(gates)
    literal = gshard.route_row if isinstance(layer, GShard) else dselect_k.route_row
    parts = [literal(layer.router, tokens) for tokens in rows]
    return [members for members, _ in parts], [gates for _, gates in parts]


def answer(block: nn.Module, query: Tensor, tokens: Tensor) -> Tensor:
    """`DecayBlock` of one row."""
    history = torch.zeros_like(query)
    for token in tokens:
        history = history / 2 + token
    return block.linear(torch.cat([query, history]))


def dense(layer: SharedExpertMoE, query: Tensor, sequence: Sequence) -> Tensor:
    """Every expert for every row, on the row's tokens that it reads."""
    rows = rows_of(sequence.vectors, sequence.mask)
    answers = []
    for target, tokens, members, gates in zip(query, rows, *route(layer, rows), strict=True):
        shared = answer(layer.global_expert, target, tokens)
        routed = sum(
            gates[number] * answer(expert, target, tokens[members[:, number]])
            for number, expert in enumerate(layer.experts.experts)
        )
        if not bool((gates > 0).any()):
            answers.append(shared)
        elif layer.combine == "sum":
            answers.append(shared + layer.alpha_routed * routed)
        else:
            answers.append((1 - layer.alpha_routed) * shared + layer.alpha_routed * routed)
    return torch.stack(answers)


def assert_equals_dense_form(layer: SharedExpertMoE, query: Tensor, sequence: Sequence) -> None:
    output, expected = layer(query, sequence), dense(layer, query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    named = dict(layer.named_parameters())
    leaves = [query, sequence.items, *named.values()]
    found, wanted = gradients(output, leaves), gradients(expected, leaves)
    for name, got, want in zip(["query", "items", *named], found, wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


# ---- against every expert, row by row


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk_experts": 1},
        {"topk_experts": 3},
        {"combine": "sum"},
        {"aggregate": "mean_gate"},
        {"aggregate": "mean_gate", "combine": "sum", "alpha_routed": 0.2},
        {"alpha_routed": 1.0},
        {"expert_budget": "budget_matched", "n_experts": 2, "topk_experts": 1},
        {"n_experts": 1, "topk_experts": 1},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_output_and_every_gradient_equal_the_dense_form(method, options):
    for seed in range(2):
        assert_equals_dense_form(build(method, seed, **options), *case(seed=seed, padding=seed))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (GShard, {"legacy_order": True, "capacity_factor_eval": 0.6}),
        (GShard, {"normalize_gates": False}),
        (GShard, {"min_capacity": 4, "capacity_factor_eval": 0.1}),
        (DSelectK, {"gamma": 0.5, "n_experts": 5}),
        (DSelectK, {"renormalize": True, "n_experts": 5, "topk_experts": 3}),
        (ExpertChoice, {"last_gate": "softmax"}),
        (ExpertChoice, {"choice_group": "batch", "topk_experts": 1}),
        (ExpertChoice, {"choice_group": "batch", "last_gate": "softmax", "topk_experts": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ",".join(f"{key}={x}" for key, x in value.items()),
)
def test_every_key_reaches_the_router(method, options):
    layer = build(method, 3, **options)
    query, sequence = case(seed=3)
    assert_equals_dense_form(layer, query, sequence)
    plain = build(method, 3, **{key: options[key] for key in ("n_experts", "topk_experts") if key in options})
    assert not torch.allclose(plain(query, sequence), layer(query, sequence))


def test_keys_of_training_and_initialisation_reach_the_router():
    chosen: dict[type[SharedExpertMoE], dict[str, Any]] = {
        GShard: {"capacity_factor_train": 0.7, "second_expert_threshold": 0.1, "aux_weight": 0.5, "router_init_std": 0.3},
        DSelectK: {"entropy_weight": 0.7, "reachability_weight": 0.3},
        ExpertChoice: {"router_init_std": 0.3, "z_loss_weight": 0.9},
    }
    for method, options in chosen.items():
        router = build(method, **options).router
        kept = {**vars(router), "capacity_factor_train": getattr(router, "capacity_factors", (0, 0))[1]}
        assert {key: kept[key] for key in options} == options


# ---- fallback


def dropping_layer(**options) -> tuple[GShard, Tensor, Sequence]:
    """All tokens want expert 0, whose places go to the oldest: the newest token of the longer row gets none."""
    layer = build(GShard, topk_experts=1, legacy_order=True, capacity_factor_eval=1.0, **options)
    assert isinstance(layer, GShard)
    with torch.no_grad():
        layer.router.linear.weight.zero_()
    return layer, *case([6, 1, 0], padding=1)


@pytest.mark.parametrize("combine", ["convex", "sum"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_rows_that_no_expert_serves_get_the_shared_answer(combine, alpha):
    layer, query, sequence = dropping_layer(combine=combine, alpha_routed=alpha)
    output, shared = layer(query, sequence), layer.global_expert(query, sequence)
    torch.testing.assert_close(output[[0, 2]], shared[[0, 2]], **EXACT)
    assert not torch.allclose(output[1], shared[1])
    assert_equals_dense_form(layer, query, sequence)
    assert layer.routing_stats(sequence)["fallback_rate"] == 0.5  # of the two rows with history
    found = gradients(output[[0, 2]], [*layer.experts.parameters(), *layer.router.parameters()])
    assert not any(grad.any() for grad in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [[], [0, 0], [1]])
@pytest.mark.parametrize("padding", [0, 2])
def test_batches_of_little_are_finite(method, lengths, padding):
    layer = build(method).train()
    query, sequence = case(lengths, padding=padding)
    losses: list[Tensor] = []
    output = layer(query, sequence, losses)
    assert output.shape == (len(lengths), 3)
    if not sum(lengths):
        torch.testing.assert_close(output, layer.global_expert(query, sequence), **EXACT)
    total = torch.stack([output.sum(), *losses]).sum()
    found = torch.autograd.grad(total, [*layer.parameters(), sequence.items], allow_unused=True)
    assert all(bool(grad.isfinite().all()) for grad in found if grad is not None)


# ---- the plain block


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("off", [{"alpha_routed": 0.0}, {"n_experts": 0}])
def test_without_routed_experts_it_is_the_block_bit_for_bit(method, off):
    torch.manual_seed(4)
    block = DecayBlock().double()
    after = torch.rand(3)
    torch.manual_seed(4)
    layer = method(DecayBlock, DIM, **off).double()
    assert torch.equal(torch.rand(3), after)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        f"global_expert.{name}": tuple(value.shape) for name, value in block.state_dict().items()
    }
    assert layer.expert_modules() == []
    query, sequence = case()
    assert torch.equal(layer(query, sequence), block(query, sequence))
    assert layer.routing_stats(sequence) == {}


@pytest.mark.parametrize("method", METHODS)
def test_the_shared_block_starts_as_the_plain_one_whatever_stands_beside_it(method):
    torch.manual_seed(4)
    block = DecayBlock()
    after = torch.rand(3)
    torch.manual_seed(4)
    layer = method(DecayBlock, DIM)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(layer.global_expert.linear.weight, block.linear.weight)
    beside = {id(p) for module in layer.expert_modules() for p in module.parameters()}
    assert {id(p) for p in layer.parameters()} - beside == {id(p) for p in layer.global_expert.parameters()}
    assert {type(module).__name__ for module in layer.expert_modules()} == {"RoutedExperts", f"{method.__name__}Router"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("budget", "expected"), [("literal", (5, 2)), ("budget_matched", (10, 4))])
def test_expert_budgets(method, budget, expected):
    layer = method(DecayBlock, DIM, expert_budget=budget)
    assert (len(layer.experts.experts), layer.router.topk) == expected
    assert layer.router.num_experts == expected[0]


# ---- losses


def test_the_shared_block_and_the_router_append_their_losses_and_the_experts_do_not():
    layer = build(GShard, block=FussyBlock, aux_weight=0.5).train()
    query, sequence = case()
    losses: list[Tensor] = []
    layer(query, sequence, losses)
    assert len(losses) == 2
    torch.testing.assert_close(losses[1], layer.global_expert.linear.weight.square().sum(), **EXACT)
    torch.testing.assert_close(losses[0], 0.5 * gshard.balance(layer.router, sequence.vectors, sequence.mask), **EXACT)
    losses.clear()
    build(GShard, block=FussyBlock, alpha_routed=0.0)(query, sequence, losses)
    assert len(losses) == 1
    layer(query, sequence)


@pytest.mark.parametrize(("method", "expected"), [(GShard, 1), (DSelectK, 1), (ExpertChoice, 0)])
def test_auxiliary_losses_by_default(method, expected):
    assert method.has_losses
    losses: list[Tensor] = []
    build(method).train()(*case(), losses)
    assert len(losses) == expected


# ---- invariants


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    method=st.sampled_from(METHODS),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(0, 4),
    topk=st.integers(1, 3),
    aggregate=st.sampled_from(["last", "mean_gate"]),
    seed=st.integers(0, 50),
)
def test_padding_row_order_and_batch_mates_do_not_matter(method, lengths, padding, topk, aggregate, seed):
    layer = build(method, seed, topk_experts=topk, aggregate=aggregate)
    query, plain = case(lengths, seed)
    before = torch.randint(9, (len(lengths), padding))
    padded = Sequence(
        plain.items, torch.cat([before, plain.index], 1), torch.cat([torch.zeros_like(before).bool(), plain.mask], 1)
    )
    output = layer(query, plain)
    torch.testing.assert_close(layer(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([layer(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)


@pytest.mark.parametrize(("group", "leaks"), [("sequence", False), ("batch", True)])
def test_predictions_depend_on_batch_mates_only_if_experts_choose_from_the_batch(group, leaks):
    layer = build(ExpertChoice, topk_experts=1, choice_group=group)
    query, sequence = case([6, 6, 6, 6])
    together = layer(query, sequence)
    alone = torch.cat([layer(query[[b]], sequence.select(torch.tensor([b]))) for b in range(4)])
    assert torch.allclose(alone, together, **EXACT) != leaks


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_repeats_itself_and_leaves_no_state(method):
    layer = build(method)
    query, sequence = case()
    before, attributes, state = copy.deepcopy(layer.state_dict()), set(vars(layer.router)), torch.get_rng_state()
    first = layer(query, sequence)
    layer.routing_stats(sequence)
    assert torch.equal(layer(query, sequence), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(layer.router)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_training_draws_second_experts_and_the_seed_repeats_them():
    layer = build(GShard).train()
    query, sequence = case([40, 30])
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(query, sequence))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_with_float64(method):
    layer = build(method)
    query, sequence = case()
    single = copy.deepcopy(layer).float()
    narrow = Sequence(sequence.items.float(), sequence.index, sequence.mask)
    # sums of some ten terms up to ten, single precision
    torch.testing.assert_close(single(query.float(), narrow), layer(query, sequence).float(), rtol=1e-4, atol=1e-4)


# ---- statistics


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("aggregate", ["last", "mean_gate"])
def test_routing_stats_equal_counting_by_hand(method, aggregate):
    layer = build(method, 2, topk_experts=1, aggregate=aggregate)
    _, sequence = case(seed=2, padding=2)
    stats = layer.routing_stats(sequence)
    rows = rows_of(sequence.vectors, sequence.mask)
    members, gates = route(layer, rows)
    present = [number for number, row in enumerate(rows) if len(row)]
    tokens = torch.cat(members)
    assert stats["rows"] == len(present) == 5
    assert stats["tokens"] == len(tokens) == 28
    unserved = [not bool((gates[number] > 0).any()) for number in present]
    assert stats["fallback_rate"] == pytest.approx(sum(unserved) / 5)
    assert stats["unread_rate"] == pytest.approx(sum(not bool(token.any()) for token in tokens) / 28)
    assert stats["experts_per_token"] == pytest.approx(int(tokens.sum()) / 28)
    assert stats["experts_per_row"] == pytest.approx(sum(int((row > 0).sum()) for row in gates) / 5)
    assert stats["share"] == pytest.approx((tokens.sum(0) / tokens.sum()).tolist())
    assert stats["gate"] == pytest.approx((sum(row.detach() for row in gates) / 5).tolist())
    assert stats["routed_length"] == pytest.approx((tokens.sum(0) / 5).tolist())
    for number, length in enumerate(stats["served_length"]):
        served = [int(m[:, number].sum()) for m, g in zip(members, gates, strict=True) if g[number] > 0]
        assert length == pytest.approx(sum(served) / max(len(served), 1))
        assert stats["served_rows"][number] == len(served)


@pytest.mark.parametrize("method", METHODS)
def test_routing_stats_of_two_batches_are_those_of_both_as_one(method):
    layer = build(method, 2, topk_experts=1)
    _, sequence = case(seed=2, padding=2)
    if method is GShard:  # its capacity is counted over a batch: leave room for everything
        layer.router.capacity_factor_eval = 3.0
    layer.eval()
    parts = [layer.routing_stats(sequence.select(rows)) for rows in torch.arange(len(sequence.mask)).split([2, 4])]
    assert mean_routing_stats([{}, *parts]) == {
        name: pytest.approx(value) for name, value in layer.routing_stats(sequence).items()
    }
    assert mean_routing_stats([{}]) == {}


def test_routing_stats_of_an_empty_batch():
    stats = build(DSelectK).routing_stats(case([0, 0], padding=1)[1])
    assert (stats["rows"], stats["tokens"], stats["fallback_rate"], stats["share"]) == (0, 0, 0.0, [0.0, 0.0, 0.0])


# ---- configuration


@pytest.mark.parametrize("method", METHODS)
def test_configuration_keys_are_keyword_only_typed_and_have_defaults(method):
    parameters = inspect.signature(method, eval_str=True).parameters
    positional = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == ["block_factory", "item_dim"]
    keys = {name: p for name, p in parameters.items() if name not in positional}
    assert all(type(p.default) is p.annotation or p.default in p.annotation.__args__ for p in keys.values())
    common = {name: p.default for name, p in keys.items() if name in inspect.signature(GShard).parameters}
    assert common.items() >= {
        "n_experts": 5, "topk_experts": 2, "alpha_routed": 0.5, "combine": "convex", "aggregate": "last",
        "expert_budget": "literal",
    }.items()  # fmt: skip
    assert keys["combine"].annotation == Literal["convex", "sum"]
    with pytest.raises(TypeError, match="capacity"):
        method(DecayBlock, DIM, capacity=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_routed": 1.2}, r"alpha_routed \(1.2\) must lie in 0..1"),
        ({"n_experts": -1}, r"n_experts \(-1\) must be >= 0"),
        ({"topk_experts": 4}, r"topk_experts \(4\) must lie in 1..n_experts \(3\)"),
        ({"topk_experts": 0}, r"topk_experts \(0\)"),
    ],
)
def test_values_out_of_range_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(DecayBlock, DIM, **{"n_experts": 3, **options})
