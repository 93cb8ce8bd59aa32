import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from model_zoo.errors import DataError
from model_zoo.pipeline import synthetic_files
from model_zoo.pipeline.metrics import auc
from model_zoo.pipeline.synthetic import (
    HOPPING,
    LOGITS,
    MICROVIDEO,
    PAUSE,
    RECENT,
    SPLITS,
    STEP,
    TINY,
    SyntheticData,
    SyntheticSpec,
    ceiling_auc,
    generate,
)
from model_zoo.pipeline.synthetic_files import write

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "synthetic.py"
#: sums of TINY's arrays
DRAWN = [613964, 1467, 48449]
LARGER = replace(TINY, users=1_000, rows=(20_000, 4_000, 4_000), themes=6, seed=7)


@pytest.fixture(scope="module")
def tiny() -> SyntheticData:
    return generate(TINY)


@pytest.fixture(scope="module")
def larger() -> SyntheticData:
    return generate(LARGER)


def arrays(data: SyntheticData) -> dict[str, np.ndarray]:
    flat = {name: getattr(data, name) for name in ("history", "offsets", "session_id", "session_theme", "time")}
    flat.update({f"items.{name}": value for name, value in vars(data.items).items()})
    return flat | {f"{split}.{name}": value for split, rows in data.rows.items() for name, value in vars(rows).items()}


def event_users(data: SyntheticData) -> np.ndarray:
    return np.repeat(np.arange(data.spec.users), np.diff(data.offsets))


def test_the_same_spec_gives_the_same_arrays_and_another_seed_other_ones(tiny: SyntheticData) -> None:
    again, other = arrays(generate(TINY)), arrays(generate(replace(TINY, seed=TINY.seed + 1)))
    for name, value in arrays(tiny).items():
        assert value.dtype == again[name].dtype
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    assert not np.array_equal(tiny.items.image, other["items.image"])
    assert not np.array_equal(tiny.rows["train"].item_index, other["train.item_index"])


@pytest.mark.parametrize("spec", [TINY, replace(TINY, items=5, categories=5, image_dim=1), replace(TINY, themes=2)])
def test_layout(spec: SyntheticSpec) -> None:
    data = generate(spec)
    items, lengths = data.items, np.diff(data.offsets)
    assert (items.cate_id[0], items.theme[0], np.abs(items.image[0]).sum()) == (0, -1, 0)
    assert items.image.shape == (spec.items, spec.image_dim) and items.image.dtype == np.float32
    assert set(items.theme[1:]) == set(range(spec.themes))
    assert items.cate_id[1:].min() >= 1 and items.cate_id.max() < spec.categories
    assert ((items.cate_id[1:] - 1) % spec.themes == items.theme[1:]).all()  # no category has two themes
    assert len(lengths) == spec.users and lengths.min() >= 1 and lengths.max() <= spec.history_max
    assert data.history.dtype == np.int32 and data.offsets.dtype == np.int64
    assert data.history.min() >= 1 and data.history.max() < spec.items
    for split, size in zip(SPLITS, spec.rows):
        rows = data.rows[split]
        assert {len(column) for column in vars(rows).values()} == {size}
        assert rows.user_index.min() >= 0 and rows.user_index.max() < spec.users
        assert rows.item_index.min() >= 1 and rows.item_index.max() < spec.items
        assert rows.seq_len.min() >= 1 and (rows.seq_len <= lengths[rows.user_index]).all()
        assert set(rows.is_click) == {0, 1}


@pytest.mark.parametrize("coherence", [0.0, 0.6, 0.9, 1.0])
def test_events_follow_the_theme_of_their_session_at_the_stated_rate(coherence: float) -> None:
    data = generate(replace(LARGER, coherence=coherence))
    share = (data.items.theme[data.history] == data.session_theme).mean()
    assert share == pytest.approx(coherence, abs=4 * np.sqrt(coherence * (1 - coherence) / len(data.history)))


def test_sessions_are_runs_of_one_theme_and_consecutive_ones_differ(larger: SyntheticData) -> None:
    users, ids, themes = event_users(larger), larger.session_id, larger.session_theme
    np.testing.assert_array_equal(np.unique(ids), np.arange(ids[-1] + 1))
    new = np.diff(ids) == 1
    same_user = users[1:] == users[:-1]
    assert new[~same_user].all()
    assert (themes[1:][~new] == themes[:-1][~new]).all()
    assert (themes[1:][new & same_user] != themes[:-1][new & same_user]).all()
    assert 1 / new[same_user].mean() == pytest.approx(LARGER.session_length, rel=0.03)  # geometric: a constant hazard
    liked = np.array([len(set(themes[users == user])) for user in range(LARGER.users)])
    assert liked.max() == 4 and (liked[np.diff(larger.offsets) > 60] >= 2).all()


