"""The popularity baselines, against a table worked out by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model_zoo.pipeline.baselines import popularity_baselines
from model_zoo.pipeline.dataset import CTRDataset, Histories, Split


def split(name: str, item: list[int], label: list[int], group: list[int] | None) -> Split:
    rows = np.zeros(len(item), np.int32)
    groups = None if group is None else np.array(group)
    return Split(name, name, rows, np.array(item, np.int32), rows, np.array(label, np.float32), {}, groups)


@pytest.fixture
def shop() -> CTRDataset:
    # training: item 1 clicked 2 of 4, item 2 clicked 1 of 1, item 3 never of 3; overall rate 3/8; item 4 not shown
    train = split("train", [1, 1, 1, 1, 2, 3, 3, 3], [1, 1, 0, 0, 1, 0, 0, 0], None)
    valid = split("valid", [1, 2, 3, 4, 1], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1])
    features: Any = None
    histories = Histories(np.zeros(0, np.int32), np.zeros(2, np.int64))
    return CTRDataset(features, {"item_id": np.arange(5)}, histories, {"train": train, "valid": valid}, {})


def test_item_popularity_ranks_by_clicks(shop: CTRDataset) -> None:
    found = popularity_baselines(shop, "valid", ["AUC", "gAUC", "logloss"])["item popularity"]
    # scores 2, 1, 0, 0, 2 of labels 1, 1, 0, 1, 0: pairs (2>0) 1, (2=2) 1/2, (1>0) 1, (1<2) 0, (0=0) 1/2, (0<2) 0 of 6
    # group 0: both pairs right, 3 rows; group 1: its one pair is wrong, 2 rows
    assert found == pytest.approx({"AUC": 3 / 6, "gAUC": (3 * 1 + 2 * 0) / 5}, abs=1e-12)


def test_item_ctr_is_smoothed_by_one_impression_at_the_overall_rate(shop: CTRDataset) -> None:
    found = popularity_baselines(shop, "valid", ["AUC", "gAUC", "logloss"])["item CTR"]
    one, two, three, four = (2 + 3 / 8) / 5, (1 + 3 / 8) / 2, (3 / 8) / 4, 3 / 8
    # order: item 2 .6875 > item 1 .475 > item 4 .375 > item 3 .09375
    assert found["AUC"] == pytest.approx(4.5 / 6, abs=1e-12)
    assert found["gAUC"] == pytest.approx(3 / 5, abs=1e-12)
    expected = -np.mean(np.log([one, two, 1 - three, four, 1 - one]))
    assert found["logloss"] == pytest.approx(expected, abs=1e-6)  # rates are float32


def test_only_training_labels_count(shop: CTRDataset) -> None:
    before = popularity_baselines(shop, "valid", ["AUC"])
    flipped = replace(shop.splits["valid"], label=1 - shop.splits["valid"].label)
    after = popularity_baselines(replace(shop, splits={**shop.splits, "valid": flipped}), "valid", ["AUC"])
    for name in before:
        assert after[name]["AUC"] == pytest.approx(1 - before[name]["AUC"], abs=1e-12)
