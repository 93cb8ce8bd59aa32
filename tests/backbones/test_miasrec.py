"""The MiaSRec block against a loop over rows and intents; repeats, selection, padding, what the release did."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gradients, ragged
from torch import Tensor, nn

from model_zoo.backbones.miasrec import MiasRecBlock, repeat_counts
from model_zoo.layers.encoder_layer import EncoderLayer
from model_zoo.layers.sequence import Sequence

# float64 through two encoder layers and a division by a temperature of 0.07
EXACT = {"rtol": 1e-8, "atol": 1e-9}
DIM = 6
LENGTHS = [12, 1, 0, 4, 7, 3]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum(-1, keepdim=True).sqrt()


def encode(layer: EncoderLayer, hidden: Tensor, real: list[bool]) -> Tensor:
    """torch's encoder layer on one row ``[n, d]``, reading ``layer``'s own parameters."""
    theirs = nn.TransformerEncoderLayer(
        DIM, layer.self_attn.num_heads, layer.linear1.out_features, 0.0, "gelu", 1e-12, batch_first=True, dtype=torch.double
    ).train()  # in eval torch may take a path of its own, which has no gradients
    padding = ~torch.tensor([real])
    return torch.func.functional_call(
        theirs, dict(layer.named_parameters()), (hidden.unsqueeze(0),), {"src_key_padding_mask": padding}
    )[0]


def entmax_support(scores: list[float], alpha: float) -> list[bool]:
    """Which entries entmax leaves above zero, tau found by halving."""
    scaled = [(alpha - 1) * score for score in scores]
    low, high = max(scaled) - 1, max(scaled)
    for _ in range(100):
        tau = (low + high) / 2
        enough = sum(max(s - tau, 0.0) ** (1 / (alpha - 1)) for s in scaled) >= 1
        low, high = (tau, high) if enough else (low, tau)
    return [s > low for s in scaled]


def miasrec(block: MiasRecBlock, query: Tensor, ids: list[int], vectors: list[Tensor], padding: int = 0) -> Tensor:
    """One row of items, given oldest first and read in the paper's order: their mean, then the newest first."""
    if not ids:
        return query.new_zeros(block.out_dim)
    ids, vectors = ids[::-1], vectors[::-1]
    mean = sum(vectors) / len(vectors)
    tokens = [mean, *vectors, *[torch.zeros_like(mean)] * padding]
    rows = [0, *(1 + (ids.count(item) > 1) for item in ids), *[0] * padding]
    hidden = []
    for age, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        place = min(age, block.position.num_embeddings - 1)
        repeats = block.repeats.weight[row] if row else 0.0
        hidden.append(block.norm(token + block.position.weight[place] + repeats))
    states = torch.stack(hidden)
    real = [True] * (1 + len(ids)) + [False] * padding
    for layer in block.encoder:
        states = encode(layer, states, real)
    intents = []
    for token, state in zip(tokens, states, strict=True):
        gate = torch.sigmoid(block.highway(torch.cat([token, state])))
        intents.append(gate * token + (1 - gate) * state)
    kept = averaged = real
    if block.intent_mode == "paper":
        scores = [block.importance(torch.cat([intents[0], intent])).item() for intent in intents]
        kept = averaged = entmax_support(scores, block.entmax_alpha)
    else:
        kept = [True] * len(intents)
    cosines = [unit(intent) @ unit(query) for intent in intents]
    if block.head == "dot":
        best = max((c for c, keep in zip(cosines, kept, strict=True) if keep), key=Tensor.item)
        over = [c for c, keep in zip(cosines, averaged, strict=True) if keep]
        return ((block.beta * best + (1 - block.beta) * sum(over) / len(over)) / block.temperature).reshape(1)
    chosen = [(c, unit(intent)) for c, intent, keep in zip(cosines, intents, kept, strict=True) if keep]
    weight = torch.stack([c / block.temperature for c, _ in chosen]).softmax(0)
    return sum(w * intent for w, (_, intent) in zip(weight, chosen, strict=True))


