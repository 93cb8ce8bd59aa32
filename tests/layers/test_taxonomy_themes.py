"""Themes from categories: where codes start, which themes stand for a category, the term that keeps h(x) near them."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mos_cases import DIM, EXACT, build, case
from oracles import branch_tokens, cosines, gradients, ragged
from torch import Tensor

from model_zoo.layers.mos import MoS
from model_zoo.layers.sequence import Sequence
from model_zoo.layers.taxonomy import Taxonomy, category_centroids
from model_zoo.layers.theme_codebook import ThemeCodebook
from model_zoo.layers.windows import CATEGORY, Windows, majority

SETTINGS = settings(derandomize=True, deadline=None, max_examples=40)
CATEGORIES = torch.tensor([1, 2, 3, 1, 2, 0, 1, 4, 2])  # of `ragged`'s nine items; 0 = none, 4 = not in the table


def blobs(sizes: dict[int, int], dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points around a direction of each category's own, their weights, their categories."""
    generator = torch.Generator().manual_seed(seed)
    category = torch.tensor([number for number, size in sizes.items() for _ in range(size)])
    centre = 5 * F.one_hot(category % dim, dim).float()
    points = centre + 0.1 * torch.randn(len(category), dim, generator=generator)
    weight = torch.randint(1, 4, (len(category),), generator=generator).float()
    shuffled = torch.randperm(len(category), generator=generator)
    return points[shuffled], weight[shuffled], category[shuffled]


def centroid(points: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    return (points[chosen] * weight[chosen, None]).sum(0) / weight[chosen].sum()


def started(themes: int, sizes: dict[int, int], **options: Any) -> tuple[ThemeCodebook, Taxonomy, Tensor]:
    codebook, taxonomy = ThemeCodebook(themes, 6), Taxonomy(9, themes)
    return codebook, taxonomy, taxonomy.start(codebook, *blobs(sizes), 0)


def test_category_centroids_are_weighted_means_without_category_0():
    points, weight, category = blobs({3: 4, 1: 2, 0: 3})
    known, means, mass = category_centroids(points, weight, category)
    assert known.tolist() == [1, 3]
    for number, mean, size in zip(known, means, mass):
        torch.testing.assert_close(mean, centroid(points, weight, category == number))
        assert float(size) == float(weight[category == number].sum())
    assert len(category_centroids(points, weight, category * 0)[0]) == 0


def test_as_many_categories_as_themes_give_each_its_centroid_heaviest_first():
    sizes = {2: 5, 5: 30, 7: 12, 0: 50}
    points, weight, category = blobs(sizes)
    codebook, taxonomy, found = started(3, sizes)
    for theme, number in enumerate((5, 7, 2)):
        torch.testing.assert_close(codebook.codes[theme], centroid(points, weight, category == number))
        assert taxonomy.themes[number].nonzero().flatten().tolist() == [theme]
        assert float(found[theme]) == float(weight[category == number].sum())
    assert not bool(taxonomy.themes[[0, 1, 3, 4, 6, 8]].any())


def test_more_categories_than_themes_are_grouped_and_a_group_weighs_as_its_tokens():
    points, weight, category = blobs({1: 20, 7: 10, 2: 8, 8: 3, 3: 9})  # 1 and 7, 2 and 8 point the same way
    codebook, taxonomy = ThemeCodebook(3, 6), Taxonomy(9, 3)
    sizes = taxonomy.start(codebook, points, weight, category, 0)
    themes = taxonomy.themes[[1, 7, 2, 8, 3]]
    assert (themes.sum(1) == 1).all() and sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    group = themes.float().argmax(1).tolist()
    assert group[0] == group[1] and group[2] == group[3] and len(set(group)) == 3
    both = (category == 1) | (category == 7)
    torch.testing.assert_close(codebook.codes[group[0]], centroid(points, weight, both))
    assert float(sizes[group[0]]) == float(weight[both].sum())


def test_fewer_categories_than_themes_divide_the_heaviest():
    sizes = {4: 60, 2: 10}
    codebook, taxonomy, found = started(4, sizes)
    assert taxonomy.themes.sum(1)[[4, 2]].tolist() == [3, 1]  # 60 tokens by 3 are still more than 10 by 1
    own = taxonomy.themes[2].nonzero().item()
    points, weight, category = blobs(sizes)
    torch.testing.assert_close(codebook.codes[own], centroid(points, weight, category == 2))
    assert float(found.sum()) == float(weight.sum())
    torch.testing.assert_close(codebook.cluster_size, found / found.sum())
    assert started(4, {4: 30, 2: 25})[1].themes.sum(1)[[4, 2]].tolist() == [2, 2]


def test_a_start_is_a_function_of_its_arguments_and_nothing_without_categories():
    first, second = (started(3, {n: 4 + n for n in range(1, 9)})[0].codes for _ in range(2))
    assert torch.equal(first, second)
    codebook, taxonomy = ThemeCodebook(3, 6), Taxonomy(9, 3)
    before = codebook.codes.clone()
    assert len(taxonomy.start(codebook, *blobs({0: 5}), 0)) == 0
    assert torch.equal(codebook.codes, before) and not bool(taxonomy.themes.any())


def test_following_gives_each_category_the_theme_nearest_its_centroid():
    codebook, taxonomy = ThemeCodebook(4, 6), Taxonomy(9, 4)
    points, weight, category = blobs({1: 5, 2: 6, 3: 2})
    before = codebook.codes.clone()
    taxonomy.follow(codebook, points, weight, category)
    for number in (1, 2, 3):
        cosine = F.cosine_similarity(centroid(points, weight, category == number)[None], codebook.codes)
        assert taxonomy.themes[number].nonzero().item() == int(cosine.argmax())
    assert torch.equal(codebook.codes, before) and not bool(taxonomy.themes[4:].any())


@SETTINGS
@given(data=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=25))
def test_majority_is_the_most_frequent_category_of_several_the_lowest(data):
    owner, category = (torch.tensor([pair[side] for pair in data], dtype=torch.long) for side in (0, 1))
    expected = []
    for one in range(5):
        count = Counter(c for o, c in data if o == one and c > 0)
        expected.append(min((-times, c) for c, times in count.items())[1] if count else 0)
    assert majority(owner, category, 5).tolist() == expected


