"""Whole runs with session windows and taxonomy-guided themes; what every record says of parts of its splits."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from model_zoo.batch import MEAN_ROWS
from model_zoo.errors import ConfigError
from model_zoo.experiment.flops import block_flops
from model_zoo.experiment.run import build_model, make_loaders
from model_zoo.layers.timed_sequence import TimedSequence
from model_zoo.layers.windows import CATEGORY
from model_zoo.pipeline.dataset import CTRDataset, load_dataset
from model_zoo.pipeline.feature_map import build_feature_map

Params = Callable[..., dict[str, Any]]
SESSIONS = {"windows": "session", "time_col": "seen"}
TAXONOMY = {"codebook_init": "taxonomy", "taxonomy_feature": "cate_id", "taxonomy_weight": 0.1}


@pytest.fixture(scope="module")
def user_info(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny users with times: a new session's first event comes an hour later."""
    table = pl.read_parquet(tiny_folder / "user_info.parquet")
    with np.load(tiny_folder / "truth.npz") as truth:
        session, offsets = truth["session_id"], truth["offsets"]
    seconds = np.cumsum(np.where(np.diff(session, prepend=session[:1]) != 0, 3600, 60))
    lists = [seconds[start:end].tolist() for start, end in pairwise(offsets)]
    path = tmp_path_factory.mktemp("timed") / "user_info.parquet"
    table.with_columns(pl.Series("seen", lists, dtype=pl.List(pl.Int64))).write_parquet(path)
    return str(path)


def loaded(params: dict[str, Any]) -> tuple[Any, CTRDataset]:
    dataset = load_dataset(build_feature_map(params), params)
    torch.manual_seed(0)
    return build_model(params, dataset.feature_map, dataset), dataset


@pytest.fixture(scope="module")
def finished(cli_run: Any, user_info: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a run with both, by sessions and by category."""
    return cli_run(tmp_path_factory.mktemp("run"), user_info=user_info, **SESSIONS, **TAXONOMY)


@pytest.fixture(scope="module")
def cli_run(tiny_config: Path) -> Any:
    from model_zoo.experiment.cli import main

    def run(folder: Path, **settings: Any) -> dict[str, Any]:
        settings = {"model_root": str(folder), "kmeans_tokens": 500, **settings}
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        assert main(str(folder), ["--config", str(tiny_config), "--expid", "MoS_TWIN_tiny", *options]) == 0
        (path,) = folder.glob("tiny/MoS_TWIN_tiny/*/metrics.json")
        return {**json.loads(path.read_text()), "log": (path.parent / "run.log").read_text()}

    return run


def test_a_run_with_sessions_and_taxonomy_records_its_slices(finished: dict[str, Any]) -> None:
    slices = finished["slices"]
    assert slices["definitions"]["sessions"].startswith("sessions in the history: more than 1800 s")
    for phase in ("final", "phase1"):
        for split in ("valid", "test"):
            bins = slices[phase][split]
            assert list(bins) == ["history length", "sessions", "item popularity"]
            assert all(sum(entry["rows"] for entry in found) == 400 for found in bins.values())
    assert finished["exposure"]["by"] == "cate_id" and len(finished["exposure"]["window"]["themes"]) == 4
    starts = [f"categories (cate_id) as the start of the {name} codebook" for name in ("item", "window")]
    for text in (*starts, "head share", "phase 1 gAUC"):
        assert text in finished["log"]
    final = finished["scores"]["final"]["test"]
    assert set(final) == {"gAUC", "AUC", "logloss"}


def test_a_model_reads_times_and_categories_of_its_batches(tiny_params: Params, user_info: str) -> None:
    params = tiny_params("MoS_TWIN_tiny", user_info=user_info, **SESSIONS, **TAXONOMY)
    model, dataset = loaded(params)
    batch = next(iter(make_loaders(dataset, params)["valid"]))
    _, _, sequence = model._read(batch)
    assert isinstance(sequence, TimedSequence)
    assert torch.equal(sequence.times[sequence.mask], batch.history_time[batch.history > 0])
    column = torch.from_numpy(dataset.item_columns["cate_id"]).long()
    kinds = sequence.memo[CATEGORY][sequence.index]
    assert torch.equal(kinds[sequence.mask], column[batch.history.long()][sequence.mask])
    windows = model.mos.windows(sequence)
    pauses = (batch.history_time.diff(dim=1) > 1800) & (batch.history[:, :-1] > 0)
    assert windows.mask.sum(1).tolist() == (pauses.sum(1) + (batch.history > 0).any(1)).tolist()
    # rows that share their history predict as rows of their own
    model.mos.set_fusion(0.25, 0.25)
    copies = batch.select(torch.arange(8).repeat_interleave(10 * MEAN_ROWS))
    with torch.no_grad():
        together, alone = model.eval().forward(copies)["y_pred"], model.forward(batch.select(torch.arange(8)))["y_pred"]
    torch.testing.assert_close(together.view(8, -1), alone.expand(-1, 10 * MEAN_ROWS), rtol=0, atol=2e-6)
    assert block_flops(model, batch.select(torch.arange(4))).block.training.total > 0


def test_off_the_model_trains_as_if_there_were_neither_times_nor_taxonomy(tiny_params: Params, user_info: str) -> None:
    weights = []
    for changes in ({}, {"user_info": user_info, "time_col": "seen", "taxonomy_feature": "cate_id"}):
        params = tiny_params("MoS_TWIN_tiny", **changes)
        model, dataset = loaded(params)
        loaders = make_loaders(dataset, params)
        model.mos.set_fusion(0.25, 0.25, update_codebooks=True)
        model.start_experts(loaders["train"])
        model.train()
        for batch, _ in zip(loaders["train"], range(2)):
            model._batch_index, model._max_gradient_norm = 0, 10.0
            model.train_step(batch)
        weights.append(model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("start", ["taxonomy", "kmeans"])
def test_codebooks_start_from_categories_and_the_table_travels(tiny_params: Params, start: str, tmp_path: Path) -> None:
    params = tiny_params("MoS_TWIN_tiny", **{**TAXONOMY, "codebook_init": start})
    model, dataset = loaded(params)
    model.start_experts(make_loaders(dataset, params)["train"])
    for router in (model.mos.item_router, model.mos.window_router):
        known = router.taxonomy.themes.any(1)
        assert known.any() and not known[0]
    model.save_weights(str(tmp_path / "a.model"))
    other, _ = loaded(params)
    other.load_weights(str(tmp_path / "a.model"))
    assert torch.equal(other.mos.item_router.taxonomy.themes, model.mos.item_router.taxonomy.themes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"windows": "session"}, "windows: session needs the times of events; name their list column"),
        (
            {**TAXONOMY, "taxonomy_feature": "user_index"},
            "taxonomy_feature: user_index: no categorical item feature; choose from item_id, cate_id",
        ),
        ({**TAXONOMY, "kmeans_tokens": 0}, "taxonomy_feature needs kmeans_tokens above 0"),
        ({**TAXONOMY, "taxonomy_feature": None}, "taxonomy_weight needs taxonomy_feature"),
        ({"category_col": "cate"}, "category_col: cate: no categorical item feature; choose from item_id, cate_id"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(
    tiny_params: Params, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_params("MoS_TWIN_tiny", **changes)