def test_without_hopping_a_user_lives_in_one_session_on_one_theme() -> None:
    data = generate(replace(LARGER, session_length=float("inf")))
    np.testing.assert_array_equal(data.session_id, event_users(data))
    assert (data.session_theme == data.session_theme[data.offsets[:-1]][data.session_id]).all()
    assert ceiling_auc(data) > ceiling_auc(generate(LARGER))


def test_times_are_minutes_apart_in_a_session_and_hours_between_two(larger: SyntheticData) -> None:
    gaps, users = np.diff(larger.time), event_users(larger)
    within = np.diff(larger.session_id) == 0
    between = ~within & (users[1:] == users[:-1])
    assert larger.time.dtype == np.int64 and larger.time.min() > 1.6e9
    assert STEP[0] <= gaps[within].min() and gaps[within].max() < STEP[1] < 1800
    assert 1800 < PAUSE[0] <= gaps[between].min() and gaps[between].max() < PAUSE[1]


def test_nothing_else_depends_on_the_times(monkeypatch: pytest.MonkeyPatch, tiny: SyntheticData) -> None:
    monkeypatch.setattr("model_zoo.pipeline.synthetic.PAUSE", (7200, 7201))
    others = arrays(generate(TINY))
    for name, value in arrays(tiny).items():
        assert np.array_equal(value, others[name]) == (name != "time"), name
    # what this generator drew before there were times
    assert [int(tiny.history.sum()), int(tiny.session_id[-1]), int(tiny.rows["test"].item_index.sum())] == DRAWN


def test_paired_sets_differ_in_their_sessions_alone() -> None:
    spec = replace(LARGER, paired=True)
    weak, strong = (generate(replace(spec, session_length=length)) for length in (float("inf"), 2.5))
    for name in ("offsets", *(f"items.{name}" for name in vars(weak.items))):
        np.testing.assert_array_equal(arrays(weak)[name], arrays(strong)[name])
    for split in SPLITS:
        one, other = weak.rows[split], strong.rows[split]
        np.testing.assert_array_equal(one.user_index, other.user_index)
        np.testing.assert_array_equal(one.seq_len, other.seq_len)
        assert 0.4 < (one.item_index == other.item_index).mean() < 0.9
    alone = generate(replace(LARGER, session_length=2.5))
    assert not np.array_equal(alone.rows["train"].user_index, strong.rows["train"].user_index)
    assert HOPPING.paired and not LARGER.paired


def test_rows_are_in_time_order_per_user_over_and_within_the_splits(larger: SyntheticData) -> None:
    latest = np.zeros(LARGER.users, int)
    for split in SPLITS:
        rows = larger.rows[split]
        for user, seq_len in zip(rows.user_index, rows.seq_len):
            assert seq_len >= latest[user]
            latest[user] = seq_len


def test_half_of_the_targets_are_of_the_current_session(larger: SyntheticData) -> None:
    rows = larger.rows["train"]
    now = larger.session_theme[larger.offsets[rows.user_index] + rows.seq_len - 1]
    share = (larger.items.theme[rows.item_index] == now).mean()
    assert share == pytest.approx(0.5 + 0.25 / LARGER.themes, abs=0.015)


def test_themes_beat_popularity_and_stay_below_the_ceiling(larger: SyntheticData) -> None:
    rows, item_theme = larger.rows["train"], larger.items.theme
    events = np.bincount(larger.history, minlength=LARGER.items)
    begin = larger.offsets[rows.user_index]
    last = begin[:, None] + np.maximum(rows.seq_len[:, None] - np.arange(1, 9), 0)
    session_match = (item_theme[larger.history[last]] == item_theme[rows.item_index][:, None]).mean(axis=1)
    by_popularity, by_theme = auc(rows.is_click, events[rows.item_index]), auc(rows.is_click, session_match)
    assert 0.5 < by_popularity < 0.6
    assert by_popularity + 0.05 < by_theme < ceiling_auc(larger, "train")
    assert ceiling_auc(larger) > 0.7


