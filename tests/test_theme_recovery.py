"""Routers find the themes that synthetic data was made of.

Agreement is the adjusted Rand index (ARI) between the expert an item is routed to and the item's true theme: 1 for the
same partition, 0 on average for unrelated ones. Chance is measured, not assumed: the 99th percentile over shuffled
experts, about 0.02 here. The margins above it come from what a merger of themes costs: of four equal themes, two on one
expert leave an ARI of 0.71, two and two 0.50, three on one expert 0.33. So 0.5 above chance means that at most one pair
of themes shares an expert, 0.35 that no three do.

What the router sees is the concatenation of id embeddings, which start at 1e-4, and the raw image vector, which is of
order 1 (facts that `test_the_themes_are_read_from_the_image_part` holds on to): the themes come from the images alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from sklearn.metrics import adjusted_rand_score

from model_zoo.compat import seed_everything
from model_zoo.pipeline.dataset import CTRDataset, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.synthetic import TINY, SyntheticData, SyntheticSpec, generate
from model_zoo.pipeline.synthetic_files import dataset_config, write
from model_zoo.registry import get_model

# models this small lose far more to the hand-over between threads than they gain
torch.set_num_threads(1)

Ints = npt.NDArray[np.int64]
SEEDS = (2, 3, 5)
#: centroids four times as far apart as items from their centroid: k-means of the images themselves is then right
SPEC = replace(TINY, users=120, items=241, rows=(1600, 400, 400), separation=4.0)
IMAGE = SPEC.image_dim
WINDOW = 4
ONE_PAIR_AT_MOST, NO_THREE_TOGETHER = 0.5, 0.35


@dataclass(frozen=True)
class Themed:
    """A synthetic data set, as drawn and as loaded."""

    truth: SyntheticData
    data: CTRDataset

    @property
    def theme(self) -> Ints:
        """True theme of the items 1, 2, ..."""
        return self.truth.items.theme[1:].astype(np.int64)

    @property
    def occurrences(self) -> Ints:
        """How often each of them stands in a history."""
        return np.bincount(self.truth.history, minlength=SPEC.items)[1:]

    def loader(self, split: str) -> SequenceLoader:
        return SequenceLoader(self.data, split, 128, max_len=40, shuffle=split == "train", seed=1)


def draw(spec: SyntheticSpec, folder: Path) -> Themed:
    truth = generate(spec)
    write(truth, folder)
    params = yaml.safe_load(dataset_config(spec, folder))[folder.name]
    params |= {"dataset_id": folder.name, "group_id": "user_index", "embedding_dim": 16}
    return Themed(truth, load_dataset(build_feature_map(params), params))


@pytest.fixture(scope="module")
def themed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Themed]:
    return cache(lambda seed: draw(replace(SPEC, seed=seed), tmp_path_factory.mktemp("themed") / "data"))


def build(world: Themed, folder: Path, seed: int, **overrides: Any) -> Any:
    params: dict[str, Any] = {
        "embedding_dim": 16, "attention_dim": 16, "short_seq_len": 10, "topk": 10, "dnn_hidden_units": [32],
        "n_item_experts": SPEC.themes, "n_window_experts": SPEC.themes, "topk_item": 1, "topk_window": 1,
        "window_size": WINDOW, "window_stride": 2, "learning_rate": 5e-3, "model_id": "themes",
    }  # fmt: skip
    seed_everything(seed)
    items = world.data.item_features()
    model = get_model("MoS_TWIN")(world.data.feature_map, item_features=items, **{**params, **overrides})
    model.place_checkpoints(str(folder))
    return model


@torch.no_grad()
def item_experts(model: Any, keep: slice = slice(None)) -> Ints:
    """The item router's first expert of the items 1, 2, ..., from the kept part of their vectors."""
    whole = model.embedding_layer(model.item_features.rows(torch.arange(1, SPEC.items)), flatten_emb=True)
    vectors = torch.zeros_like(whole)
    vectors[:, keep] = whole[:, keep]
    router = model.mos.item_router
    return router.codebook.cosine(router.encode(vectors)).argmax(1).numpy()


def chance(truth: Ints, found: Ints, weight: Ints | None = None) -> float:
    """99th percentile of the ARI under shuffled ``found``."""
    rng = np.random.default_rng(0)
    return float(np.percentile([agreement(truth, rng.permutation(found), weight) for _ in range(200)], 99))


def agreement(truth: Ints, found: Ints, weight: Ints | None = None) -> float:
    """ARI, each entry counted ``weight`` times."""
    if weight is not None:
        truth, found = np.repeat(truth, weight), np.repeat(found, weight)
    return float(adjusted_rand_score(truth, found))


