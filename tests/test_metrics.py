import logging
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from model_zoo.errors import ConfigError, DataError, UserError
from model_zoo.pipeline.metrics import auc, avg_auc, check_metrics, evaluate_metrics, gauc, logloss

Case = tuple[np.ndarray, np.ndarray, np.ndarray]

EXACT: dict[str, Any] = {"rel": 0, "abs": 1e-12}
deterministic = settings(derandomize=True, deadline=None, max_examples=150)

# Few distinct values, so that ties are common; the pairs differ in float64 and agree in float32.
TIED_32 = [-0.0, 0.0, 1e-45, -1e-45, 1e-38, 0.25, 0.5, -0.5, 1.0, 3e38, -3e38, float(np.nextafter(np.float32(0.5), 1))]
TIED_64 = [-0.0, 0.0, 5e-324, -5e-324, 1e-300, 0.1, 0.1 + 2e-17, 0.5, 0.5 + 1e-12, 0.5 + 2e-12, 1e300, -1e300, 1.7e308]


@st.composite
def scored_rows(draw: st.DrawFn) -> Case:
    """Labels, predictions and groups of 1 to 60 rows; some cases have one group, or one value in all rows."""
    rows = draw(st.integers(1, 60))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    if dtype == np.float32:
        value = st.sampled_from(TIED_32) | st.floats(allow_nan=False, allow_infinity=False, width=32)
    else:
        value = st.sampled_from(TIED_64) | st.floats(allow_nan=False, allow_infinity=False)
    pool = draw(st.lists(value, min_size=1, max_size=draw(st.sampled_from([1, 4, 40]))))
    prediction = draw(st.lists(st.sampled_from(pool), min_size=rows, max_size=rows))
    label = draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))
    group = draw(st.lists(st.integers(0, draw(st.sampled_from([0, 2, 9]))), min_size=rows, max_size=rows))
    return np.array(label), np.array(prediction, dtype=dtype), np.array(group)


def two_class_aucs(label: np.ndarray, prediction: np.ndarray, group: np.ndarray) -> list[tuple[int, float]]:
    """Rows and scikit-learn's AUC of each group that has both classes."""
    kept = []
    for name in np.unique(group):
        part = group == name
        if 0 < label[part].sum() < part.sum():
            kept.append((int(part.sum()), float(roc_auc_score(label[part], prediction[part]))))
    return kept


def per_group_oracle(label: np.ndarray, prediction: np.ndarray, group: np.ndarray, k: int) -> tuple[float, float]:
    """MRR and NDCG@k by a loop over groups and ranks, best prediction first, the later row first among equals."""
    mrr, ndcg = [], []
    for name in np.unique(group):
        part = np.flatnonzero(group == name)
        best_first = sorted(part, key=lambda row: (-float(prediction[row]), -row))
        ranks = [rank for rank, row in enumerate(best_first, start=1) if label[row]]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(ranks)) + 1))
        mrr.append(sum(1 / rank for rank in ranks) / len(ranks) if ranks else 0.0)
        ndcg.append(sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k) / ideal if ranks else 0.0)
    return sum(mrr) / len(mrr), sum(ndcg) / len(ndcg)


# ---- AUC, gAUC, avgAUC against scikit-learn --------------------------------------------------------------------------


@deterministic
@given(scored_rows())
def test_aucs_equal_sklearns_per_group_loop(case: Case) -> None:
    label, prediction, group = case
    whole = two_class_aucs(label, prediction, np.zeros(len(label)))
    kept = two_class_aucs(label, prediction, group)
    rows, areas = [n for n, _ in kept], [area for _, area in kept]
    expected = {
        "gAUC": float(np.average(areas, weights=rows)) if kept else math.nan,
        "AUC": whole[0][1] if whole else math.nan,
        "avgAUC": float(np.mean(areas)) if kept else math.nan,
    }
    found = evaluate_metrics(label, prediction, list(expected), group)
    assert found == pytest.approx(expected, nan_ok=True, **EXACT)
    assert auc(label, prediction) == pytest.approx(expected["AUC"], nan_ok=True, **EXACT)
    assert gauc(label, prediction, group) == pytest.approx(expected["gAUC"], nan_ok=True, **EXACT)
    assert avg_auc(label, prediction, group) == pytest.approx(expected["avgAUC"], nan_ok=True, **EXACT)