def test_clicks_are_drawn_from_click_probability_as_documented(tiny: SyntheticData) -> None:
    """The probability of every row, worked out row by row."""
    logits, items = LOGITS, tiny.items
    log_popularity = np.log(items.popularity[1:])
    for rows in tiny.rows.values():
        for i in range(0, len(rows.is_click), 7):
            begin, target = tiny.offsets[rows.user_index[i]], rows.item_index[i]
            seen = slice(begin, begin + rows.seq_len[i])
            themes = tiny.session_theme[seen]
            logit = logits["bias"]
            if items.theme[target] == themes[-1]:
                logit += logits["session"]
            elif items.theme[target] in themes[-RECENT :]:
                logit += logits["recent"]
            logit += logits["category"] * np.log1p((items.cate_id[tiny.history[seen]] == items.cate_id[target]).sum())
            fame = (np.log(items.popularity[target]) - log_popularity.mean()) / log_popularity.std()
            logit += logits["popularity"] * fame
            expected = (1 - TINY.label_noise) / (1 + np.exp(-logit)) + TINY.label_noise / 2
            assert rows.click_probability[i] == pytest.approx(expected, rel=1e-12)
    clicks = np.concatenate([rows.is_click for rows in tiny.rows.values()])
    probability = np.concatenate([rows.click_probability for rows in tiny.rows.values()])
    spread = np.sqrt((probability * (1 - probability)).sum())
    assert abs(clicks.sum() - probability.sum()) < 4 * spread


def test_label_noise_lowers_the_ceiling() -> None:
    noisy = generate(replace(LARGER, label_noise=0.5))
    assert 0.55 < ceiling_auc(noisy) < ceiling_auc(generate(replace(LARGER, label_noise=0.0))) - 0.05
    assert ceiling_auc(generate(replace(LARGER, label_noise=1.0))) == 0.5


@pytest.mark.parametrize("separation", [0.0, 1.0, 3.0])
def test_separation_is_the_distance_of_centroids_over_the_spread_within(separation: float) -> None:
    spec = replace(TINY, items=20_001, categories=101, themes=100, image_dim=64, separation=separation, rows=(1, 0, 0))
    items = generate(spec).items
    centroid = np.stack([items.image[items.theme == theme].mean(axis=0) for theme in range(spec.themes)])
    within = np.sqrt(((items.image[1:] - centroid[items.theme[1:]]) ** 2).sum(axis=1).mean())
    pairs = ((centroid[:, None] - centroid) ** 2).sum(axis=-1)[~np.eye(spec.themes, dtype=bool)]
    assert within == pytest.approx(1, rel=0.02)
    assert np.sqrt(pairs.mean()) / within == pytest.approx(separation, abs=0.15)


def test_auc_is_sklearns() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=500), rng.integers(20, size=500) / 7  # many ties
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert np.isnan(auc(np.ones(3), np.arange(3)))


