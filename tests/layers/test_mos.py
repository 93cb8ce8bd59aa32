"""MoS against its dense form, its invariants, and the effect of every option."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    block_answer,
    branch_tokens,
    ema_batch_mean,
    gate_row,
    gradients,
    masked_attention,
    members,
    mos,
    occurrences_by_row,
    ragged,
    router_inputs,
    rows_of,
)
from torch import nn

from model_zoo.backbones.twin import TwinBlock
from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.target_attention import TargetAttention

# float64: at most some hundred terms of order one, summed in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}
DIM = 5
LENGTHS = [9, 1, 0, 4, 17, 3]


def twin_block() -> nn.Module:
    return TwinBlock(DIM, attention_dim=4, num_heads=2, short_seq_len=4, topk=3)


def attention_block() -> nn.Module:
    return TargetAttention(DIM, 4, 2)


def spread(layer: nn.Module, seed: int) -> nn.Module:
    """Parameters and codes large enough for every choice (top-k, themes) to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*layer.parameters(), *(b for n, b in layer.named_buffers() if n.endswith("codes"))]:
            value.copy_(torch.randn(value.shape, generator=generator))
    return layer


def build(block=twin_block, seed: int = 0, **options: Any) -> MoS:
    defaults = {"n_item_experts": 3, "n_window_experts": 3, "codebook_dim": 4, "window_size": 4, "window_stride": 2}
    layer = spread(MoS(block, DIM, **{**defaults, **options}), seed).double()
    assert isinstance(layer, MoS)
    return layer


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0) -> tuple[torch.Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding)