def report(world: Themed, model: Any, when: str) -> dict[str, float]:
    """Prints and returns ARI and chance over items and over history events."""
    found, figures = item_experts(model), {}
    for what, weight in (("items", None), ("events", world.occurrences)):
        figures[what] = agreement(world.theme, found, weight)
        figures[f"{what} by chance"] = chance(world.theme, found, weight)
    print(f"\n{when}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    return figures


def test_the_margins_are_what_the_docstring_says() -> None:
    themes = np.repeat(np.arange(4), 60)
    one_pair, two_pairs, three = np.where(themes == 1, 0, themes), themes // 2, themes // 3
    for merged, wanted in ((one_pair, 0.71), (two_pairs, 0.50), (three, 0.33)):
        assert agreement(themes, merged) == pytest.approx(wanted, abs=0.005)
        assert chance(themes, merged) < 0.03
    assert agreement(themes, themes[::-1]) == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_kmeans_recovers_the_themes(themed: Callable[[int], Themed], tmp_path: Path, seed: int) -> None:
    world = themed(seed)
    model = build(world, tmp_path, seed)
    report(world, model, f"seed {seed}, random codebook")
    model.start_experts(world.loader("train"))
    found = report(world, model, f"seed {seed}, after k-means")
    for what in ("items", "events"):
        assert found[what] > max(found[f"{what} by chance"] + ONE_PAIR_AT_MOST, 0.9)


def test_kmeans_is_what_recovers_them(themed: Callable[[int], Themed], tmp_path: Path) -> None:
    """A random codebook is above chance too (h keeps well separated groups apart), but far from the themes."""
    before, after = [], []
    for seed in SEEDS:
        model = build(themed(seed), tmp_path, seed)
        before.append(agreement(themed(seed).theme, item_experts(model)))
        model.start_experts(themed(seed).loader("train"))
        after.append(agreement(themed(seed).theme, item_experts(model)))
    assert np.mean(after) > np.mean(before) + 0.2
    assert min(after) > max(before)


# with two kept experts h learns, faster than a codebook with a decay of 0.999 follows in 40 steps: themes may then share
# an expert, so only the weaker margin is required
@pytest.mark.parametrize("topk, margin", [(1, ONE_PAIR_AT_MOST), (2, NO_THREE_TOGETHER)])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_themes_outlast_a_short_training(
    themed: Callable[[int], Themed], tmp_path: Path, seed: int, topk: int, margin: float
) -> None:
    world = themed(seed)
    model = build(world, tmp_path, seed, topk_item=topk, topk_window=topk)
    model.fit(world.loader("train"), epochs=1, validation_data=world.loader("valid"))
    found = report(world, model, f"seed {seed}, after training with k = {topk}")
    for what in ("items", "events"):
        assert found[what] > found[f"{what} by chance"] + margin


def test_the_themes_are_read_from_the_image_part(themed: Callable[[int], Themed], tmp_path: Path) -> None:
    """Routed by id and category embeddings alone, items are near chance before and after a short training."""
    world = themed(SEEDS[0])
    model = build(world, tmp_path, SEEDS[0])
    with torch.no_grad():
        vectors = model.embedding_layer(model.item_features.rows(torch.arange(1, SPEC.items)), flatten_emb=True)
    assert float(vectors[:, :-IMAGE].std()) < 1e-3 < 0.1 < float(vectors[:, -IMAGE:].std())
    model.start_experts(world.loader("train"))
    for when in ("after k-means", "after training"):
        ids, image = (
            agreement(world.theme, item_experts(model, part)) for part in (slice(-IMAGE), slice(-IMAGE, None))
        )
        print(f"\n{when}: ids alone {ids:.3f}, image alone {image:.3f}")
        assert image > 0.9 and ids < 0.2
        if when == "after k-means":
            model.fit(world.loader("train"), epochs=1, validation_data=world.loader("valid"))


@pytest.mark.parametrize("seed", SEEDS)
def test_windows_are_routed_by_the_sessions_theme(themed: Callable[[int], Themed], tmp_path: Path, seed: int) -> None:
    """The newest window of a row against the theme of the row's session.

    A window that spans two sessions has no theme of its own, so rows whose newest window lies in one session are the
    fair test (every tenth event strays from its session even there); over all rows less is required.
    """
    world = themed(seed)
    model = build(world, tmp_path, seed)
    model.start_experts(world.loader("train"))
    truth, rows = world.truth, world.truth.rows["valid"]
    batch = world.loader("valid").batch(np.arange(len(rows.is_click)))
    with torch.no_grad():
        windows, router = model.router_tokens(batch)["window"], model.mos.window_router
        expert = router.codebook.cosine(router.encode(windows.last_vectors)).argmax(1).numpy()
    newest = truth.offsets[rows.user_index] + rows.seq_len - 1
    oldest = np.maximum(newest - WINDOW + 1, truth.offsets[rows.user_index])
    theme = truth.session_theme[newest].astype(np.int64)
    within = truth.session_id[newest] == truth.session_id[oldest]
    found = {name: agreement(theme[part], expert[part]) for name, part in (("all", slice(None)), ("within", within))}
    limit = {name: chance(theme[part], expert[part]) for name, part in (("all", slice(None)), ("within", within))}
    print(f"\nseed {seed}, windows: all {found['all']:.3f}, within one session {found['within']:.3f}, chance {limit}")
    assert within.sum() > 150
    assert found["all"] > limit["all"] + 0.2
    assert found["within"] > limit["within"] + ONE_PAIR_AT_MOST
