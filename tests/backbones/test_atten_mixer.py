"""The Atten-Mixer block against loops over rows, levels and heads, and against the released code's memory views."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged, rows_of
from torch import Tensor, nn

from model_zoo.backbones.atten_mixer import AttenMixerBlock
from model_zoo.layers.sequence import Sequence

# float64 sums of at most a few dozen terms of order one, taken in another order, through a few norms
EXACT = {"rtol": 1e-9, "atol": 1e-10}
DIM = 8
LENGTHS = [12, 1, 0, 4, 7, 3]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum(-1, keepdim=True).sqrt()


def atten_mixer(block: AttenMixerBlock, tokens: Tensor) -> Tensor:
    """One row's s: tokens ``[t, d]``, oldest first."""
    if len(tokens) == 0:
        return tokens.new_zeros(DIM)
    items = [unit(token) for token in tokens]
    newest = [items[-1 - back] if back < len(items) else torch.zeros_like(items[0]) for back in range(block.last_k)]
    queries = []
    for level, linear in enumerate(block.levels, 1):
        queries.append(block.W_q(unit(linear(torch.cat(newest[:level])))))
    mixed = []
    for feature in range(0, DIM, DIM // block.num_heads):
        head = slice(feature, feature + DIM // block.num_heads)
        pool = torch.zeros(len(items), dtype=tokens.dtype)
        for query in queries:
            scores = torch.stack([torch.sigmoid(query[head] @ block.W_k(item)[head]) for item in items])
            pool = pool + (2 * scores).softmax(0) ** block.lp_pool
        weight = (2 * pool ** (1 / block.lp_pool)).softmax(0)
        mixed.append(sum(w * block.W_v(item)[head] for w, item in zip(weight, items, strict=True)))
    return unit(block.session(torch.cat([block.norm(torch.cat(mixed)), items[-1]])))


def released(block: AttenMixerBlock, tokens: Tensor, columns: int) -> Tensor:
    """One row's s as the release computes it in a batch of ``columns`` columns, padding after the session."""
    if len(tokens) == 0:
        return tokens.new_zeros(DIM)
    heads, width = block.num_heads, DIM // block.num_heads
    hidden = torch.cat([unit(tokens), tokens.new_zeros(columns - len(tokens), DIM)]).unsqueeze(0)  # [1, L, d]
    last = len(tokens) - 1
    places = [max(last - back, -1) for back in range(block.last_k)]  # -1 is a column of padding
    levels = torch.stack([linear(hidden[0, places[:i]].flatten()) for i, linear in enumerate(block.levels, 1)])
    levels = (levels / levels.norm(dim=0)).unsqueeze(0)
    query = block.W_q(levels).view(-1, block.last_k, width)
    key, value = block.W_k(hidden).view(-1, columns, width), block.W_v(hidden)
    alpha = torch.sigmoid(query @ key.transpose(1, 2)).view(1, block.last_k * heads, columns).transpose(1, 2)
    pooled = nn.LPPool1d(block.lp_pool, block.last_k, stride=block.last_k)((2 * alpha).softmax(1))[0]  # [L, heads]
    weight = (2 * pooled[: len(tokens)]).softmax(0)
    mixed = (weight.unsqueeze(2) * value[0, : len(tokens)].view(-1, heads, width)).sum(0).flatten()
    return unit(block.session(torch.cat([block.norm(mixed), hidden[0, last]])))


def build(**options: Any) -> AttenMixerBlock:
    torch.manual_seed(2)
    block = AttenMixerBlock(DIM, **{"num_heads": 2, "last_k": 4, **options}).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)  # attention far from even
    return block


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0) -> tuple[Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding)


def pad(sequence: Sequence, columns: int) -> Sequence:
    """``columns`` more of padding before, pointing at a real item's row."""
    index = torch.zeros(len(sequence.index), columns, dtype=torch.long)
    return Sequence(sequence.items, torch.cat([index, sequence.index], 1), torch.cat([index.bool(), sequence.mask], 1))


def by_row(block: AttenMixerBlock, query: Tensor, sequence: Sequence) -> Tensor:
    rows = rows_of(sequence.vectors, sequence.mask)
    if block.legacy_view:
        sessions = torch.stack([released(block, tokens, sequence.index.shape[1] + 1) for tokens in rows])
    else:
        sessions = torch.stack([atten_mixer(block, tokens) for tokens in rows])
    if block.head == "dnn":
        return sessions
    cosines = [session @ unit(target) for session, target in zip(sessions, query, strict=True)]
    return block.score_scale * torch.stack(cosines).unsqueeze(1)