def assert_equals_dense_form(layer: MoS, query: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Outputs and the gradients of every parameter, of the items and of the targets."""
    output, expected = layer(query, sequence), mos(layer, query, sequence.vectors, sequence.mask)
    torch.testing.assert_close(output, expected, **EXACT)
    named = dict(layer.named_parameters())
    leaves = [query, sequence.items, *named.values()]
    found, wanted = gradients(output, leaves), gradients(expected, leaves)
    for name, got, want in zip(["query", "items", *named], found, wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    return output


# ---- lazy = dense


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("block", [twin_block, attention_block])
@pytest.mark.parametrize("seed", range(3))
def test_lazy_experts_equal_all_experts(block, topk, seed):
    layer = build(block, seed, topk_item=topk, topk_window=topk)
    assert_equals_dense_form(layer, *case(seed=seed, padding=seed))


@pytest.mark.parametrize(
    "options",
    [
        {"gate_norm": "softmax_then_mask", "topk_item": 1, "topk_window": 2},
        {"router_temperature": 0.2, "topk_item": 2, "topk_window": 2},
        {"codebook": "learned", "topk_item": 2, "topk_window": 2},
        {"shared_router": True, "topk_item": 2, "topk_window": 2},
        {"router_linear": True, "topk_item": 2},
        {"router_hidden": 7, "topk_item": 2},
        {"router_input": "item_target", "topk_item": 2, "topk_window": 2},
        {"gate_source": "target", "topk_item": 2, "topk_window": 1},
        {"gate_source": "target", "router_input": "item_target", "topk_item": 2},
        {"window_align": "left", "topk_window": 2},
        {"window_divide_by": "size", "topk_window": 2},
        {"short_history": "skip", "topk_window": 2},
        {"empty_history": "zeros"},
        {"n_item_experts": 0},
        {"n_window_experts": 0, "topk_item": 2},
        {"alpha_item": 0.0},
        {"alpha_window": 0.0, "topk_item": 2},
        {"alpha_item": 0.5, "alpha_window": 0.5, "topk_item": 2},
        {"alpha_item": 1.0, "alpha_window": 0.0},
        {"alpha_item": 0.1, "alpha_window": 0.6},
        {"window_size": 30},
        {"window_size": 2, "window_stride": 3, "topk_window": 2},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_option_equals_the_dense_form(options):
    assert_equals_dense_form(build(**options), *case())


@pytest.mark.parametrize("topk", [1, 2])
def test_experts_on_subsequences_equal_experts_masked_in_place(topk):
    """For a block without positions, masking the tokens of other themes is the same as taking them out."""
    layer = build(attention_block, topk_item=topk, alpha_item=1.0, alpha_window=0.0)
    query, sequence = case([6, 2, 5], padding=3)
    vectors = sequence.vectors
    reads = torch.zeros(*sequence.mask.shape, 3, dtype=torch.bool)
    reads[sequence.mask] = members(layer.item_router, vectors[sequence.mask])
    gates = torch.stack([gate_row(layer.item_router, row[-1]) for row in vectors])
    expected = sum(
        gates[:, [n]] * masked_attention(expert, query, vectors, reads[:, :, n])
        for n, expert in enumerate(layer.item_experts.experts)
    )
    torch.testing.assert_close(layer(query, sequence), expected, **EXACT)


def test_blocks_without_a_plan_are_dispatched_one_by_one():
    """A block that is not attention over items (here: a sum) is called as a plain module."""

    class Sum(nn.Module):
        out_dim = DIM

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(DIM))

        def forward(self, query: torch.Tensor, sequence: Sequence) -> torch.Tensor:
            return query + self.scale * (sequence.vectors * sequence.mask.unsqueeze(2)).sum(1)

    layer = build(Sum, alpha_item=1.0, alpha_window=0.0, topk_item=2)
    query, sequence = case([6, 2, 5], padding=1)
    expected = []
    for target, tokens in zip(query, rows_of(sequence.vectors, sequence.mask), strict=True):
        reads, gates = members(layer.item_router, tokens), gate_row(layer.item_router, tokens[-1])
        expected.append(sum(
            gates[n] * (target + expert.scale * tokens[reads[:, n]].sum(0))
            for n, expert in enumerate(layer.item_experts.experts)
        ))  # fmt: skip
    torch.testing.assert_close(layer(query, sequence), torch.stack(expected), **EXACT)


# ---- reductions to the plain block


def test_zero_weights_are_the_plain_block_bit_for_bit_and_hold_nothing_else():
    torch.manual_seed(5)
    plain = twin_block()
    torch.manual_seed(5)
    layer = MoS(twin_block, DIM, alpha_item=0.0, alpha_window=0.0)
    names = [f"global_expert.{name}" for name in plain.state_dict()]
    assert [name for name in layer.state_dict() if name != "_extra_state"] == names
    assert layer.expert_modules() == []
    query, sequence = torch.randn(6, DIM, requires_grad=True), ragged(LENGTHS, DIM, dtype=torch.float)
    output, expected = layer(query, sequence), plain(query, sequence)
    assert torch.equal(output, expected)
    leaves = [query, sequence.items]
    found = gradients(output, [*leaves, *layer.parameters()])
    for got, want in zip(found, gradients(expected, [*leaves, *plain.parameters()]), strict=True):
        assert torch.equal(got, want)


def test_zero_fusion_of_a_full_layer_is_its_global_expert_bit_for_bit():
    layer = build()
    layer.set_fusion(0.0, 0.0)
    query, sequence = case()
    output = layer(query, sequence)
    assert torch.equal(output, layer.global_expert(query, sequence))
    beside = [p for module in layer.expert_modules() for p in module.parameters()]
    assert all(g is None for g in torch.autograd.grad(output.sum(), beside, allow_unused=True))


def test_the_global_expert_starts_as_the_plain_block_of_the_same_seed_and_leaves_the_same_stream():
    torch.manual_seed(5)
    plain = twin_block()
    after = torch.rand(3)
    torch.manual_seed(5)
    layer = MoS(twin_block, DIM)
    assert torch.equal(torch.rand(3), after)
    for name, value in plain.state_dict().items():
        assert torch.equal(layer.global_expert.state_dict()[name], value)
    first, second = layer.item_experts.experts[:2]
    assert not torch.equal(first.short_attention.W_q.weight, second.short_attention.W_q.weight)


@pytest.mark.parametrize("branch", ["item", "window"])
def test_one_expert_that_copies_the_global_one_is_the_plain_block(branch):
    size = {"window_size": 1, "window_stride": 1}  # windows of one item are the items
    alphas = {"alpha_item": 0.0, "alpha_window": 0.0, f"alpha_{branch}": 1.0}
    layer = build(n_item_experts=1, n_window_experts=1, **alphas, **size)
    experts = getattr(layer, f"{branch}_experts").experts
    experts[0] = copy.deepcopy(layer.global_expert)
    query, sequence = case()
    output, expected = layer(query, sequence), layer.global_expert(query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


# ---- gradients


@pytest.mark.parametrize("topk, trained", [(1, False), (2, True)])
def test_h_is_trained_only_with_more_than_one_theme(topk, trained):
    layer = build(topk_item=topk, topk_window=topk)
    query, sequence = case()
    layer(query, sequence).square().sum().backward()
    for router in (layer.item_router, layer.window_router):
        grads = [p.grad for p in router.h.parameters()]
        assert all((g is not None and float(g.abs().sum()) > 0) == trained for g in grads)


def test_softmax_then_mask_trains_h_with_one_theme():
    layer = build(gate_norm="softmax_then_mask")
    query, sequence = case()
    layer(query, sequence).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in layer.item_router.h.parameters())


def test_with_all_weight_on_the_experts_the_global_expert_serves_only_rows_that_have_none():
    layer = build(alpha_item=0.5, alpha_window=0.5)
    calls = []
    layer.global_expert.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    query, sequence = case()
    output = layer(query, sequence)
    assert calls == [1]
    (grad,) = gradients(output[[0, 1, 3, 4, 5]], [layer.global_expert.short_attention.W_v.weight])
    assert float(grad.abs().sum()) == 0.0


# ---- codebooks


@pytest.mark.parametrize("update, training", [(True, True), (True, False), (False, True), (False, False)])
def test_codes_move_only_when_updates_are_on_and_the_layer_trains(update, training):
    layer = build()
    layer.set_fusion(0.5, 0.5, update_codebooks=update)
    layer.train(training)
    before = [router.codebook.codes.clone() for router in (layer.item_router, layer.window_router)]
    query, sequence = case()
    layer(query, sequence).sum().backward()
    for router, codes in zip((layer.item_router, layer.window_router), before, strict=True):
        assert router.codebook.codes.grad is None and not router.codebook.codes.requires_grad
        assert torch.equal(router.codebook.codes, codes) == (not (update and training))


def test_codes_do_not_move_in_an_optimizer_step():
    layer = build()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.item_router.codebook.codes.clone()
    query, sequence = case()
    layer(query, sequence).sum().backward()
    optimizer.step()
    assert torch.equal(layer.item_router.codebook.codes, before)


@pytest.mark.parametrize("branch", ["item", "window"])
@pytest.mark.parametrize("options", [{}, {"router_input": "item_target"}, {"short_history": "skip"}])
def test_the_ema_averages_every_occurrence_of_every_row(branch, options):
    """Repeated items count each time, padding and the targets not at all, the window router sees windows."""
    layer = build(topk_item=2, topk_window=2, ema_decay=0.9, **options)
    layer.set_fusion(0.25, 0.25, update_codebooks=True)
    query, sequence = case(padding=3)
    codebook = getattr(layer, f"{branch}_router").codebook
    expected = ema_batch_mean(codebook.codes, 0.9, *occurrences_by_row(layer, query, sequence, branch))
    assert not torch.equal(expected, codebook.codes)
    layer(query, sequence)
    torch.testing.assert_close(codebook.codes, expected, **EXACT)


def run_updates(steps: int = 1, **options: Any) -> MoS:
    layer = build(**{"topk_item": 2, "topk_window": 2, "ema_decay": 0.9, **options})
    layer.set_fusion(0.25, 0.25, update_codebooks=True)
    for step in range(steps):
        layer(*case(seed=step))
    return layer


@pytest.mark.parametrize("option", [{"ema_assign": "top1"}, {"ema_normalize": True}, {"ema_mode": "count"},
                                    {"ema_decay": 0.5}])  # fmt: skip
def test_ema_options_reach_both_codebooks(option):
    plain, other = run_updates(), run_updates(**option)
    for name in ("item_router", "window_router"):
        assert not torch.allclose(getattr(plain, name).codebook.codes, getattr(other, name).codebook.codes)


def test_revive_dead_moves_a_code_that_no_token_chooses():
    for revive in (0, 2):
        layer = build(n_item_experts=9, revive_dead=revive)
        layer.set_fusion(0.25, 0.25, update_codebooks=True)
        before = layer.item_router.codebook.codes.clone()
        for step in range(2):
            layer(*case([3, 2], seed=0))
            if step == 0:
                idle = layer.item_router.codebook.idle_updates == 1
                assert bool(idle.any())
        moved = (layer.item_router.codebook.codes != before).any(1)
        assert bool(moved[idle].all()) == bool(revive)
        assert bool(moved[idle].any()) == bool(revive)


def test_a_learned_codebook_is_trained_by_gradient_and_not_by_ema():
    layer = build(codebook="learned", topk_item=2, topk_window=2)
    layer.set_fusion(0.25, 0.25, update_codebooks=True)
    before = layer.item_router.codebook.codes.detach().clone()
    query, sequence = case()
    layer(query, sequence).square().sum().backward()
    assert torch.equal(layer.item_router.codebook.codes, before)
    for router in (layer.item_router, layer.window_router):
        assert float(router.codebook.codes.grad.abs().sum()) > 0


# ---- which rows have which branch


def test_an_empty_history_gets_the_global_answer_or_zeros():
    query, sequence = case()
    empty = LENGTHS.index(0)
    layer = build(topk_item=2)
    whole = layer.global_expert(query, sequence)[empty]
    assert torch.equal(layer(query, sequence)[empty], whole)
    layer.global_expert.register_forward_hook(lambda module, args, output: output + 7.0)
    assert torch.equal(layer(query, sequence)[empty], whole + 7.0)
    zeros = build(topk_item=2, empty_history="zeros")
    zeros.global_expert.register_forward_hook(lambda module, args, output: output + 7.0)
    output = zeros(query, sequence)
    assert torch.equal(output[empty], torch.zeros_like(output[empty]))
    assert bool((output[[0, 1, 3, 4, 5]] != 0).all())


@pytest.mark.parametrize("alphas", [(0.25, 0.25), (0.5, 0.5), (1.0, 0.0)])
def test_batches_without_any_item_get_the_global_answer(alphas):
    layer = build(alpha_item=alphas[0], alpha_window=alphas[1])
    layer.global_expert.register_forward_hook(lambda module, args, output: output + 7.0)
    layer.set_fusion(*alphas, update_codebooks=True)
    codes = layer.item_router.codebook.codes.clone()
    query = torch.randn(3, DIM, dtype=torch.double)
    for columns in (0, 4):
        nothing = Sequence.from_vectors(
            torch.randn(3, columns, DIM, dtype=torch.double), torch.zeros(3, columns, dtype=torch.bool)
        )
        torch.testing.assert_close(layer(query, nothing), layer.global_expert(query, nothing), **EXACT)
    assert torch.equal(layer.item_router.codebook.codes, codes)
    assert layer(query[:0], nothing.select(torch.tensor([], dtype=torch.long))).shape == (0, 2 * DIM)


def test_a_history_of_one_item_is_read_by_its_own_experts_alone():
    layer = build(alpha_item=1.0, alpha_window=0.0)
    query, sequence = case([1, 1, 1])
    for row, item in enumerate(sequence.vectors[:, 0]):
        theme = int(gate_row(layer.item_router, item).argmax())
        want = block_answer(layer.item_experts.experts[theme], query[row], item.unsqueeze(0))
        torch.testing.assert_close(layer(query, sequence)[row], want, **EXACT)


def test_a_history_shorter_than_a_window_is_one_partial_window_or_has_no_window_branch():
    query, sequence = case([3, 2])
    partial = build(alpha_item=0.0, alpha_window=1.0)
    means = torch.stack([row.mean(0) for row in rows_of(sequence.vectors, sequence.mask)])
    for row, mean in enumerate(means):
        theme = int(gate_row(partial.window_router, mean).argmax())
        want = block_answer(partial.window_experts.experts[theme], query[row], mean.unsqueeze(0))
        torch.testing.assert_close(partial(query, sequence)[row], want, **EXACT)
    for option in ({"short_history": "skip"}, {"window_align": "left"}):
        layer = build(alpha_item=0.0, alpha_window=1.0, **option)
        torch.testing.assert_close(layer(query, sequence), layer.global_expert(query, sequence), **EXACT)


def test_interior_padding_is_read_after_right_alignment():
    query, sequence = case([6, 3, 0], padding=2)
    keep = torch.rand(sequence.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    gappy = Sequence(sequence.items, sequence.index, sequence.mask & keep)
    layer = build(topk_item=2)
    expected = mos(layer, query, gappy.vectors, gappy.mask)
    torch.testing.assert_close(layer(query, gappy.right_aligned()), expected, **EXACT)


# ---- padding, order, batch mates


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    padding=st.integers(1, 7),
    topk=st.integers(1, 3),
    align=st.sampled_from(["right", "left"]),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, topk, align, seed):
    layer = build(seed=seed, topk_item=topk, topk_window=topk, window_align=align)
    query, plain = case(lengths, seed)
    columns = torch.zeros(len(lengths), padding, dtype=torch.long)
    padded = Sequence(plain.items, torch.cat([columns, plain.index], 1), torch.cat([columns.bool(), plain.mask], 1))
    output = layer(query, plain)
    torch.testing.assert_close(layer(query, padded), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([layer(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)


# ---- what single options change


def output_of(**options: Any) -> torch.Tensor:
    return build(**{"topk_item": 2, "topk_window": 2, **options})(*case())


@pytest.mark.parametrize(
    "option",
    [
        {"router_temperature": 0.1},
        {"gate_norm": "softmax_then_mask"},
        {"gate_source": "target"},
        {"window_align": "left"},
        {"window_divide_by": "size"},
        {"short_history": "skip"},
        {"topk_item": 1},
        {"window_size": 3},
        {"window_stride": 3},
        {"alpha_item": 0.5},
    ],
    ids=lambda option: ",".join(f"{key}={value}" for key, value in option.items()),
)
def test_the_option_changes_the_answer(option):
    """With `test_every_option_equals_the_dense_form`: it has an effect, and the right one."""
    assert not torch.allclose(output_of(**option), output_of())


def test_a_low_temperature_leaves_the_weight_to_the_best_theme():
    best, cold = build(topk_item=1), build(topk_item=3, router_temperature=1e-3)
    _, sequence = case([6, 4, 5])
    routing = cold.item_router(sequence)
    torch.testing.assert_close(routing.gates[:, 0], torch.ones(3, dtype=torch.double), rtol=0, atol=1e-6)
    assert torch.equal(routing.chosen[:, :1], best.item_router(sequence).chosen)


def test_a_shared_router_is_one_h_with_two_codebooks():
    shared, separate = build(shared_router=True), build()
    assert shared.item_router.h is shared.window_router.h
    assert shared.item_router.codebook is not shared.window_router.codebook
    assert separate.item_router.h is not separate.window_router.h
    h = sum(p.numel() for p in separate.window_router.h.parameters())
    counts = [sum(p.numel() for p in layer.parameters()) for layer in (separate, shared)]
    assert counts[0] - counts[1] == h
    alone = build(shared_router=True, n_item_experts=0)
    assert alone.window_router.h is not None


def test_the_router_sees_the_target_when_asked_to():
    query, sequence = case([9, 9])
    item, both = build(), build(router_input="item_target")
    assert both.item_router.h[0].in_features == 2 * DIM and item.item_router.h[0].in_features == DIM

    def route(layer: MoS, targets: torch.Tensor) -> torch.Tensor:
        return layer.item_router(layer.router_inputs(targets, sequence)).experts

    torch.manual_seed(0)
    others = [torch.randn(2, DIM, dtype=torch.double) * 3 for _ in range(5)]
    assert all(torch.equal(route(item, q), route(item, query)) for q in others)
    assert any(not torch.equal(route(both, q), route(both, query)) for q in others)
    inputs = both.router_inputs(query, sequence)
    want = router_inputs(both, query[0], branch_tokens(both, sequence.vectors[0], "item"))
    assert torch.equal(inputs.vectors[0], want)


def test_a_router_of_one_linear_map():
    assert isinstance(build(router_linear=True).item_router.h, nn.Linear)
    assert build(router_hidden=7).window_router.h[0].out_features == 7


@pytest.mark.parametrize("branch", ["item", "window"])
def test_a_branch_without_experts_is_absent_and_leaves_its_weight_to_the_other(branch):
    other = "window" if branch == "item" else "item"
    layer = build(**{f"n_{branch}_experts": 0, f"topk_{branch}": 1})
    assert getattr(layer, f"{branch}_experts") is None and getattr(layer, f"{branch}_router") is None
    assert not any(name.startswith(branch) for name in layer.state_dict())
    assert (getattr(layer, f"alpha_{branch}"), getattr(layer, f"alpha_{other}")) == (0.0, 0.25)
    layer.set_fusion(0.5, 0.5)
    assert (getattr(layer, f"alpha_{branch}"), getattr(layer, f"alpha_{other}")) == (0.0, 1.0)


def test_commitment_and_alignment_add_their_weighted_losses_in_training_only():
    query, sequence = case()
    for option, count in (({}, 0), ({"commitment_weight": 0.5}, 2), ({"align_weight": 0.5}, 2)):
        layer = build(topk_item=2, **option)
        losses: list[torch.Tensor] = []
        output = layer(query, sequence, losses)
        assert len(losses) == count
        assert torch.equal(output, layer(query, sequence))  # the list does not change the answer
        layer.eval()(query, sequence, losses)
        assert len(losses) == count


def test_the_commitment_loss_trains_h_alone_with_one_theme():
    layer = build(commitment_weight=0.5)
    query, sequence = case()
    losses: list[torch.Tensor] = []
    layer(query, sequence, losses)
    torch.testing.assert_close(losses[0], 0.5 * layer.item_router.commitment(sequence), **EXACT)
    torch.testing.assert_close(losses[1], 0.5 * layer.window_router.commitment(layer.window_tokens(sequence)), **EXACT)
    sum(losses).backward()
    trained = {name.split(".")[0] for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"item_router", "window_router"}


def test_the_alignment_loss_pulls_experts_towards_the_fixed_global_answer():
    layer = build(align_weight=0.5)
    query, sequence = case([6, 4])
    losses: list[torch.Tensor] = []
    layer(query, sequence, losses)
    layer.set_fusion(1.0, 0.0)
    item = layer(query, sequence)
    layer.set_fusion(0.0, 0.0)
    goal = layer(query, sequence).detach()
    torch.testing.assert_close(losses[0], 0.5 * (item - goal).square().mean(), **EXACT)
    sum(losses).backward()
    assert all(p.grad is None for p in layer.global_expert.parameters())
    assert any(p.grad is not None for p in layer.item_experts.parameters())


# ---- state and bad input


def test_a_checkpoint_carries_the_weights_in_force():
    layer = build()
    layer.set_fusion(0.5, 0.5)
    other = build(seed=9)
    other.load_state_dict(layer.state_dict())
    assert (other.alpha_item, other.alpha_window) == (0.5, 0.5)
    query, sequence = case()
    assert torch.equal(other(query, sequence), layer(query, sequence))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha_item": 0.7, "alpha_window": 0.5}, r"alpha_item \(0.7\) and alpha_window \(0.5\)"),
        ({"alpha_item": -0.1}, "must be >= 0"),
        ({"topk_item": 4}, r"topk_item \(4\) must lie in 1..n_item_experts \(3\)"),
        ({"topk_window": 0}, r"topk_window \(0\)"),
        ({"ema_decay": 1.5}, r"ema_decay \(1.5\)"),
        ({"window_size": 0}, r"window_size \(0\)"),
        ({"window_stride": 0}, r"window_stride \(0\)"),
        ({"router_temperature": 0.0}, r"router_temperature \(0.0\)"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