@deterministic
@given(
    scored_rows(),
    st.permutations(range(60)),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=10, max_size=10, unique=True),
)
def test_aucs_do_not_depend_on_row_order_or_group_names(case: Case, permutation: list[int], names: list[int]) -> None:
    label, prediction, group = case
    order = np.array([row for row in permutation if row < len(label)])
    renamed = [
        np.array(names)[group],
        np.array([f"user {name}" for name in names])[group],
        np.array([f"user {name}" for name in names], dtype=object)[group],
        group.astype(np.int8) - 100,
        group.astype(np.uint64) + np.uint64(2**64 - 20),
    ]
    metrics = ["gAUC", "avgAUC", "AUC"]
    expected = np.array(list(evaluate_metrics(label, prediction, metrics, group).values()))
    for ids in renamed:
        found = evaluate_metrics(label[order], prediction[order], metrics, ids[order])
        np.testing.assert_array_equal(np.array(list(found.values())), expected)


def test_a_thousand_groups_equal_sklearns_loop() -> None:
    rng = np.random.default_rng(0)
    label, group = rng.integers(0, 2, 20_000), rng.integers(0, 1_000, 20_000)
    for prediction in (rng.random(20_000), rng.random(20_000).astype(np.float32), rng.integers(0, 9, 20_000) / 9):
        kept = two_class_aucs(label, prediction, group)
        expected = sum(n * area for n, area in kept) / sum(n for n, _ in kept)
        assert gauc(label, prediction, group) == pytest.approx(expected, **EXACT)
        assert auc(label, prediction) == pytest.approx(roc_auc_score(label, prediction), **EXACT)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.uint32, np.float16, np.float32, np.longdouble])
def test_any_numeric_dtype(dtype: type) -> None:
    label = np.array([0, 1, 1, 0, 1])
    prediction: np.ndarray = np.array([0, 1, 0, 1, 1]).astype(dtype)
    assert auc(label.astype(dtype), prediction) == pytest.approx(roc_auc_score(label, [0, 1, 0, 1, 1]), **EXACT)


def test_integers_beyond_float64_stay_apart() -> None:
    assert auc([0, 1], np.array([2**53, 2**53 + 1])) == 1.0


def test_columns_of_a_matrix_and_lists() -> None:
    label, prediction, group = [0, 1, 0, 1], [0.1, 0.4, 0.35, 0.8], ["a", "a", "b", "b"]
    column = evaluate_metrics(np.array(label)[:, None], np.array(prediction)[:, None], ["AUC", "gAUC"], group)
    assert column == evaluate_metrics(label, prediction, ["AUC", "gAUC"], group)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_auc_by_hand() -> None:
    # Pairs (positive, negative): .4 > .1, .4 > .35, .8 > .1, .8 > .35 and one tie, .4 = .4, of six.
    assert auc([0, 0, 1, 1, 0], [0.1, 0.35, 0.4, 0.8, 0.4]) == pytest.approx(5.5 / 6, **EXACT)
    assert auc([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]) == 0.5
    assert auc([0, 1], [-0.0, 0.0]) == 0.5
    assert auc([0, 1], [0.1, 0.1 + 2e-17]) == 1.0


def test_grouped_aucs_by_hand() -> None:
    label = np.array([1, 0, 1, 0, 0, 1, 1, 0])
    prediction = np.array([0.9, 0.1, 0.2, 0.6, 0.7, 0.7, 0.3, 0.4])
    group = np.array([7, 7, 3, 3, 3, 9, 9, 5])
    # Group 7: 1 of 1 pair right, 2 rows. Group 3: 0 of 2, 3 rows. Groups 9 and 5 have one class.
    found = evaluate_metrics(label, prediction, ["gAUC", "avgAUC"], group)
    assert found == pytest.approx({"gAUC": 2 / 5, "avgAUC": 1 / 2}, **EXACT)


@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**32, 2**62])
def test_group_ids_far_apart_stay_apart(far: int) -> None:
    assert avg_auc([0, 1, 0, 1], [0.5, 0.6, 0.1, 0.2], np.array([0, 0, far, far])) == 1.0


def test_mrr_and_ndcg_by_hand() -> None:
    label = np.array([0, 1, 1, 0, 1, 0, 0])
    prediction = np.array([0.9, 0.8, 0.1, 0.3, 0.7, 0.2, 0.6])
    group = np.array([0, 0, 0, 0, 1, 1, 2])
    # Group 0: positives at ranks 2 and 4. Group 1: rank 1. Group 2: no positive, counts as 0.
    found = evaluate_metrics(label, prediction, ["MRR", "NDCG@1", "NDCG@2", "NDCG(k=4)"], group)
    second, fourth = 1 / math.log2(3), 1 / math.log2(5)
    assert found == pytest.approx(
        {
            "MRR": ((1 / 2 + 1 / 4) / 2 + 1 + 0) / 3,
            "NDCG@1": (0 + 1 + 0) / 3,
            "NDCG@2": (second / (1 + second) + 1 + 0) / 3,
            "NDCG(k=4)": ((second + fourth) / (1 + second) + 1 + 0) / 3,
        },
        rel=0,
        abs=2e-12,
    )


