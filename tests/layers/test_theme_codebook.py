"""The theme codebook: cosines, the EMA in both forms, across ranks, revival, and its k-means start."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ema_batch_mean, ema_counts

from model_zoo.layers.theme_codebook import EmaMode, ThemeCodebook, _lloyd, cosine_kmeans

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=30)
EMA_MODES: tuple[EmaMode, ...] = ("batch_mean", "count")
# fp32 means of a few dozen vectors of order one, summed in another order
FP32 = {"rtol": 1e-5, "atol": 1e-6}


def codebook(codes: list[list[float]], **options) -> ThemeCodebook:
    book = ThemeCodebook(len(codes), len(codes[0]), **options)
    with torch.no_grad():
        book.codes.copy_(torch.tensor(codes))
    return book


def random_batch(seed: int, tokens: int = 12, themes: int = 4, topk: int = 2, dim: int = 3):
    """Router vectors, distinct themes and occurrence counts (some zero) of distinct tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator)
    chosen = torch.rand(tokens, themes, generator=generator).topk(topk).indices
    weight = torch.randint(4, (tokens,), generator=generator)
    return hidden, chosen, weight


def single_occurrences(hidden, chosen, weight):
    """The batch spelt out, one entry for each occurrence."""
    times = [n for n, count in enumerate(weight.tolist()) for _ in range(count)]
    return hidden[times], [chosen[n].tolist() for n in times]


# ---- cosine


def test_cosines_of_the_worked_example():
    book = codebook([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    got = book.cosine(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.8, -0.6]]), rtol=0, atol=1e-6)  # fp32 rounding


def test_a_zero_vector_has_cosine_zero():
    book = codebook([[2.0, 0.0], [0.0, 0.0]])
    assert torch.equal(book.cosine(torch.zeros(1, 2)), torch.zeros(1, 2))


def test_cosines_keep_full_precision_under_autocast_and_in_double():
    book = ThemeCodebook(5, 8)
    hidden = torch.randn(20, 8)
    expected = book.cosine(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.cosine(hidden), expected)
    assert book.double().cosine(hidden.double()).dtype == torch.double


def test_an_ema_codebook_is_a_buffer_without_gradient():
    book = ThemeCodebook(3, 4)
    hidden = torch.randn(2, 4, requires_grad=True)
    book.cosine(hidden).sum().backward()
    assert not list(book.parameters())
    assert book.codes.grad is None and not book.codes.requires_grad
    assert hidden.grad is not None
    assert {"codes", "cluster_size", "cluster_sum", "idle_updates", "size_is_share"} == set(book.state_dict())


# ---- eq. 4


def test_ema_of_the_worked_example():
    book = codebook([[1.0, 0.0], [7.0, 7.0]], decay=0.9)
    book.ema_update(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), torch.zeros(2, 1, dtype=torch.long), torch.ones(2))
    # fp32 rounding; the second code has no member and keeps its bits
    torch.testing.assert_close(book.codes[0], torch.tensor([1.0, 0.1]), rtol=0, atol=1e-6)
    assert torch.equal(book.codes[1], torch.tensor([7.0, 7.0]))


