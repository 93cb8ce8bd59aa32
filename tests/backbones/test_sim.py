"""SIM's block and head: search and branches against their literal forms, the loss of the search, LongCTR's quirks."""

from typing import Any

import numpy as np
import pytest
import retrieval_cases as shared
import torch
from golden_files import RELATIVE, Golden, close, small_model, tiny_dataset, tiny_loader
from hypothesis import strategies as st
from oracles import gradients
from retrieval_cases import DIM, EXACT, LENGTHS, assert_same, case, one_item_a_position, prepared
from torch import nn

from model_zoo.backbones.sim import SIMBlock
from model_zoo.layers.heads import HeadInputs, HeadShape
from model_zoo.layers.sim_head import SIMHead


def build(**options) -> SIMBlock:
    return prepared(SIMBlock(DIM, **{"attention_dim": 12, "num_heads": 2, "short_seq_len": 5, "topk": 3, **options}))


def literal(block: SIMBlock, query, sequence):
    def row(target, tokens):
        scores = block.W_b(tokens) @ block.W_a(target)
        best = scores.detach().argsort(descending=True)[: block.topk]
        short = shared.attend(block.short_attention, target, shared.newest(block, tokens))
        return torch.cat([short, shared.attend(block.long_attention, target, tokens[best]), scores @ tokens])

    return shared.by_row(row, query, sequence)


def longctr(block: SIMBlock, query, vectors, mask):
    """LongCTR's forward: padding scores 0 in the search."""
    scores = torch.einsum("ba,bta->bt", block.W_a(query), block.W_b(vectors)) * mask
    kept = scores.topk(min(block.topk, mask.shape[1]), dim=1).indices
    rows = zip(query, vectors, mask, kept)
    long = torch.stack([shared.attend(block.long_attention, q, v[k], m[k]) for q, v, m, k in rows])
    pooled = torch.einsum("bt,btd->bd", scores, vectors)
    return torch.cat([shared.longctr_short(block, query, vectors, mask), long, pooled], -1)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("topk, short_seq_len", [(3, 5), (1, 2), (50, 50)])
def test_the_block_equals_a_loop_over_rows(heads, topk, short_seq_len):
    block = build(num_heads=heads, topk=topk, short_seq_len=short_seq_len)
    query, sequence = case(padding=2)
    leaves = [query, sequence.items, *block.parameters()]
    assert_same(block(query, sequence), literal(block, query, sequence), leaves)


def test_the_answer_is_short_then_long_then_pooled_of_three_times_the_item_width():
    block = build(topk=12)
    query, sequence = case()
    output = block(query, sequence)
    assert block.out_dim == 3 * DIM and output.shape == (len(LENGTHS), 3 * DIM)
    torch.testing.assert_close(output[:, :DIM], block.short_attention(query, sequence.last(4)), **EXACT)
    # topk of the history or more: nothing is searched
    torch.testing.assert_close(output[:, DIM : 2 * DIM], block.long_attention(query, sequence), **EXACT)


def test_the_search_learns_through_the_pooled_part_alone():
    block = build()
    query, sequence = case()
    output = block(query, sequence)
    search = [block.W_a.weight, block.W_b.weight]
    assert not any(g.any() for g in gradients(output[:, : 2 * DIM], search))
    assert all(g.any() for g in gradients(output[:, 2 * DIM :], search))


# ---- LongCTR's quirks


@pytest.mark.parametrize("topk", [2, 3, 20])
def test_longctr_compat_is_longctrs_forward(topk):
    """Rows: full, padding inside the window, fewer items than topk, none."""
    block = build(longctr_compat=True, topk=topk)
    query, sequence = case([8, 7, 3, 1, 0])
    query, sequence = one_item_a_position(query, sequence.vectors, sequence.mask)
    # which of equally scored padding columns is kept does not show: all hold one vector, as LongCTR's do
    with torch.no_grad():
        sequence.items[~sequence.mask.flatten()] = torch.ones(DIM).double()
    expected = longctr(block, query, sequence.vectors, sequence.mask)
    assert_same(block(query, sequence), expected, [query, sequence.items, *block.parameters()])


def test_padding_displaces_real_items_of_negative_score_in_longctr_alone():
    """Three items, two of them scored below zero, behind padding: LongCTR attends to one of the three."""
    for compat in (True, False):
        block = build(longctr_compat=compat, topk=3)
        with torch.no_grad():
            block.W_a.weight.copy_(torch.eye(12, DIM))
            block.W_b.weight.copy_(torch.eye(12, DIM))
        query, vectors = torch.randn(1, DIM).double(), torch.randn(1, 9, DIM).double()
        signs = (vectors[0] @ query[0]).sign() * torch.tensor([1, 1, 1, 1, 1, 1, -1, 1, -1])
        mask = torch.arange(9).unsqueeze(0) >= 6
        query, sequence = one_item_a_position(query, vectors * signs[:, None], mask)
        (grad,) = gradients(block(query, sequence)[:, DIM : 2 * DIM], [sequence.items])
        assert grad.any(1).nonzero().flatten().tolist() == ([7] if compat else [6, 7, 8])


def test_longctr_compat_refuses_batches_that_longctr_cannot_run_and_the_default_reads_them():
    shared.check_refuses_short_batches(build, literal)


def test_the_padding_vector_reaches_longctrs_branches_and_not_the_default():
    shared.check_padding_reaches_longctrs_short_branch(build, slice(DIM))


# ---- short and empty histories, settings


def test_empty_histories_give_exact_zeros():
    shared.check_empty(build(), 3 * DIM)


def test_single_precision_is_finite():
    shared.check_single_precision(build())