def test_parquet_round_trip(tiny: SyntheticData, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tiny"
    write(tiny, folder)
    write(tiny, folder)  # over an older copy
    assert sorted(path.name for path in folder.iterdir()) == [
        *("item_info.parquet", "test.parquet", "train.parquet", "truth.npz", "user_info.parquet", "valid.parquet")
    ]
    users, items = pq.read_table(folder / "user_info.parquet"), pq.read_table(folder / "item_info.parquet")
    assert users["user_index"].to_pylist() == list(range(TINY.users))
    sequences = users["full_item_seq"].to_pylist()
    assert [item for sequence in sequences for item in sequence] == tiny.history.tolist()
    assert [len(sequence) for sequence in sequences] == np.diff(tiny.offsets).tolist()
    times = users["full_time_seq"].to_pylist()
    assert [len(each) for each in times] == [len(each) for each in sequences]
    assert [time for each in times for time in each] == tiny.time.tolist()
    assert items.column_names == ["item_index", "item_id", "cate_id", "image_emb_dim16"]
    assert items["item_index"].to_pylist() == items["item_id"].to_pylist() == list(range(TINY.items))
    np.testing.assert_array_equal(items["cate_id"].to_numpy(), tiny.items.cate_id)
    np.testing.assert_array_equal(items["image_emb_dim16"].to_pylist(), tiny.items.image)
    truth = np.load(folder / "truth.npz")
    np.testing.assert_array_equal(truth["item_theme"], tiny.items.theme)
    np.testing.assert_array_equal(truth["session_id"], tiny.session_id)
    np.testing.assert_array_equal(truth["theme"], tiny.session_theme)
    np.testing.assert_array_equal(truth["offsets"], tiny.offsets)
    for split, rows in tiny.rows.items():
        table = pq.read_table(folder / f"{split}.parquet")
        assert table.column_names == ["user_index", "item_index", "seq_len", "is_click"]
        for name in table.column_names:
            np.testing.assert_array_equal(table[name].to_numpy(), getattr(rows, name))
        np.testing.assert_array_equal(truth[f"{split}_click_probability"], rows.click_probability)


def test_a_failed_write_leaves_nothing(tiny: SyntheticData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic_files.np, "savez_compressed", full_disk)
    with pytest.raises(DataError, match="No space left on device"):
        write(tiny, tmp_path)
    assert list(tmp_path.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="file cannot be written"):
        write(tiny, blocked)


@pytest.mark.parametrize(
    "change",
    [
        {"users": 0},
        {"items": 4},
        {"categories": 4},
        {"image_dim": 0},
        {"themes": 1},
        {"rows": (10, -1, 5)},
        {"rows": (0, 1, 1)},
        {"rows": (10, 5)},
        {"history_max": 0, "history_mean": 0.0},
        {"history_mean": 500.0},
        {"history_mean": float("nan")},
        {"session_length": 0.5},
        {"session_length": float("nan")},
        {"coherence": 1.2},
        {"separation": -1.0},
        {"label_noise": -0.1},
        {"seed": -1},
        {"users": 10**9},
    ],
)
def test_impossible_values_are_one_sentence(change: dict) -> None:
    with pytest.raises(DataError) as caught:
        replace(TINY, **change)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and "must be" in message


def test_preset_has_the_size_of_microvideo() -> None:
    assert (MICROVIDEO.users, MICROVIDEO.items, MICROVIDEO.categories, MICROVIDEO.image_dim) == (10986, 24323, 514, 64)
    assert sum(MICROVIDEO.rows) == 400_000


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_command_line(tiny: SyntheticData, tmp_path: Path) -> None:
    folder = tmp_path / "tiny_set"
    done = run("--out", folder, "--preset", "tiny")
    assert done.returncode == 0, done.stderr
    report, config = done.stdout.split("\n\n")
    assert f"ceiling AUC {ceiling_auc(tiny):.4f}" in report and "click rate" in report and "seconds" in report
    (name, entry), *others = yaml.safe_load(config).items()
    assert name == "tiny_set" and not others
    assert entry["label_col"]["name"] == "is_click" and entry["time_col"] == "full_time_seq"
    for key in ("train_data", "valid_data", "test_data", "user_info", "item_info"):
        assert Path(entry[key]).is_file()
    columns = {column["name"]: column for column in entry["feature_cols"]}
    assert [columns[key]["type"] for key in ("user_index", "item_index", "seq_len")] == ["meta"] * 3
    assert columns["item_id"]["vocab_size"] == TINY.items and columns["cate_id"]["vocab_size"] == TINY.categories
    assert columns["image_emb_dim16"] | {"active": True} == {
        **{"name": "image_emb_dim16", "active": True, "dtype": "float", "type": "embedding", "source": "item"},
        **{"embedding_dim": 16, "feature_encoder": "nn.Identity()"},
    }


def test_command_line_options_override_the_preset(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = "--preset tiny --users 50 --rows 300 60 40 --history-max 20 --themes 3 --seed 1 --coherence 1".split()
    options += "--session-length inf --paired".split()
    assert synthetic_files.main(["--out", str(tmp_path), *options]) == 0
    assert "50 users" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "user_info.parquet").num_rows == 50
    assert [pq.read_table(tmp_path / f"{split}.parquet").num_rows for split in SPLITS] == [300, 60, 40]
    truth = np.load(tmp_path / "truth.npz")
    assert truth["session_id"][-1] == 49
    assert truth["item_theme"].max() == 2 and np.diff(truth["offsets"]).max() <= 20


def test_command_line_answers_bad_values_with_one_sentence_and_code_2(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "no", "--preset", "tiny", "--items", 4)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "items is 4" in done.stderr
    assert not (tmp_path / "no").exists()
