"""Slices of a split against their definitions, and what themes are read for."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_zoo.compat import FeatureMap
from model_zoo.experiment import slices as module
from model_zoo.experiment.exposure import _figures, exposure, exposure_rows, head_of
from model_zoo.experiment.record import write_json
from model_zoo.experiment.report import table
from model_zoo.experiment.run import build_model
from model_zoo.experiment.slices import Scored, Slicer, binned, category_feature, sessions, slice_rows
from model_zoo.pipeline.dataset import CTRDataset, Histories, Split
from model_zoo.pipeline.item_counts import training_counts
from model_zoo.pipeline.loader import SequenceLoader
from model_zoo.pipeline.metrics import evaluate_metrics

SETTINGS = settings(derandomize=True, deadline=None, max_examples=50)
USERS = [[1, 2, 2, 5], [], [3, 1, 4, 4, 2]]
TIMES = [[0, 1800, 3601, 3601], [], [10, 20, 9000, 20000, 20001]]
CATEGORY = np.array([0, 1, 1, 2, 2, 1], np.int32)


def histories(times: bool = True) -> Histories:
    flat = np.array([item for row in USERS for item in row], np.int32)
    seconds = np.array([time for row in TIMES for time in row], np.int64)
    return Histories(flat, np.cumsum([0, *map(len, USERS)]), None, seconds if times else None)


def dataset(times: bool = True, columns: dict[str, np.ndarray] | None = None) -> CTRDataset:
    columns = columns or {"item_id": np.arange(6, dtype=np.int32), "cate_id": CATEGORY}
    features = FeatureMap("toy", "")
    features.features = {name: {"type": "categorical", "source": "item"} for name in columns}
    split = Split(
        "test", "test", np.array([0, 0, 2, 2, 1], np.int32), np.array([1, 2, 3, 2, 5], np.int32),
        np.array([1, 4, 5, 2, 0], np.int32), np.array([1, 0, 1, 0, 1], np.float32), {}, np.array([7, 7, 9, 9, 8]),
    )  # fmt: skip
    return CTRDataset(features, columns, histories(times), {"train": replace(split, name="train"), "test": split}, {})


@SETTINGS
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60
    ),
    bins=st.integers(1, 5),
)
def test_a_bin_scores_as_its_rows_alone(rows: list[tuple[int, bool, int, int]], bins: int) -> None:
    values, label, score, group = (np.array(column) for column in zip(*rows))
    prediction = (score / 5).astype(np.float32)
    found = binned(values, Scored.of(prediction, label.astype(np.float32), group), bins)
    assert sum(entry["rows"] for entry in found) == len(rows) and 1 <= len(found) <= bins
    assert all(entry["to"] < after["from"] for entry, after in pairwise(found))
    for entry in found:
        inside = (values >= entry["from"]) & (values <= entry["to"])
        assert (int(values[inside].min()), int(values[inside].max())) == (entry["from"], entry["to"])
        assert (int(inside.sum()), int(label[inside].sum())) == (entry["rows"], entry["clicks"])
        expected = evaluate_metrics(label[inside], prediction[inside], ["AUC", "gAUC"], group[inside])
        for name, value in expected.items():
            assert entry[name] is None if math.isnan(value) else entry[name] == pytest.approx(value, abs=1e-12)


def test_bins_are_quantiles() -> None:
    random = np.random.default_rng(0)
    values, label = random.integers(0, 10_000, 20_000), random.random(20_000) < 0.3
    found = binned(values, Scored.of(random.random(20_000), label, None))
    assert len(found) == 5 and all(3_950 <= entry["rows"] <= 4_050 for entry in found)
    assert all("gAUC" not in entry for entry in found)
    heavy = binned(np.where(values < 5_000, 0, values), Scored.of(random.random(20_000), label, None))
    assert (heavy[0]["from"], heavy[0]["to"]) == (0, 0) and len(heavy) == 4  # half of the rows are one value


def literal_sessions(user: int, length: int, gap: int, by_time: bool) -> int:
    events = list(zip(USERS[user], TIMES[user]))[:length]
    breaks = [
        after[1] - before[1] > gap if by_time else CATEGORY[after[0]] != CATEGORY[before[0]]
        for before, after in pairwise(events)
    ]
    return bool(events) + sum(breaks)


@pytest.mark.parametrize("by_time", [True, False])
@pytest.mark.parametrize("events", [1, 3, 2**22])
def test_sessions_are_counted_up_to_the_impression(
    by_time: bool, events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVENTS", events)
    pairs = [(user, length) for user in (2, 0, 1) for length in range(len(USERS[user]) + 1)]
    user, seq_len = (np.array(side) for side in zip(*pairs))
    for gap in (0, 1800, 10**5):
        options: Any = {"gap": gap} if by_time else {"category": CATEGORY}
        found = sessions(histories(), user, seq_len, **options)
        assert found.tolist() == [literal_sessions(u, length, gap, by_time) for u, length in pairs]
    assert sessions(histories(), user[:0], seq_len[:0]).tolist() == []


def test_what_the_rows_of_a_split_are_sliced_by() -> None:
    found = Slicer.of(dataset()).values("test")
    assert found["history length"].tolist() == [1, 4, 5, 2, 0]
    assert found["sessions"].tolist() == [1, 2, 3, 1, 0]  # the step of 1,800 s does not cut, that of 1,801 s does
    assert found["item popularity"].tolist() == [1, 0, 1, 0, 1]
    assert Slicer.of(dataset(), session_gap=1799).values("test")["sessions"].tolist() == [1, 3, 3, 1, 0]
    by_category = Slicer.of(dataset(times=False))
    assert by_category.values("test")["sessions"].tolist() == [1, 1, 4, 2, 0]
    assert by_category.definitions["sessions"].startswith("runs of one cate_id in the history")
    unknown = Slicer.of(dataset(False, {"item_id": np.arange(6, dtype=np.int32)}))
    assert list(unknown.values("test")) == ["history length", "item popularity"]
    assert unknown.definitions["sessions"].startswith("not available: no event times")


def test_the_feature_that_groups_items() -> None:
    assert category_feature(dataset()) == "cate_id"
    flag = {"flag": np.array([0, 1, 1, 1, 1, 1], np.int32), "cate_id": CATEGORY}
    assert category_feature(dataset(columns=flag)) == "cate_id"  # one value alone groups nothing
    assert Slicer.of(dataset(columns=flag), "flag").category == "flag"


def test_training_counts() -> None:
    clicks, shown = training_counts(dataset())
    assert (clicks.tolist(), shown.tolist()) == ([0, 1, 0, 1, 0, 1], [0, 1, 2, 1, 0, 1])


def test_a_split_is_counted_once_and_its_table_shows_every_bin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slicer = Slicer.of(dataset())
    prediction, label, group = np.array([0.9, 0.2, 0.4, 0.6, 0.5]), np.array([1, 0, 1, 0, 1]), np.array([7, 7, 9, 9, 8])
    final = slicer.scores("test", prediction, label, group)
    monkeypatch.setattr(Slicer, "_counted", lambda self, split: pytest.fail("counted again"))
    slices = {"definitions": slicer.definitions, "final": {"test": final}}
    write_json(str(tmp_path / "record.json"), slices)
    assert json.loads((tmp_path / "record.json").read_text()) == slices
    header, rows = slice_rows(slices, "test")
    assert header == ["test", "from", "to", "rows", "clicks", "AUC", "gAUC"]
    assert [row[0] for row in rows if row[0]] == ["history length", "sessions", "item popularity"]
    assert rows[0][5:] == ["n/a", "n/a"]  # one row, one class
    ones = next(row for row in rows if row[0] == "item popularity")
    assert ones[1:] == ["0", "0", "2", "0", "n/a", "n/a"]
    slices["phase1"] = {"test": slicer.scores("test", 1 - prediction, label, group)}
    header, rows = slice_rows(slices, "test")
    assert header[-2:] == ["phase 1 AUC", "phase 1 gAUC"] and "n/a" in table(header, rows)
    assert all(len(row) == len(header) for row in rows)


# ---- exposure


@pytest.fixture(scope="module")
def mos(tiny_params: Any, tiny_dataset: CTRDataset) -> Any:
    params = tiny_params("MoS_TWIN_tiny")
    torch.manual_seed(0)
    model = build_model(params, tiny_dataset.feature_map, tiny_dataset)
    model.mos.set_fusion(0.25, 0.25)
    return model.eval()


@pytest.mark.parametrize("category", ["cate_id", None])
def test_exposure_counts_what_experts_read(mos: Any, tiny_dataset: CTRDataset, category: str | None) -> None:
    loader = SequenceLoader(tiny_dataset, "test", 32, 24)
    report = exposure(mos, loader, tiny_dataset, category, max_batches=2)
    column = np.arange(tiny_dataset.num_items) if category is None else tiny_dataset.item_columns[category]
    tokens, reads, served, aimed = Counter[int](), Counter[tuple[int, int]](), Counter[int](), Counter[tuple[int, int]]()
    router = mos.mos.item_router
    for batch, _ in zip(loader, range(2)):
        with torch.no_grad():
            _, _, sequence = mos._read(batch)
            routing = router(sequence)
        for row, history in enumerate(batch.history.tolist()):
            themes = routing.gates[row].nonzero().flatten().tolist() if any(history) else []
            served.update(themes)
            aimed.update((theme, int(column[batch.target[row]])) for theme in themes)
            for place, item in enumerate(history):
                if item:
                    tokens[int(column[item])] += 1
                    reads.update((t, int(column[item])) for t in themes if routing.members[row, place, t])
    head, held = set[int](), 0
    for kind, count in sorted(tokens.items(), key=lambda pair: (-pair[1], pair[0])):
        if held < sum(tokens.values()) / 2:
            head.add(kind)
            held += count
    assert (report["by"], report["categories"], report["head"]) == (category or "item", len(tokens), len(head))
    everything = sum(tokens[kind] for kind in head) / sum(tokens.values())
    assert report["item"]["head_share"] == pytest.approx(everything)
    for theme, found in enumerate(report["item"]["themes"]):
        mine = {kind: count for (t, kind), count in reads.items() if t == theme}
        total = sum(mine.values())
        assert (found["rows"], found["readings"]) == (served[theme], total)
        if not total:
            assert found["head_share"] is None and found["head_only"] is None
            continue
        share = sum(count for kind, count in mine.items() if kind in head) / total
        entropy = -sum(count / total * math.log(count / total) for count in mine.values())
        targets = {kind: count for (t, kind), count in aimed.items() if t == theme}
        assert found["head_share"] == pytest.approx(share)
        assert found["tail_ratio"] == pytest.approx((1 - share) / (1 - everything))
        assert found["head_only"] == ((1 - share) / (1 - everything) < 0.1)
        assert found["categories"] == pytest.approx(math.exp(entropy))
        aimed_head = sum(count for kind, count in targets.items() if kind in head)
        assert found["target_head_share"] == pytest.approx(aimed_head / sum(targets.values()))
        best = sorted(mine.items(), key=lambda pair: (-pair[1], pair[0]))[:5]
        assert found["top"] == [[kind, pytest.approx(count / total)] for kind, count in best]


def test_windows_are_read_by_the_category_of_most_of_their_items(mos: Any, tiny_dataset: CTRDataset) -> None:
    loader = SequenceLoader(tiny_dataset, "test", 32, 24)
    report = exposure(mos, loader, tiny_dataset, "cate_id", max_batches=1)
    batch = next(iter(loader))
    column = torch.from_numpy(tiny_dataset.item_columns["cate_id"]).long()
    with torch.no_grad():
        windows = mos.mos.windows(mos._read(batch)[2])
        routing = mos.mos.window_router(windows)
    readings: Counter[tuple[int, int]] = Counter()
    for row, history in enumerate(batch.history):
        items = column[history[history > 0].long()].tolist()
        count = int(windows.mask[row].sum())
        for number in range(count):  # from the newest
            end = len(items) - 2 * number
            kinds = Counter(items[max(end - 4, 0) : end])
            kind = min(k for k, times in kinds.items() if times == max(kinds.values()))
            for theme in routing.gates[row].nonzero().flatten().tolist():
                if routing.members[row, windows.mask.shape[1] - 1 - number, theme]:
                    readings[theme, kind] += 1
    for theme, found in enumerate(report["window"]["themes"]):
        mine = {kind: count for (t, kind), count in readings.items() if t == theme}
        assert found["readings"] == sum(mine.values())
        assert dict(found["top"]) == pytest.approx(
            dict(sorted(((k, c / sum(mine.values())) for k, c in mine.items()), key=lambda p: (-p[1], p[0]))[:5])
        )


def test_a_theme_that_reads_the_head_alone_is_called_so() -> None:
    total = {
        "tokens": torch.tensor([9, 60, 30, 10]),  # category 0 is none
        "readings": torch.tensor([[5, 97, 2, 1], [0, 10, 9, 1], [4, 0, 0, 0], [0, 0, 5, 5]]),
        "targets": torch.tensor([[0, 3, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]),
        "rows": torch.tensor([4, 2, 0, 1]),
    }
    figures = _figures(total, torch.tensor([1]))
    assert figures["head_share"] == 0.6
    themes = figures["themes"]
    assert [theme["head_only"] for theme in themes] == [True, False, None, False]
    ratios = [pytest.approx(0.075), pytest.approx(1.25), None, pytest.approx(2.5)]
    assert [theme["tail_ratio"] for theme in themes] == ratios
    assert [theme["target_head_share"] for theme in themes] == [0.75, None, None, 0.0]
    header, rows = exposure_rows({"item": figures})
    assert [row[0] for row in rows] == ["item 0", "item 1", "item 2", "item 3"]
    assert [row[-1] for row in rows] == ["head only", "head and tail", "n/a", "head and tail"]
    assert all(len(row) == len(header) for row in rows)


@pytest.mark.parametrize(
    "frequency, head", [([0, 2, 5, 3], [2]), ([0, 4, 3, 3], [1, 2]), ([0, 1, 1, 1, 1], [1, 2]), ([0, 0, 1], [2])]
)
def test_the_head_is_the_fewest_categories_that_hold_half(frequency: list[int], head: list[int]) -> None:
    assert head_of(torch.tensor(frequency)).tolist() == head


def test_a_backbone_has_no_themes(tiny_dataset: CTRDataset, tiny_params: Any) -> None:
    plain = build_model(tiny_params(), tiny_dataset.feature_map, tiny_dataset)
    assert exposure(plain, SequenceLoader(tiny_dataset, "test", 64, 24), tiny_dataset, "cate_id") == {}
    assert exposure_rows({})[1] == []