@shared.refused(({"gsu_type": "hard"}, "gsu_type must be soft, not hard"), ({"topk": 0}, "topk must be at least 1, not 0"))
def test_settings_out_of_range_are_refused(options, message):
    shared.check_refused(build, options, message)


@shared.any_histories(topk=st.sampled_from([1, 3, 50]))
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, seed, **options):
    shared.check_padding_order_and_mates(build(**options), lengths, padding, seed)


# ---- the head


def head(**options) -> SIMHead:
    shape: dict[str, Any] = {"context_dim": 5, "item_dim": 4, "interest_dim": 12, "feature_map": None, "embedding_dim": 4}
    shape |= {"output_activation": nn.Sigmoid(), "longctr_compat": options.pop("longctr_compat", False)}
    torch.manual_seed(0)
    return SIMHead(HeadShape(**shape), **{"dnn_hidden_units": [6], **options}).double()


def head_inputs(batch=7, context=True):
    context, target, interest = (torch.randn(batch, n, dtype=torch.double) for n in (5, 4, 12))
    return HeadInputs(context, target, interest, {})


def bce(logits, label):
    p = logits.sigmoid()
    return -(label * p.log() + (1 - label) * (1 - p).log()).mean()


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.3, 1.0), (0.5, 2.5), (0.0, 0.0)])
def test_the_whole_loss_is_alpha_times_the_searchs_and_beta_times_the_predictions(alpha, beta):
    layer, inputs = head(alpha=alpha, beta=beta), head_inputs()
    logits = layer(inputs)
    label = torch.tensor([[1.0], [0.0], [0.0], [1.0], [1.0], [0.0], [1.0]])
    main = layer.dnn(torch.cat([inputs.context, inputs.target, inputs.interest[:, :8]], 1))
    searched = layer.dnn_aux(torch.cat([inputs.context, inputs.target, inputs.interest[:, 8:]], 1))
    torch.testing.assert_close(logits, main, **EXACT)
    total = bce(logits, label) + sum(term(label) for term in inputs.losses)
    expected = alpha * bce(searched, label) + beta * bce(main, label)
    assert_same(total, expected, list(layer.parameters()))


def test_a_frozen_head_in_evaluation_mode_still_teaches_the_search_and_prediction_costs_no_second_mlp():
    layer, inputs = head(batch_norm=True).eval(), head_inputs()
    layer(inputs)
    assert len(inputs.losses) == 2
    inputs.losses.clear()
    layer.dnn_aux.forward = None  # not called
    with torch.no_grad():
        layer(inputs)
    assert inputs.losses == []


def test_under_longctr_compat_the_search_is_run_but_never_trained():
    layer, inputs = head(batch_norm=True, longctr_compat=True, alpha=3.0, beta=2.0), head_inputs()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer(inputs)
    assert inputs.losses == []
    moved = {name for name, value in layer.named_buffers() if not torch.equal(value, before[name])}
    assert any(name.startswith("dnn_aux") for name in moved) and any(name.startswith("dnn.") for name in moved)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, not -0.5"):
        head(**{name: -0.5})


def test_an_interest_of_another_block_is_refused():
    shape = HeadShape(0, 4, 8, None, 4, nn.Sigmoid())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"width 3d \(12\), not 8"):
        SIMHead(shape)


# ---- the model


@pytest.mark.parametrize("name", ["SIM_1", "SIM_2"])
def test_with_its_loss_called_the_model_has_longctrs_loss_and_gradients_of_later_versions(name):
    """FuxiCTR 2.3.4 calls LongCTR's loss of both stages; under 2.3.2, behind the recorded runs, the search never learns."""
    record = Golden(name)
    model = record.training(record.model())
    batch = record.inputs()
    label = model.get_labels(batch)
    model.compute_loss(model(batch), label).backward()
    norm = record.hparams["net_regularizer"]
    assert norm or not model.block.W_a.weight.grad.any()
    model.zero_grad(set_to_none=True)
    model.head.longctr_compat = False
    record.training(model)
    total = model.compute_loss(model(batch), label)
    close(total.detach(), record.tensor("loss_total_with_add_loss"), "loss_total_with_add_loss")
    total.backward()
    wanted = model.from_longctr(record.group("gradnorm_with_add_loss"))
    for parameter, value in wanted.items():
        found = dict(model.named_parameters())[parameter].grad.norm()
        # a bias before BatchNorm has rounding for a gradient, of 1e-7 or less
        assert float((found - value).abs()) <= RELATIVE * float(value) + 1e-7, parameter


@pytest.mark.parametrize("name", ["SIM_1", "SIM_2"])
@pytest.mark.parametrize("training", [False, True])
def test_the_searchs_own_prediction_is_longctrs(name, training):
    record = Golden(name)
    model = record.training(record.model()) if training else record.evaluation(record.model())
    context, target, sequence = model._read(record.inputs())
    pooled = model.block(target, sequence)[:, 2 * target.shape[1] :]
    embedded = model.embedding_layer(context, flatten_emb=True) if context else None
    searched = model.head.dnn_aux(HeadInputs(embedded, target, pooled, {}).joined())
    close(searched.sigmoid().detach(), record.tensor("y_aux_train" if training else "y_aux_eval"), "y_aux")


def test_one_step_moves_the_search_by_default():
    model = small_model("SIM", dataset=tiny_dataset(), batch_norm=False).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model._batch_index, model._max_gradient_norm = 0, 10.0
    model.train_step(tiny_loader().batch(np.arange(8)))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert not still & {"block.W_a.weight", "block.W_b.weight", "head.dnn_aux.mlp.0.weight", "head.dnn.mlp.0.weight"}