def by_row(block: MiasRecBlock, query: Tensor, sequence: Sequence) -> Tensor:
    answers = []
    for target, index, mask in zip(query, sequence.index, sequence.mask, strict=True):
        ids = index[mask].tolist()
        padding = int((~mask).sum()) if block.intent_mode == "released" else 0
        answers.append(miasrec(block, target, ids, [sequence.items[item] for item in ids], padding))
    return torch.stack(answers)


def build(**options: Any) -> MiasRecBlock:
    torch.manual_seed(2)
    block = MiasRecBlock(DIM, **{"inner_dim": 10, "max_positions": 20, **options}).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.6)
    with torch.no_grad():
        block.repeats.weight[0].zero_()
    return block


def case(lengths=LENGTHS, seed: int = 0, padding: int = 0) -> tuple[Tensor, Sequence]:
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.double).requires_grad_()
    return query, ragged(lengths, DIM, seed, padding=padding)


def pad(sequence: Sequence, columns: int) -> Sequence:
    """``columns`` more of padding before, pointing at a real item's row."""
    index = torch.zeros(len(sequence.index), columns, dtype=torch.long)
    return Sequence(sequence.items, torch.cat([index, sequence.index], 1), torch.cat([index.bool(), sequence.mask], 1))


def kept_counts(block: MiasRecBlock, query: Tensor, sequence: Sequence) -> list[int]:
    tokens, real = block._tokens(sequence)
    return block._selected(block._intents(tokens, real, sequence), real)[0].sum(1).tolist()