def test_of_equal_predictions_the_later_row_ranks_first() -> None:
    assert evaluate_metrics([1, 0], [0.5, 0.5], ["MRR"], [0, 0])["MRR"] == pytest.approx(0.5, rel=0, abs=2e-12)
    assert evaluate_metrics([0, 1], [0.5, 0.5], ["MRR"], [0, 0])["MRR"] == pytest.approx(1.0, rel=0, abs=2e-12)


@deterministic
@given(scored_rows(), st.integers(1, 70))
def test_mrr_and_ndcg_equal_a_loop(case: Case, k: int) -> None:
    label, prediction, group = case
    mrr, ndcg = per_group_oracle(label, prediction, group, k)
    found = evaluate_metrics(label, prediction, [f"NDCG@{k}", "MRR"], group)
    assert list(found) == [f"NDCG@{k}", "MRR"]
    assert found == pytest.approx({f"NDCG@{k}": ndcg, "MRR": mrr}, rel=0, abs=3e-12)


def test_mrr_and_ndcg_equal_fuxictr_without_ties() -> None:
    fuxictr = pytest.importorskip("fuxictr.metrics")
    rng = np.random.default_rng(1)
    label, prediction, group = rng.random(3_000) < 0.2, rng.permutation(3_000) / 3_000, rng.integers(0, 200, 3_000)
    parts = [(label[group == name].astype(int), prediction[group == name]) for name in range(200)]
    found = evaluate_metrics(label, prediction, ["MRR", "NDCG@1", "NDCG@5"], group)
    expected = {
        "MRR": np.mean([fuxictr.MRR(*part) for part in parts]),
        "NDCG@1": np.mean([fuxictr.NDCG(k=1)(*part) for part in parts]),
        "NDCG@5": np.mean([fuxictr.NDCG(k=5)(*part) for part in parts]),
    }
    assert found == pytest.approx(expected, **EXACT)


# ---- logloss ---------------------------------------------------------------------------------------------------------


def test_logloss_by_hand() -> None:
    assert logloss([1, 0, 1], [0.5, 0.25, 1.0]) == pytest.approx((math.log(2) - math.log(0.75)) / 3, rel=1e-15)
    assert logloss([1, 1], [0.5, 0.25]) == pytest.approx(1.5 * math.log(2), rel=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logloss_clips_as_sklearn_does(dtype: type) -> None:
    # One row at a time, so that scikit-learn's float32 mean does not hide where the clip is.
    for label, prediction in [(1, 0.0), (0, 1.0), (1, 1.0), (0, 0.0), (1, 1e-9), (0, 0.3)]:
        expected = log_loss([label], np.array([prediction], dtype=dtype), labels=[0, 1])
        assert logloss([label], np.array([prediction], dtype=dtype)) == pytest.approx(expected, rel=2e-6, abs=1e-15)


def test_logloss_equals_sklearn_in_float64() -> None:
    rng = np.random.default_rng(2)
    label, prediction = rng.integers(0, 2, 5_000), rng.random(5_000) ** 8
    prediction[:9] = [0, 1, 1e-20, 1e-7, 1 - 1e-7, 0, 1, 0, 1]
    assert logloss(label, prediction) == pytest.approx(log_loss(label, prediction), **EXACT)
    assert logloss(label, prediction, eps=1e-7) == pytest.approx(
        log_loss(label, np.clip(prediction, 1e-7, 1 - 1e-7)), **EXACT
    )


def test_logloss_of_float32_is_summed_in_float64() -> None:
    prediction = np.full(1_000_000, 0.3, dtype=np.float32)
    assert logloss(np.ones(1_000_000), prediction) == pytest.approx(-math.log(float(np.float32(0.3))), rel=1e-13)


def test_forced_eps() -> None:
    assert logloss([1], np.zeros(1, dtype=np.float32), eps=1e-7) == pytest.approx(-math.log(1e-7), rel=1e-14)
    assert logloss([1], [0.0]) == pytest.approx(-math.log(np.finfo(np.float64).eps), rel=1e-14)
    assert logloss([1], [0]) == logloss([1], [0.0])
    with pytest.raises(ValueError, match=r"eps=0\.7 must be between 0 and 0.5"):
        logloss([1], [0.5], eps=0.7)


# ---- names, order, warnings, refusals --------------------------------------------------------------------------------


def test_order_and_spelling_are_the_callers() -> None:
    names = ["NDCG( k = 2 )", "logloss", "gAUC", "NDCG(2)", "AUC", "NDCG@2", "binary_crossentropy", "MRR", "avgAUC"]
    found = evaluate_metrics([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.8], names, [0, 0, 1, 1])
    assert list(found) == names
    assert all(type(value) is float for value in found.values())
    assert found["NDCG( k = 2 )"] == found["NDCG(2)"] == found["NDCG@2"]
    assert found["logloss"] == found["binary_crossentropy"]
    everything = evaluate_metrics([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.8], [f"NDCG@{10**30}", "NDCG@4"], [0, 0, 0, 0])
    assert len(set(everything.values())) == 1
    assert evaluate_metrics([0, 0], [0.1, 0.4], ["NDCG@3", "MRR"], [0, 0]) == {"NDCG@3": 0.0, "MRR": 0.0}
    assert evaluate_metrics([0, 1], [0.1, 0.4], []) == {}


def test_one_class_is_nan_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="model_zoo"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(auc([1, 1, 1], [0.1, 0.2, 0.3]))
        assert [record.getMessage() for record in caplog.records] == ["AUC is nan: all 3 labels are 1."]
        caplog.clear()
        found = evaluate_metrics([0, 1, 0], [0.1, 0.2, 0.2], ["gAUC", "AUC", "avgAUC"], ["a", "b", "a"])
    assert [record.getMessage() for record in caplog.records] == [
        "gAUC, avgAUC: nan, as each of the 2 groups holds a single class; choose another group_id."
    ]
    assert found == pytest.approx({"gAUC": math.nan, "AUC": 0.75, "avgAUC": math.nan}, nan_ok=True)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("gauc", "gAUC"),
        ("auc", "AUC"),
        ("log_loss", "logloss"),
        ("NDGC@5", "NDCG@k"),
        ("NDCG@0", "NDCG@k"),
        ("NDCG", "NDCG@k"),
        ("NDCG(k=__import__('os'))", "NDCG@k"),
    ],
)
def test_unknown_metric_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        evaluate_metrics([0, 1], [0.1, 0.2], ["AUC", name], [0, 0])
    assert str(refusal.value).startswith(f"metrics: '{name}' is not known, the nearest is '{nearest}'; choose from AUC,")