def taxonomy_layer(**options: Any) -> MoS:
    """A layer whose categories 1, 2 and 3 stand for themes 0, 1 and 2, and 1 also for theme 2."""
    defaults = {"taxonomy_feature": "cate_id", "taxonomy_weight": 0.5, "topk_item": 2, "topk_window": 2}
    layer = build(**{**defaults, **options})
    layer.use_taxonomy(5)
    for router in (layer.item_router, layer.window_router):
        assert router is not None and router.taxonomy is not None
        router.taxonomy.themes[[1, 2, 3, 1], [0, 1, 2, 2]] = True
    return layer


def categorised(sequence: Sequence) -> Sequence:
    return Sequence(sequence.items, sequence.index, sequence.mask, memo={CATEGORY: CATEGORIES})


def literal_penalty(layer: MoS, sequence: Sequence, branch: str) -> Tensor:
    """Token by token: the mean distance to the nearest theme of the token's category."""
    router = getattr(layer, f"{branch}_router")
    terms = []
    for index, mask in zip(sequence.index, sequence.mask):
        tokens = branch_tokens(layer, sequence.items[index[mask]], branch)
        if branch == "item":
            kinds = CATEGORIES[index[mask]].tolist()
        else:
            places = Windows(Sequence(torch.eye(9), index[mask][None], mask[mask][None]), layer.window_size,
                             layer.window_stride, layer.window_align).sequence()  # fmt: skip
            kinds = []
            for share in places.vectors[0][places.mask[0]]:  # of each item in a window
                shares = {k: float(share[k == CATEGORIES].sum()) for k in range(1, 5)}
                best = max(shares.values())
                kinds.append(min(k for k, s in shares.items() if abs(s - best) < 1e-6) if best > 0 else 0)
        for token, kind in zip(tokens, kinds):
            allowed = router.taxonomy.themes[kind].nonzero().flatten()
            if len(allowed):
                terms.append(1 - cosines(router, token)[allowed].max())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("options", [{}, {"window_align": "left"}, {"codebook": "learned"}, {"shared_router": True}])