@EXAMPLES
@given(seed=st.integers(0, 10_000), topk=st.integers(1, 3), decay=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_batch_mean_ema_equals_a_loop_over_occurrences(seed, topk, decay):
    book = ThemeCodebook(4, 3, decay=decay)
    batch = random_batch(seed, topk=topk)
    expected = ema_batch_mean(book.codes, decay, *single_occurrences(*batch))
    book.ema_update(*batch)
    torch.testing.assert_close(book.codes, expected, **FP32)


@EXAMPLES
@given(seed=st.integers(0, 10_000), topk=st.integers(1, 3), decay=st.sampled_from([0.5, 0.9]))
def test_count_ema_equals_a_loop_over_several_batches(seed, topk, decay):
    book = ThemeCodebook(4, 3, decay=decay, ema_mode="count")
    start = book.codes.clone()
    sizes, sums = torch.zeros(4), torch.zeros(4, 3)
    for step in range(3):
        batch = random_batch(seed + step, topk=topk)
        codes, sizes, sums = ema_counts(sizes, sums, decay, *single_occurrences(*batch))
        book.ema_update(*batch)
    torch.testing.assert_close(book.cluster_size, sizes, **FP32)
    torch.testing.assert_close(book.cluster_sum, sums, **FP32)
    torch.testing.assert_close(book.codes, torch.where(codes.isnan(), start, codes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode, share", [("batch_mean", 0.5), ("count", 1 / 101)])
def test_only_the_count_form_weighs_batches_by_their_members(mode, share):
    book = ThemeCodebook(1, 2, decay=0.5, ema_mode=mode)
    theme = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(40):
        book.ema_update(torch.tensor([[1.0, 0.0]]), theme, torch.tensor([100.0]))
    book.ema_update(torch.tensor([[0.0, 1.0]]), theme, torch.tensor([1.0]))
    # mass of the old batches 0.5 * 100, of the new one 0.5 * 1; Laplace smoothing is 1e-5 of either
    assert float(book.codes[0, 1] / book.codes.sum()) == pytest.approx(share, rel=1e-4)


def test_normalised_ema_averages_unit_vectors():
    book = codebook([[1.0, 0.0]], decay=0.0, normalize=True)
    book.ema_update(torch.tensor([[0.0, 100.0], [3.0, 0.0]]), torch.zeros(2, 1, dtype=torch.long), torch.ones(2))
    torch.testing.assert_close(book.codes, torch.tensor([[0.5, 0.5]]))


def test_ema_leaves_no_trace_on_the_router_vectors():
    book = ThemeCodebook(4, 3)
    hidden, chosen, weight = random_batch(0)
    hidden.requires_grad_()
    before = hidden.detach().clone()
    book.ema_update(hidden, chosen, weight)
    assert torch.equal(hidden, before) and not book.codes.requires_grad


def test_a_learned_codebook_has_a_gradient_and_no_ema():
    book = ThemeCodebook(4, 3, learned=True, decay=0.0)
    before = book.codes.detach().clone()
    book.ema_update(*random_batch(0))
    assert torch.equal(book.codes, before)
    book.cosine(torch.randn(2, 3)).sum().backward()
    assert float(book.codes.grad.abs().sum()) > 0


# ---- revival


def test_a_code_idle_for_revive_after_updates_becomes_a_token_of_the_batch():
    for limit in (0, 3):
        book = codebook([[1.0, 0.0], [0.0, 1.0]], revive_after=limit, decay=0.5)
        hidden = torch.tensor([[2.0, 0.5], [9.0, 9.0]])
        weight = torch.tensor([1.0, 0.0])  # the second token does not occur and must not be drawn
        for step in range(1, 5):
            before = book.codes[1].clone()
            book.ema_update(hidden, torch.zeros(2, 1, dtype=torch.long), weight)
            if limit and step == limit:
                assert torch.equal(book.codes[1], hidden[0])
                assert int(book.idle_updates[1]) == 0
            else:
                assert torch.equal(book.codes[1], before)


def test_a_used_code_is_never_revived():
    book = codebook([[1.0, 0.0], [0.0, 1.0]], revive_after=1, decay=0.5)
    hidden = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    book.ema_update(hidden, torch.tensor([[0], [1]]), torch.ones(2))
    torch.testing.assert_close(book.codes, torch.tensor([[1.5, 0.0], [0.0, 1.5]]))


# ---- ranks


def _update_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for mode in EMA_MODES:
            torch.manual_seed(0)
            book = ThemeCodebook(4, 3, decay=0.9, ema_mode=mode)
            for step in range(2):
                book.ema_update(*random_batch(10 * step + rank))
            torch.save(book.state_dict(), f"{folder}/{mode}_{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_the_ema_of_two_ranks_is_the_ema_of_their_joint_batch(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_update_on_rank, args=(str(tmp_path),), nprocs=2)
    for mode in EMA_MODES:
        torch.manual_seed(0)
        book = ThemeCodebook(4, 3, decay=0.9, ema_mode=mode)
        for step in range(2):
            halves = [random_batch(10 * step + rank) for rank in range(2)]
            book.ema_update(*(torch.cat(parts) for parts in zip(*halves, strict=True)))
        for rank in range(2):
            state = torch.load(tmp_path / f"{mode}_{rank}.pt", weights_only=True)
            for name, value in book.state_dict().items():
                torch.testing.assert_close(state[name], value, **FP32, msg=f"{mode} {name}")


# ---- k-means


def separated_points(seed: int, themes: int = 4, each: int = 30, dim: int = 6):
    """Points of ``themes`` orthogonal directions with lengths from 0.5 to 5 and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(themes).repeat_interleave(each)[torch.randperm(themes * each, generator=generator)]
    length = 0.5 + 4.5 * torch.rand(len(label), 1, generator=generator)
    noise = 0.1 * torch.randn(len(label), dim, generator=generator)
    return length * (torch.eye(themes, dim)[label] + noise), label


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_recovers_separated_directions_as_plain_means(seed):
    points, label = separated_points(seed)
    weight = torch.randint(1, 5, (len(points),), generator=torch.Generator().manual_seed(seed)).float()
    centroids, sizes = cosine_kmeans(points, weight, 4, seed=1)
    expected = torch.stack([
        (points * weight.unsqueeze(1))[label == theme].sum(0) / weight[label == theme].sum() for theme in range(4)
    ])  # fmt: skip
    order = (centroids @ expected.T).argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centroids, expected[order], **FP32)
    torch.testing.assert_close(sizes, torch.stack([weight[label == theme].sum() for theme in order]))
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)


def test_kmeans_is_a_function_of_its_arguments():
    points, _ = separated_points(0)
    weight = torch.ones(len(points))
    torch.manual_seed(1)
    first = cosine_kmeans(points, weight, 3, seed=5, restarts=1)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(7)
    second = cosine_kmeans(points, weight, 3, seed=5, restarts=1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_kmeans_weights_count_as_repetitions():
    points, _ = separated_points(3, each=6)
    weight = torch.randint(1, 4, (len(points),), generator=torch.Generator().manual_seed(0))
    weighted = cosine_kmeans(points, weight.float(), 4, seed=0)
    repeated = cosine_kmeans(points.repeat_interleave(weight, 0), torch.ones(int(weight.sum())), 4, seed=0)
    torch.testing.assert_close(weighted[0], repeated[0], **FP32)
    torch.testing.assert_close(weighted[1], repeated[1])


@EXAMPLES
@given(count=st.integers(1, 12), clusters=st.integers(1, 6), seed=st.integers(0, 1000), copies=st.booleans())
def test_kmeans_sizes_sum_to_the_weight_and_centroids_are_finite(count, clusters, seed, copies):
    """Also with fewer (distinct) points than clusters, where some clusters stay empty."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(1 if copies else count, 3, generator=generator).expand(count, 3).contiguous()
    weight = 1 + torch.randint(5, (count,), generator=generator).float()
    centroids, sizes = cosine_kmeans(points, weight, clusters, seed=seed, restarts=2)
    assert centroids.shape == (clusters, 3) and bool(centroids.isfinite().all())
    assert bool((centroids.norm(dim=1) > 0).all())
    assert float(sizes.sum()) == pytest.approx(float(weight.sum()))


def test_an_empty_cluster_restarts_at_the_point_farthest_from_its_centroid():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 2.0]])
    same_seed_twice = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    centroids, sizes, _ = _lloyd(points, torch.ones(4), same_seed_twice, iterations=10)
    assert sizes.tolist() == [3.0, 1.0]
    torch.testing.assert_close(centroids, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))