def assert_same(block: nn.Module, query, sequence, expected) -> None:
    """Output and the gradients of every parameter, of the items and of the targets."""
    output = block(query, sequence)
    torch.testing.assert_close(output, expected, **EXACT)
    leaves = [query, sequence.items, *block.parameters()]
    for got, want in zip(gradients(output, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("head", ["dnn", "dot"])
@pytest.mark.parametrize("intent_mode", ["paper", "released"])
@pytest.mark.parametrize("num_layers, num_heads", [(1, 1), (2, 2)])
def test_the_block_equals_a_loop_over_rows(head, intent_mode, num_layers, num_heads):
    block = build(head=head, intent_mode=intent_mode, num_layers=num_layers, num_heads=num_heads)
    query, sequence = case(padding=2)
    assert_same(block, query, sequence, by_row(block, query, sequence))


@pytest.mark.parametrize("options", [{"entmax_alpha": 1.2}, {"entmax_alpha": 2.0}, {"beta": 0.3, "temperature": 0.5},
                                     {"max_positions": 4}])  # fmt: skip
@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_other_settings_equal_the_loop_too(options, head):
    block = build(head=head, **options)
    query, sequence = case()
    assert_same(block, query, sequence, by_row(block, query, sequence))


def test_importance_adds_up_to_one_and_drops_intents_exactly():
    block = build()
    query, sequence = case()
    tokens, real = block._tokens(sequence)
    importance = block.importance_of(block._intents(tokens, real, sequence), real)
    torch.testing.assert_close(importance.sum(1), (torch.tensor(LENGTHS) > 0).double(), **EXACT)
    assert not importance[~real].any()
    assert bool((importance[real] == 0).any()) and bool((importance[real] > 0).any())
    assert kept_counts(block, query, sequence) == (importance > 0).sum(1).tolist()


def test_a_larger_alpha_keeps_fewer_intents_and_near_1_it_keeps_all():
    query, sequence = case()
    counts = [kept_counts(build(entmax_alpha=alpha), query, sequence) for alpha in (1.01, 1.5, 2.0)]
    assert counts[0] == [length + 1 if length else 0 for length in LENGTHS]
    assert all(a >= b >= c for a, b, c in zip(*counts, strict=True)) and sum(counts[0]) > sum(counts[1]) > sum(counts[2])


def test_dropped_intents_reach_neither_maximum_nor_mean():
    """A dropped intent that points straight at the target changes nothing: cosines are of kept intents only."""
    block = build(head="dot", num_layers=1)
    _, sequence = case([6])
    tokens, real = block._tokens(sequence)
    intents = block._intents(tokens, real, sequence)
    kept, averaged = block._selected(intents, real)
    dropped = intents[~kept & real].detach()
    assert len(dropped) and torch.equal(kept, averaged)
    for target in dropped:
        cosines = unit(intents) @ unit(target)
        want = (0.9 * cosines[kept].max() + 0.1 * cosines[kept].mean()) / 0.07
        torch.testing.assert_close(block(target.unsqueeze(0), sequence)[0, 0], want, **EXACT)


@pytest.mark.parametrize("intent_mode", ["paper", "released"])
def test_importance_gets_no_gradient_because_intents_are_unit_vectors(intent_mode):
    block = build(intent_mode=intent_mode)
    query, sequence = case()
    grads = gradients(block(query, sequence), block.importance.parameters())
    assert not any(grad.any() for grad in grads)


# ---- repeats


def test_repeats_are_counted_per_row_and_clipped_to_two():
    items = torch.randn(5, DIM)
    index = torch.tensor([[0, 0, 1, 2, 1, 1], [0, 0, 0, 3, 4, 0], [2, 2, 2, 2, 2, 2]])
    mask = torch.tensor([[False] * 2 + [True] * 4, [False] * 3 + [True] * 3, [False] * 6])
    want = [[0, 0, 2, 1, 2, 2], [0, 0, 0, 1, 1, 1], [0] * 6]
    assert repeat_counts(Sequence(items, index, mask)).tolist() == want


def test_equal_vectors_are_the_same_item_whatever_their_rows():
    """A batch with a row for each position, as LongCTR's are, counts and answers like one of item indices."""
    block = build()
    query, sequence = case()
    by_position = Sequence.from_vectors(sequence.vectors, sequence.mask)
    assert torch.equal(repeat_counts(by_position), repeat_counts(sequence))
    assert bool((repeat_counts(sequence) == 2).any())
    torch.testing.assert_close(block(query, by_position), block(query, sequence), **EXACT)


def test_the_mean_token_is_no_item():
    """In a session of one item the mean vector equals the item's, yet the item stands there once."""
    query, sequence = case([1])
    assert repeat_counts(sequence).tolist() == [[1]]
    block = build()
    grads = gradients(block(query, sequence), [block.repeats.weight])[0]
    assert grads.abs().sum(1).gt(0).tolist() == [False, True, False]


# ---- positions and padding


def test_items_beyond_the_position_table_share_its_last_row():
    block = build(max_positions=4, head="dot")
    query, sequence = case([6])
    items = torch.randn(6, DIM, dtype=torch.double)

    def answer(order: list[int]) -> Tensor:
        return block(query, Sequence(items, torch.tensor([order]), sequence.mask))

    torch.testing.assert_close(answer([2, 0, 3, 1, 4, 5]), answer([0, 1, 2, 3, 4, 5]), **EXACT)
    assert not torch.allclose(answer([0, 1, 2, 3, 5, 4]), answer([0, 1, 2, 3, 4, 5]))


def test_the_release_is_not_padding_invariant_and_the_paper_is():
    query, sequence = case()
    for mode in ("paper", "released"):
        block = build(intent_mode=mode, head="dot")
        same = torch.allclose(block(query, pad(sequence, 5)), block(query, sequence), atol=1e-6)
        assert same == (mode == "paper")


@pytest.mark.parametrize("intent_mode", ["paper", "released"])
@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_empty_histories_give_exact_zeros_and_no_gradient(intent_mode, head):
    block = build(intent_mode=intent_mode, head=head)
    query, sequence = case()
    output = block(query, sequence)
    assert output.shape == (6, block.out_dim) and block.out_dim == (1 if head == "dot" else DIM)
    assert not output[2].any()
    assert not any(grad.any() for grad in gradients(output[2], [query, sequence.items, *block.parameters()]))
    none = Sequence.from_vectors(torch.zeros(6, 0, DIM, dtype=torch.double), torch.zeros(6, 0))
    output = block(query, none)
    assert torch.equal(output, torch.zeros(6, block.out_dim, dtype=torch.double))
    assert all(bool(grad.isfinite().all()) for grad in gradients(output, [query, *block.parameters()]))
    for padding in (0, 3):
        assert block(query[:0], ragged([], DIM, padding=padding)).shape == (0, block.out_dim)


# ---- start, training, settings


def test_the_start_survives_fuxictrs_reset():
    torch.manual_seed(3)
    block = MiasRecBlock(64, num_layers=1)
    assert all(module.eps == 1e-12 for module in block.modules() if isinstance(module, nn.LayerNorm))
    for _ in range(2):
        for name, parameter in block.named_parameters():
            if "norm" in name:
                assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
            elif parameter.dim() == 1:
                assert not parameter.any(), name
            elif name not in ("repeats.weight", "importance.weight"):
                assert 0.019 < parameter.std() < 0.021, name
        assert block.repeats.weight.any(1).tolist() == [False, True, True]
        for module in block.modules():
            if type(module) is nn.Linear:
                nn.init.xavier_normal_(module.weight)
        block.init_weights()


def test_dropout_acts_in_training_only():
    query, sequence = case()
    for rates in ({"hidden_dropout": 0.3, "attention_dropout": 0.0}, {"hidden_dropout": 0.0, "attention_dropout": 0.3}):
        block = build(**rates)
        settled = block(query, sequence)
        assert torch.equal(block(query, sequence), settled)
        block.train()
        first, second = block(query, sequence), block(query, sequence)
        assert not torch.allclose(first, second) and bool(first.isfinite().all())
    block = build(hidden_dropout=0.0, attention_dropout=0.0)
    torch.testing.assert_close(block.train()(query, sequence), settled, **EXACT)


@pytest.mark.parametrize("place", range(3))
def test_dropout_is_on_item_vectors_encoder_input_and_target(place):
    """What it lets through there decides the answer: here a first feature set to zero in one of the three places."""
    block = build(hidden_dropout=0.0)
    query, sequence = case()
    plain, shapes = block(query, sequence), []

    def silence(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        shapes.append(tuple(output.shape))
        return output * (torch.arange(DIM) > 0) if len(shapes) == place + 1 else output

    block.dropout.register_forward_hook(silence)
    assert not torch.allclose(block(query, sequence), plain)
    assert shapes == [(6, 13, DIM), (6, 13, DIM), (6, DIM)]


@pytest.mark.parametrize("head", ["dnn", "dot"])
def test_float32_with_the_first_values_is_finite_and_differentiable(head):
    block = MiasRecBlock(DIM, head=head)
    sequence = ragged(LENGTHS, DIM, dtype=torch.float)
    tiny = Sequence(1e-4 * sequence.items, sequence.index, sequence.mask)  # FuxiCTR's embeddings at the start
    query = torch.randn(6, DIM)
    for given_sequence in (sequence, tiny):
        output = block(query, given_sequence)
        assert output.dtype == torch.float and bool(output.isfinite().all())
        assert all(bool(g.isfinite().all()) for g in gradients(output, [sequence.items, *block.parameters()]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 4}, r"num_heads \(4\) must divide the width of the tokens \(6\)"),
        ({"num_layers": 0}, "num_layers must be at least 1, not 0"),
        ({"inner_dim": 0}, "inner_dim must be at least 1, not 0"),
        ({"max_positions": 1}, "max_positions must be at least 2, not 1"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must be at least 0 and below 1, not 1.0"),
        ({"attention_dropout": -1.0}, "attention_dropout must be at least 0 and below 1, not -1.0"),
        ({"beta": 1.1}, "beta must be within 0 and 1, not 1.1"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"entmax_alpha": 1.0}, "entmax_alpha must be above 1 and at most 2, not 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    padding=st.integers(1, 6),
    head=st.sampled_from(["dnn", "dot"]),
    alpha=st.sampled_from([1.3, 1.5]),
    seed=st.integers(0, 100),
)
def test_padding_row_order_and_batch_mates_do_not_matter(lengths, padding, head, alpha, seed):
    block = build(head=head, entmax_alpha=alpha)
    query, plain = case(lengths, seed)
    output = block(query, plain)
    torch.testing.assert_close(block(query, pad(plain, padding)), output, **EXACT)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(block(query[order], plain.select(order)), output[order], **EXACT)
    alone = torch.cat([block(query[[b]], plain.select(torch.tensor([b]))) for b in range(len(lengths))])
    torch.testing.assert_close(alone, output, **EXACT)