@pytest.mark.parametrize("name", ["gAUC", "avgAUC", "MRR", "NDCG@5"])
def test_grouped_metric_without_group_id(name: str) -> None:
    sentence = f"metrics: '{name}' is computed group by group and there is no group id; set group_id: to a column, or"
    with pytest.raises(ConfigError) as refusal:
        evaluate_metrics([0, 1], [0.1, 0.2], ["AUC", name])
    assert str(refusal.value).startswith(sentence)
    with pytest.raises(ConfigError):
        check_metrics([name], grouped=False)
    check_metrics([name], grouped=True)


def test_a_string_is_not_a_list_of_metrics() -> None:
    with pytest.raises(ConfigError, match=r"metrics: 'AUC' is a string; write a list, \[AUC\]"):
        evaluate_metrics([0, 1], [0.1, 0.2], "AUC")


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("metric", ["AUC", "gAUC", "logloss", "MRR"])
def test_prediction_that_is_not_finite(value: float, shown: str, metric: str) -> None:
    with pytest.raises(UserError, match=rf"y_pred: row 2 \(counted from 0\) is {shown};"):
        evaluate_metrics([0, 1, 0, 1], [0.1, 0.2, value, math.nan], [metric], [0, 0, 0, 0])


def test_logloss_refuses_scores_that_are_no_probabilities() -> None:
    with pytest.raises(DataError, match=r"y_pred: row 1 \(counted from 0\) is -0.5, which is no probability"):
        evaluate_metrics([0, 1, 1], [0.1, -0.5, 3.0], ["AUC", "logloss"])
    assert auc([0, 1, 1], [0.1, -0.5, 3.0]) == 0.5


@pytest.mark.parametrize("value, shown", [(2.0, "2.0"), (-1.0, "-1.0"), (math.nan, "nan"), (0.5, "0.5")])
def test_labels_other_than_0_and_1(value: float, shown: str) -> None:
    with pytest.raises(DataError, match=rf"y_true: row 1 \(counted from 0\) is {shown}; labels must be 0 or 1"):
        auc([0, value, 1], [0.1, 0.2, 0.3])


def test_other_inputs_that_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="y_true has 2 rows and y_pred 3"):
        auc([0, 1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="group_id has 3 rows and y_true 2"):
        gauc([0, 1], [0.1, 0.2], [0, 1, 2])
    with pytest.raises(ValueError, match=r"y_pred has shape \(2, 2\)"):
        auc([0, 1], np.zeros((2, 2)))
    with pytest.raises(DataError, match="y_true: no rows"):
        logloss([], [])
    with pytest.raises(DataError, match="y_pred: is of type <U1; pass numbers"):
        auc([0, 1], ["a", "b"])
    with pytest.raises(DataError, match="group_id: mixes types"):
        gauc([0, 1], [0.1, 0.2], np.array(["a", 1], dtype=object))