def test_the_term_equals_its_literal_form_with_its_gradients(options):
    layer = taxonomy_layer(**options)
    query, sequence = case(padding=2)
    sequence = categorised(sequence)
    losses: list[Any] = []
    layer(query, sequence, losses)
    assert len(losses) == 2
    for loss, branch in zip(losses, ("item", "window")):
        expected = 0.5 * literal_penalty(layer, sequence, branch)
        torch.testing.assert_close(loss, expected, **EXACT)
        h = list(getattr(layer, f"{branch}_router").h.parameters())
        for got, want in zip(gradients(loss, [sequence.items, *h]), gradients(expected, [sequence.items, *h])):
            torch.testing.assert_close(got, want, **EXACT)
            assert float(got.abs().sum()) > 0


def test_the_term_trains_h_and_items_and_no_code():
    layer = taxonomy_layer(codebook="learned")
    query, sequence = case()
    losses: list[Any] = []
    layer(query, categorised(sequence), losses)
    sum(losses).backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained and all(".h." in name for name in trained)


def test_descending_the_term_brings_tokens_to_their_categories_themes():
    layer = taxonomy_layer().train()
    sequence = categorised(ragged([9, 7, 8], DIM, dtype=torch.double))
    router = layer.item_router
    optimizer = torch.optim.Adam(router.h.parameters(), lr=0.05)
    first = router.taxonomy.penalty(router, sequence).item()
    for _ in range(60):
        optimizer.zero_grad()
        router.taxonomy.penalty(router, sequence).backward()
        optimizer.step()
    assert router.taxonomy.penalty(router, sequence).item() < 0.3 * first


def test_the_term_is_there_in_training_alone_and_leaves_the_answer():
    query, sequence = case()
    layer, losses = taxonomy_layer(), list[Any]()
    named = categorised(sequence)
    assert torch.equal(layer(query, named, losses), layer(query, named)) and len(losses) == 2
    layer.eval()(query, named, losses)
    assert len(losses) == 2
    layer.train()(query[:2], categorised(ragged([0, 0], DIM)), losses)
    assert len(losses) == 2
    unknown = Sequence(sequence.items, sequence.index, sequence.mask, memo={CATEGORY: CATEGORIES * 0})
    few = list[Any]()
    layer(query, unknown, few)
    assert [loss.item() for loss in few] == [0.0, 0.0]
    assert all(bool(g.isfinite().all()) for g in gradients(sum(few), layer.parameters()))


def test_off_by_default_and_then_nothing_differs():
    plain, off = build(topk_item=2), build(topk_item=2, taxonomy_feature="cate_id", codebook_init="kmeans", windows="fixed")
    query, sequence = case()
    losses: list[Any] = []
    assert torch.equal(plain(query, sequence, losses), off(query, categorised(sequence), losses)) and not losses
    assert plain.state_dict().keys() == off.state_dict().keys() and off.taxonomy_feature is None
    assert not any("taxonomy" in name for name in plain.state_dict())
    assert "item_router.taxonomy.themes" in taxonomy_layer().state_dict()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_init": "taxonomy"}, "codebook_init needs taxonomy_feature"),
        ({"taxonomy_weight": 0.1}, "taxonomy_weight needs taxonomy_feature"),
        ({"taxonomy_weight": -0.1}, r"taxonomy_weight \(-0.1\) must be at least 0"),
        ({"taxonomy_weight": 0.1, "taxonomy_feature": "a", "router_input": "item_target"}, "router_input: item, not"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
