"""AUC, grouped AUC, logloss, MRR and NDCG: exact, in vectorised numpy, one sort for all groups.

Each row becomes one 64-bit key: group code (31 bits), a code that orders as the predictions do (32), the label (1).
Sorting the keys puts every group, and every run of equal predictions inside it, next to each other, and the sorted keys
alone hold all that a rank statistic needs. The AUC counts are integers, so ties count exactly one half and the order of
the rows changes nothing.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline.group_ranks import GROUP_SHIFT, Codes, Groups, Ranking, Values, group_codes, score_codes

Bools = npt.NDArray[np.bool_]

KNOWN_METRICS = ("AUC", "gAUC", "avgAUC", "logloss", "binary_crossentropy", "MRR", "NDCG@k")

_NDCG = re.compile(r"NDCG(?:@0*([1-9]\d*)|\(\s*(?:k\s*=\s*)?0*([1-9]\d*)\s*\))")
_LOGLOSS = frozenset(("logloss", "binary_crossentropy"))
_UNGROUPED = _LOGLOSS | {"AUC"}
_logger = logging.getLogger("model_zoo")


def auc(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counted half.

    Args:
        y_true: ``[N]`` labels, 0 or 1.
        y_pred: ``[N]`` finite scores of any scale.

    Returns:
        The area, or nan and a logged warning where only one class is present.

    Raises:
        DataError: no rows, a label that is neither 0 nor 1, a prediction that is not finite.
        ValueError: the lengths differ.
    """
    return evaluate_metrics(y_true, y_pred, ["AUC"])["AUC"]


def gauc(y_true: npt.ArrayLike, y_pred: npt.ArrayLike, group_id: npt.ArrayLike) -> float:
    """Mean of the groups' AUCs weighted by their rows, over the groups that hold both classes (DIN, section 5.3).

    Args:
        y_true: ``[N]`` labels, 0 or 1.
        y_pred: ``[N]`` finite scores of any scale.
        group_id: ``[N]`` integers or strings, rows in any order.

    Returns:
        The mean, or nan and a logged warning where every group holds a single class.

    Raises:
        DataError, ValueError: as ``auc``.
    """
    return evaluate_metrics(y_true, y_pred, ["gAUC"], group_id)["gAUC"]


def avg_auc(y_true: npt.ArrayLike, y_pred: npt.ArrayLike, group_id: npt.ArrayLike) -> float:
    """Plain mean of the AUCs of the groups that hold both classes (FuxiCTR's ``avgAUC``); otherwise as ``gauc``."""
    return evaluate_metrics(y_true, y_pred, ["avgAUC"], group_id)["avgAUC"]


def logloss(y_true: npt.ArrayLike, y_pred: npt.ArrayLike, eps: float | None = None) -> float:
    """Mean binary cross entropy in nats, computed in float64 whatever the input.

    Args:
        y_true: ``[N]`` labels, 0 or 1; one class alone is allowed.
        y_pred: ``[N]`` probabilities of label 1.
        eps: probabilities are clipped to ``[eps, 1 - eps]``. Default: the machine epsilon of the dtype of ``y_pred``
            (1.2e-7 for float32, 2.2e-16 for float64 and integers), as scikit-learn does. LongCTR's recorded runs used
            1e-7.

    Raises:
        DataError: as ``auc``, and for a prediction outside [0, 1].
        ValueError: the lengths differ, or ``eps`` is not between 0 and 0.5.
    """
    label, prediction = _checked(y_true, y_pred)
    return _logloss(label, prediction, eps)


def check_metrics(metrics: Sequence[str], grouped: bool) -> None:
    """Refuse metric names that ``evaluate_metrics`` cannot compute.

    Args:
        metrics: names, see ``evaluate_metrics``.
        grouped: whether there is a group id.

    Raises:
        ConfigError: an unknown name, or a grouped metric without a group id.
    """
    if isinstance(metrics, str):
        raise ConfigError(f"metrics: '{metrics}' is a string; write a list, [{metrics}]")
    for name in metrics:
        if name not in KNOWN_METRICS[:-1] and not _NDCG.fullmatch(str(name)):
            lowered = {known.lower(): known for known in KNOWN_METRICS}
            near = lowered[difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.0)[0]]
            raise ConfigError(
                f"metrics: '{name}' is not known, the nearest is '{near}'; choose from {', '.join(KNOWN_METRICS)} "
                "(k a whole number from 1)"
            )
        if not grouped and name not in _UNGROUPED:
            raise ConfigError(
                f"metrics: '{name}' is computed group by group and there is no group id; set group_id: to a column, "
                f"or use 'AUC' in place of '{name}'"
            )