def test_kmeans_of_many_points_is_iterated_on_all_of_them():
    points, _ = separated_points(0, each=2500)  # more points than the restarts see
    centroids, sizes = cosine_kmeans(points, torch.ones(len(points)), 4, seed=0, restarts=2)
    assert sizes.tolist() == [2500.0] * 4
    assert bool(centroids.isfinite().all())


def test_starting_from_centroids_takes_them_as_codes_and_their_shares_as_counts():
    book = ThemeCodebook(2, 2, ema_mode="count", decay=0.999)
    book.idle_updates.fill_(9)
    book.start_from(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([30.0, 10.0]))
    assert book.codes.tolist() == [[3.0, 0.0], [0.0, 4.0]]
    assert book.cluster_size.tolist() == [0.75, 0.25]
    assert book.idle_updates.tolist() == [0, 0]
    # members at the code itself leave it there (Laplace smoothing: 1e-5 of the mass)
    book.ema_update(torch.tensor([[3.0, 0.0]]), torch.tensor([[0]]), torch.ones(1))
    torch.testing.assert_close(book.codes[0], torch.tensor([3.0, 0.0]), rtol=1e-4, atol=0)


def test_count_mode_moves_slowly_from_its_k_means_start():
    """After k-means the sizes are put on a batch's scale, so a first batch moves a code by (1 - decay) of the gap."""
    book = ThemeCodebook(2, 2, decay=0.9, ema_mode="count").double()
    book.start_from(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([50.0, 50.0]))
    hidden, themes = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[0], [1]])
    book.ema_update(hidden, themes, torch.tensor([100.0, 100.0]))
    # (0.9 * 100 * 1 + 0.1 * 100 * 3) / 100 = 1.2; the Laplace smoothing of equal sizes changes nothing
    torch.testing.assert_close(book.codes, torch.tensor([[1.2, 0.0], [0.0, 1.0]]).double(), atol=1e-6, rtol=0)