def assert_same(block: nn.Module, query, sequence, expected) -> None:
    """Output and the gradients of every parameter, of the items and of the targets."""
    output = block(query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("last_k, lp_pool", [(1, 4), (4, 1), (4, 4), (7, 2)])
@pytest.mark.parametrize("legacy_view", [False, True])
def test_the_block_equals_a_loop_over_rows(heads, last_k, lp_pool, legacy_view):
    block = build(num_heads=heads, last_k=last_k, lp_pool=lp_pool, legacy_view=legacy_view)
    query, sequence = case(padding=2)
    assert_same(block, query, sequence, by_row(block, query, sequence))


@pytest.mark.parametrize("legacy_view", [False, True])
def test_the_dot_head_scores_by_scaled_cosine(legacy_view):
    block = build(head="dot", score_scale=9.0, legacy_view=legacy_view)
    query, sequence = case()
    assert block.out_dim == 1 and block(query, sequence).shape == (6, 1)
    assert bool((block(query, sequence).abs() <= 9).all())
    assert_same(block, query, sequence, by_row(block, query, sequence))
    torch.testing.assert_close(block(3 * query, sequence), block(query, sequence), **EXACT)


def test_the_session_vector_has_unit_length_and_does_not_see_the_target():
    block = build()
    query, sequence = case()
    output = block(query, sequence)
    assert block.out_dim == DIM and output.shape == (6, DIM)
    filled = torch.tensor(LENGTHS) > 0
    torch.testing.assert_close(output.norm(dim=1), filled.double(), **EXACT)
    assert torch.equal(block(query + 1, sequence), output)


@pytest.mark.parametrize("legacy_view", [False, True])
@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_empty_histories_give_exact_zeros_and_no_gradient(legacy_view, head):
    block = build(legacy_view=legacy_view, head=head)
    query, sequence = case()
    output = block(query, sequence)
    assert not output[2].any()
    assert not any(grad.any() for grad in gradients(output[2], [sequence.items, *block.parameters()]))
    none = Sequence.from_vectors(torch.zeros(6, 0, DIM, dtype=torch.double), torch.zeros(6, 0))
    assert torch.equal(block(query, none), torch.zeros(6, block.out_dim, dtype=torch.double))
    assert block(query[:0], ragged([], DIM)).shape == (0, block.out_dim)


@pytest.mark.parametrize("legacy_view", [False, True])
def test_a_session_of_one_item_attends_to_that_item(legacy_view):
    block = build(legacy_view=legacy_view)
    query, sequence = case([1, 9], padding=3)
    item = unit(sequence.vectors[0, -1])
    want = unit(block.session(torch.cat([block.norm(block.W_v(item)), item])))
    torch.testing.assert_close(block(query, sequence)[0], want, **EXACT)


def test_items_older_than_the_k_newest_have_no_part_in_the_level_queries():
    block = build(last_k=3)
    heard: list[Tensor] = []
    for linear in block.levels:
        linear.register_forward_hook(lambda module, inputs, output: heard.append(output))
    vectors = torch.randn(1, 6, DIM, dtype=torch.double, requires_grad=True)
    block(torch.randn(1, DIM, dtype=torch.double), Sequence.from_vectors(vectors, torch.ones(1, 6)))
    for level, output in enumerate(heard, 1):
        (grad,) = gradients(output, [vectors])
        assert grad[0].abs().sum(1).nonzero().flatten().tolist() == list(range(6 - level, 6))


def test_pooling_groups_the_levels_of_one_head_and_the_view_mixes_heads():
    """What head 0 mixes depends on head 0's rows of the query and key projections alone, but for ``legacy_view``."""
    mixed: list[Tensor] = []
    for legacy_view in (False, True):
        block = build(legacy_view=legacy_view)
        block.norm.register_forward_pre_hook(lambda module, inputs: mixed.append(inputs[0]))
        query, sequence = case()
        block(query, sequence)
        grads = gradients(mixed[-1][:, : DIM // 2], [block.W_q.weight, block.W_k.weight])
        other = [bool(grad[DIM // 2 :].any()) for grad in grads]
        assert other == [legacy_view, legacy_view]
        assert all(bool(grad[: DIM // 2].any()) for grad in grads)
        assert all(bool(gradients(mixed[-1], [linear.weight])[0].any()) for linear in block.levels)


def test_the_default_and_the_view_differ_on_the_same_parameters():
    query, sequence = case([5, 3])
    plain, view = build(), build(legacy_view=True)
    assert not torch.allclose(plain(query, sequence), view(query, sequence))
    # with one head a view is a transpose: what is left is the norm over levels and padding in the first softmax
    plain, view = build(num_heads=1, last_k=1), build(num_heads=1, last_k=1, legacy_view=True)
    assert not torch.allclose(plain(query, sequence), view(query, sequence))


def test_the_view_is_not_padding_invariant():
    block = build(legacy_view=True)
    query, sequence = case([5, 3])
    assert not torch.allclose(block(query, pad(sequence, 2)), block(query, sequence), atol=1e-4)
    plain = build()
    torch.testing.assert_close(plain(query, pad(sequence, 2)), plain(query, sequence), **EXACT)


def test_every_parameter_starts_uniform_within_one_over_root_d_also_after_fuxictrs_reset():
    torch.manual_seed(3)
    block = AttenMixerBlock(64)
    assert block.norm.eps == 1e-8
    for _ in range(2):
        for name, parameter in block.named_parameters():
            assert 0.5 / 8 < parameter.abs().max() <= 1 / 8, name
            assert parameter.mean().abs() < 4 / 8 / (3 * parameter.numel()) ** 0.5, name  # four standard errors
        for module in block.modules():
            if type(module) is nn.Linear:
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
        block.init_weights()


@pytest.mark.parametrize("legacy_view", [False, True])
def test_dropout_acts_in_training_only_and_draws_for_each_position(legacy_view):
    query, sequence = case([5, 4])
    twice = Sequence(sequence.items, sequence.index[[0, 0]], sequence.mask[[0, 0]])
    by_position = Sequence.from_vectors(twice.vectors, twice.mask)
    for rates in ({"input_dropout": 0.4, "attention_dropout": 0.0}, {"input_dropout": 0.0, "attention_dropout": 0.4}):
        block = build(legacy_view=legacy_view, **rates)
        assert torch.equal(block(query, twice), block(query, twice))
        block.train()
        torch.manual_seed(1)
        first = block(query, twice)
        assert bool(first.isfinite().all()) and not torch.allclose(first[0], first[1])
        assert all(bool(grad.isfinite().all()) for grad in gradients(first, [sequence.items, *block.parameters()]))
        torch.manual_seed(1)
        torch.testing.assert_close(block(query, by_position), first, **EXACT)
    block = build(legacy_view=legacy_view, input_dropout=0.0, attention_dropout=0.0).train()
    torch.testing.assert_close(block(query, twice), block.eval()(query, twice), **EXACT)


@pytest.mark.parametrize("legacy_view", [False, True])
def test_dropped_features_are_as_if_zero_before_normalisation(legacy_view):
    block = build(legacy_view=legacy_view, input_dropout=0.3, attention_dropout=0.0).train()
    query, sequence = case([5, 0, 4])
    torch.manual_seed(1)
    output = block(query, sequence)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones_like(sequence.vectors), 0.3)
    dropped = Sequence.from_vectors(sequence.vectors * kept, sequence.mask)
    torch.testing.assert_close(output, by_row(block, query, dropped), **EXACT)


def test_the_targets_features_are_dropped_after_normalisation():
    """As in the release: the cosine's length is not restored."""
    block = build(head="dot", input_dropout=0.3, attention_dropout=0.0).train()
    query, sequence = case([5, 4])
    torch.manual_seed(1)
    output = block(query, sequence)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones_like(sequence.vectors), 0.3)
    kept_target = nn.functional.dropout(torch.ones_like(query), 0.3)
    dropped = Sequence.from_vectors(sequence.vectors * kept, sequence.mask)
    sessions = torch.stack([atten_mixer(block, tokens) for tokens in rows_of(dropped.vectors, dropped.mask)])
    torch.testing.assert_close(output[:, 0], 16 * (sessions * unit(query) * kept_target).sum(1), **EXACT)


def test_float32_works_and_large_or_tiny_items_are_only_directions():
    block = AttenMixerBlock(DIM, num_heads=2)
    sequence = ragged(LENGTHS, DIM, dtype=torch.float)
    query = torch.randn(6, DIM)
    output = block.eval()(query, sequence)
    assert output.dtype == torch.float
    for scale in (1e-4, 1e4):
        scaled = Sequence(scale * sequence.items, sequence.index, sequence.mask)
        torch.testing.assert_close(block(query, scaled), output, rtol=1e-4, atol=1e-5)
        assert all(bool(g.isfinite().all()) for g in gradients(block(query, scaled), [sequence.items]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, r"num_heads \(3\) must divide the width of an item vector \(8\)"),
        ({"num_heads": 0}, "num_heads must be at least 1, not 0"),
        ({"last_k": 0}, "last_k must be at least 1, not 0"),
        ({"lp_pool": 0}, "lp_pool must be at least 1, not 0"),
        ({"input_dropout": 1.0}, "input_dropout must be at least 0 and below 1, not 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be at least 0 and below 1, not -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(1, 6),
    head=st.sampled_from(["dnn", "dot"]),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, head, seed):
    block = build(head=head)
    query, plain = case(lengths, seed)
    output = block(query, plain)
    torch.testing.assert_close(block(query, pad(plain, padding)), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