def evaluate_metrics(
    y_true: npt.ArrayLike,
    y_pred: npt.ArrayLike,
    metrics: Sequence[str],
    group_id: npt.ArrayLike | None = None,
    logloss_eps: float | None = None,
) -> dict[str, float]:
    """Several metrics of one set of predictions, with FuxiCTR's names and definitions.

    ``AUC``, ``gAUC``, ``avgAUC`` and ``logloss`` (alias ``binary_crossentropy``) are the functions of this module.
    ``MRR`` is, in each group, the mean of 1 / rank over the positives, and ``NDCG@k`` (or ``NDCG(k=5)``, ``NDCG(5)``)
    the discounted gain of the k best ranked rows over the best possible one; both are plain means over *all* groups,
    where a group without a positive counts as 0. Rank 1 is the highest prediction; of equal predictions the later row
    ranks first. That is FuxiCTR's ``argsort()[::-1]`` with a stable sort; FuxiCTR's own leaves the order of ties open.
    So MRR and NDCG, unlike the AUCs, depend on the order of the rows where predictions tie.

    Args:
        y_true: ``[N]`` labels, 0 or 1.
        y_pred: ``[N]`` finite scores; probabilities where logloss is asked for.
        metrics: the names.
        group_id: ``[N]`` integers or strings, rows in any order; needed by all but AUC and logloss.
        logloss_eps: as ``eps`` of ``logloss``.

    Returns:
        ``{name: value}`` in the order of ``metrics``. A metric that needs both classes is nan where no group (for AUC:
        the whole set) has both; one warning says so.

    Raises:
        ConfigError: as ``check_metrics``.
        DataError, ValueError: as ``logloss``.
    """
    check_metrics(metrics, group_id is not None)
    label, prediction = _checked(y_true, y_pred)
    ids = None if group_id is None else _vector(group_id, "group_id")
    if ids is not None and len(ids) != len(label):
        raise ValueError(f"group_id has {len(ids)} rows and y_true {len(label)}")
    values: dict[str, float] = dict.fromkeys(metrics, math.nan)
    for name in _LOGLOSS & values.keys():
        values[name] = _logloss(label, prediction, logloss_eps)
    if _LOGLOSS.issuperset(values):
        return values

    keys = score_codes(prediction) << np.uint64(1) | label
    if "AUC" in values:
        values["AUC"] = float(Groups.count(keys).auc[0])
        if math.isnan(values["AUC"]):
            _logger.warning("AUC is nan: all %d labels are %d.", len(label), label[0])
    if ids is not None and not _UNGROUPED.issuperset(values):
        _fill_grouped(values, group_codes(ids) << GROUP_SHIFT | keys)
    return values


def _fill_grouped(values: dict[str, float], keys: Codes) -> None:
    """Replace the grouped metrics of ``{name: nan}`` by those of unsorted keys ``[N]``."""
    by_auc = [name for name in values if name in ("gAUC", "avgAUC")]
    by_rank = [name for name in values if name not in by_auc and name not in _UNGROUPED]
    if by_auc:
        groups = Groups.count(keys)
        both = ~np.isnan(groups.auc)
        aucs, rows = groups.auc[both], groups.rows[both]
        if not len(aucs):
            message = "%s: nan, as each of the %d groups holds a single class; choose another group_id."
            _logger.warning(message, ", ".join(by_auc), len(both))
            by_auc = []
        for name in by_auc:
            weight = rows if name == "gAUC" else np.ones_like(rows)
            # fsum rounds once, so numbering the groups otherwise does not move the last digit.
            values[name] = math.fsum(aucs * weight) / int(weight.sum())
    if by_rank:
        ranking = Ranking.of(keys)
        for name in by_rank:
            cutoff = _NDCG.fullmatch(name)
            values[name] = ranking.ndcg(int(cutoff[1] or cutoff[2])) if cutoff else ranking.mrr()


def _logloss(label: Bools, prediction: Values, eps: float | None) -> float:
    if eps is None:
        eps = float(np.finfo(prediction.dtype.name if prediction.dtype.kind == "f" else "float64").eps)
    if not 0 < eps < 0.5:
        raise ValueError(f"eps={eps} must be between 0 and 0.5")
    probability = prediction.astype(np.float64)
    if probability.min() < 0 or probability.max() > 1:
        row = int(np.argmax((probability < 0) | (probability > 1)))
        raise DataError(
            f"y_pred: row {row} (counted from 0) is {probability[row]:g}, which is no probability; "
            "apply a sigmoid to the scores or leave logloss out of metrics:"
        )
    np.clip(probability, eps, 1 - eps, out=probability)
    return -float(np.log(np.where(label, probability, 1 - probability)).mean())


def _checked(y_true: npt.ArrayLike, y_pred: npt.ArrayLike) -> tuple[Bools, Values]:
    """Labels and predictions ``[N]``, N > 0, the predictions finite and in the dtype they came in."""
    true, prediction = _numbers(y_true, "y_true"), _numbers(y_pred, "y_pred")
    if len(true) != len(prediction):
        raise ValueError(f"y_true has {len(true)} rows and y_pred {len(prediction)}")
    if not len(true):
        raise DataError("y_true: no rows, so nothing can be scored; check that the split is not empty")
    label = true == 1
    other = ~label & (true != 0)
    if other.any():
        row = int(np.argmax(other))
        raise DataError(f"y_true: row {row} (counted from 0) is {true[row]}; labels must be 0 or 1")
    finite = np.isfinite(prediction)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DataError(
            f"y_pred: row {row} (counted from 0) is {prediction[row]}; the model has diverged or its input holds such "
            "a value, so check the features or lower learning_rate:"
        )
    return label, prediction


def _numbers(values: npt.ArrayLike, name: str) -> Values:
    array = _vector(values, name)
    if array.dtype.kind in "biuf":
        return array
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name}: is of type {array.dtype}; pass numbers") from None


def _vector(values: npt.ArrayLike, name: str) -> Values:
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; it must be [N] or [N, 1]")
    return array
