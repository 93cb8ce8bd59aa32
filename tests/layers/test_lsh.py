"""Hash codes against signs compared one by one, and where the rotations come from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ragged

from model_zoo.layers import attend_items
from model_zoo.layers.lsh import LSH, WORD_BITS, _count_ones
from model_zoo.layers.sequence import Sequence

DIM = 5
# hashes and bits a hash that fill part of an integer, exactly one, and several
SHAPES = [(1, 1), (3, 5), (32, 2), (64, 1), (52, 1), (13, 4), (14, 4), (7, 8), (2, 52), (5, 30)]


def build(num_hashes: int, hash_bits: int, **options) -> LSH:
    return LSH((1, DIM, num_hashes, hash_bits), hash_bits, **options).double()


def literal(lsh: LSH, query, sequence, rotations=None):
    """``[B, T, H]`` which hashes agree in every bit, one position at a time; ``rotations [B, d, H, bits]``."""
    batch, length = sequence.index.shape
    found = torch.zeros(batch, length, lsh.num_hashes, dtype=torch.bool)
    for b in range(batch):
        drawn = (lsh.random_rotations[0] if rotations is None else rotations[b]).reshape(DIM, lsh.num_hashes, -1)
        target = torch.einsum("d,dhk->hk", query[b], drawn) > 0
        for t in range(length):
            token = torch.einsum("d,dhk->hk", sequence.vectors[b, t], drawn) > 0
            found[b, t] = (token == target).all(1)
    return found


def case(seed=0, lengths=(6, 0, 3)):
    sequence = ragged(list(lengths), DIM, seed, padding=1)
    query = torch.randn(len(lengths), DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return query, sequence


@pytest.mark.parametrize("num_hashes, hash_bits", SHAPES)
def test_collisions_and_mismatches_equal_comparing_sign_by_sign(num_hashes, hash_bits):
    lsh = build(num_hashes, hash_bits)
    query, sequence = case()
    query[2] = sequence.vectors[2, -1]  # a pair that agrees everywhere
    hashed = lsh.hashed(query, sequence)
    expected = literal(lsh, query, sequence)
    assert torch.equal(lsh.collisions(*hashed), expected.transpose(1, 2))
    assert torch.equal(lsh.mismatches(*hashed), (~expected).sum(2))
    assert bool(expected[2, -1].all()) and bool((~expected).any())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 1000))
def test_any_number_of_hashes_and_bits(num_hashes, hash_bits, seed):
    lsh = build(num_hashes, hash_bits, hash_seed=seed)
    query, sequence = case(seed, (2, 1))
    hashed = lsh.hashed(query, sequence)
    expected = literal(lsh, query, sequence)
    assert torch.equal(lsh.collisions(*hashed), expected.transpose(1, 2))
    assert torch.equal(lsh.mismatches(*hashed), (~expected).sum(2))


@pytest.mark.parametrize("num_hashes, hash_bits", SHAPES)
def test_opposite_vectors_differ_in_every_hash_and_equal_ones_in_none(num_hashes, hash_bits):
    lsh = build(num_hashes, hash_bits)
    vectors = torch.randn(1, 4, DIM, dtype=torch.double)
    vectors[0, 1::2] = -vectors[0, ::2]
    counts = lsh.mismatches(*lsh.hashed(vectors[:, 0], Sequence.from_vectors(vectors, torch.ones(1, 4))))
    assert counts[0, :2].tolist() == [0, num_hashes]


def test_a_product_of_exactly_zero_is_bit_zero():
    lsh = build(3, 2)
    zeros = torch.zeros(2, DIM, dtype=torch.double)
    assert int(lsh.codes(lsh.rotate(zeros, lsh.rotations(2))).abs().max()) == 0


def test_one_bits_are_counted_in_integers_of_every_size():
    generator = torch.Generator().manual_seed(0)
    words = torch.cat([torch.randint(2**bits, (20,), generator=generator) for bits in range(WORD_BITS + 1)])
    words = torch.cat([words, torch.tensor([0, 1, 2**WORD_BITS - 1, 2 ** (WORD_BITS - 1)])])
    expected = [int(word).bit_count() for word in words]
    assert _count_ones(words.clone()).tolist() == expected


def test_hashing_carries_no_gradient():
    lsh = build(4, 2)
    query, sequence = case()
    hashed = lsh.hashed(query.requires_grad_(), sequence)
    for result in (*hashed, lsh.mismatches(*hashed), lsh.collisions(*hashed), lsh.rotate(query, lsh.rotations(3))):
        assert not result.requires_grad
    assert list(lsh.parameters()) == []


@pytest.mark.parametrize("by_row", [False, True])
def test_groups_of_rows_of_any_size_give_the_same(monkeypatch, by_row):
    lsh = build(9, 7, reuse_hash=not by_row, longctr_compat=True)
    query, sequence = case()

    def run():
        torch.manual_seed(0)
        hashed = lsh.hashed(query, sequence)
        return lsh.mismatches(*hashed), lsh.collisions(*hashed)

    expected = run()
    for floats in (1, 20, 60):
        monkeypatch.setattr(attend_items, "GATHERED_FLOATS", floats)
        assert all(torch.equal(got, want) for got, want in zip(run(), expected))


def test_codes_under_autocast_are_the_codes_without_it():
    lsh = LSH((1, 64, 8, 4), 4)
    vectors = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    plain = lsh.codes(lsh.rotate(vectors, lsh.rotations(1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lsh.codes(lsh.rotate(vectors, lsh.rotations(1))), plain)
    rounded = (vectors.bfloat16() @ lsh.rotations(1).bfloat16()).float()
    assert not torch.equal(lsh.codes(rounded), plain)  # 16,000 signs: in half precision some would turn


# ---- the rotations


def test_fixed_rotations_are_a_function_of_the_seed_and_leave_the_global_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = build(4, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(build(4, 3).random_rotations, first.random_rotations)
    assert not torch.equal(build(4, 3, hash_seed=1).random_rotations, first.random_rotations)
    assert list(first.state_dict()) == ["random_rotations"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compat", [False, True])
def test_reused_rotations_are_the_buffer_always(training, compat):
    lsh = build(4, 3, longctr_compat=compat).train(training)
    before = torch.get_rng_state()
    assert torch.equal(lsh.rotations(7), lsh.random_rotations.view(DIM, 12))
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_rotations_are_drawn_in_training_one_for_the_batch_and_never_in_evaluation():
    lsh = build(4, 3, reuse_hash=False)
    for batch in (1, 9):  # the same draw whatever the batch
        torch.manual_seed(5)
        drawn = lsh.rotations(batch)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.randn(1, DIM, 4, 3, dtype=torch.double).view(DIM, 12))
    assert not torch.equal(lsh.rotations(1), drawn)
    lsh.eval()
    before = torch.get_rng_state()
    assert torch.equal(lsh.rotations(9), lsh.random_rotations.view(DIM, 12))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(1, DIM, 4, 3), (1, DIM, 6)])
def test_longctr_draws_for_every_row_in_evaluation_too(training, shape):
    lsh = LSH(shape, shape[-1] if len(shape) == 4 else 1, reuse_hash=False, longctr_compat=True).double().train(training)
    query, sequence = case()
    torch.manual_seed(5)
    hashed = lsh.hashed(query, sequence)
    torch.manual_seed(5)
    drawn = torch.randn(3, *shape[1:], dtype=torch.double)
    assert torch.equal(lsh.collisions(*hashed), literal(lsh, query, sequence, drawn).transpose(1, 2))


@pytest.mark.parametrize("training", [False, True])
def test_longctrs_mirrn_draws_one_for_the_batch_in_evaluation_too(training):
    lsh = LSH((DIM, 6), 1, reuse_hash=False, longctr_compat=True).train(training)
    torch.manual_seed(5)
    drawn = lsh.rotations(9)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(DIM, 6))


@pytest.mark.parametrize("bits", [0, 53])
def test_hashes_of_no_bits_or_too_many_are_refused(bits):
    with pytest.raises(ValueError, match=rf"hash_bits must lie in 1\.\.52, not {bits}"):
        LSH((1, DIM, 2, bits), bits)
