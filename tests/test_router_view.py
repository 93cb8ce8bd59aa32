"""Router views against literal counts over the same histories; computed once; refused where there is nothing to see."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import untrained_run

from model_zoo.analysis import router_view as views
from model_zoo.analysis.trained_run import load_trained
from model_zoo.errors import ConfigError, DataError
from model_zoo.pipeline.loader import SequenceLoader

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tiny_params: Callable[..., dict[str, Any]], tmp_path: Path) -> MakeRun:
    """``make_run(expid, **config)``: the folder of an untrained run that counts as finished."""

    def make(expid: str = "MoS_TWIN_tiny", **changes: Any) -> Path:
        return untrained_run(tiny_params(expid, **changes), tmp_path / "runs")

    return make


def test_readings_are_those_of_a_literal_count(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: nearest codes of h of the item, and of windows counted back from the newest item."""
    monkeypatch.setattr(views, "BATCHES", 1)
    folder = make_run(batch_size=40)
    run = load_trained(str(folder))
    view = views.router_view(str(folder))
    layer = run.model.method_layers()[0]
    reads = {"item": Counter(), "window": Counter()}
    tokens = Counter()
    for number, batch in enumerate(SequenceLoader(run.dataset, "valid", 40, run.params["max_len"])):
        if number == views.BATCHES:
            break
        for history in batch.history.tolist():
            items = [item for item in history if item]
            if not items:
                continue
            rows = run.model.item_features.rows(torch.tensor(items))
            vectors = run.model.embedding_layer(rows, flatten_emb=True).detach()
            groups = [[place] for place in range(len(items))]
            size, stride = layer.window_size, layer.window_stride
            ends = [len(items)]
            while ends[-1] - size > 0:
                ends.append(ends[-1] - stride)
            windows = [list(range(max(end - size, 0), end)) for end in ends]
            for name, router, members in (
                ("item", layer.item_router, groups), ("window", layer.window_router, windows)
            ):  # fmt: skip
                for member in members:
                    tokens[name] += 1
                    hidden = router.h(vectors[member].mean(0))
                    best = torch.nn.functional.cosine_similarity(hidden[None], router.codebook.codes).topk(router.topk)
                    reads[name].update((items[place], theme) for place in member for theme in best.indices.tolist())
    for branch in view["branches"]:
        own = reads[branch["name"]]
        assert branch["tokens"] == tokens[branch["name"]] and branch["unread"] == 0
        for theme, share in enumerate(branch["share"]):
            mine = {item: count for (item, chosen), count in own.items() if chosen == theme}
            assert share == pytest.approx(sum(mine.values()) / sum(own.values()), abs=1e-12)
            assert branch["distinct"][theme] == len(mine)
            assert [count for _, count in branch["items"][theme]] == sorted(mine.values(), reverse=True)[: views.TOP_ITEMS]
            assert all(mine[item] == count for item, count in branch["items"][theme])
            categories = Counter()
            for item, count in mine.items():
                categories[int(run.dataset.item_columns["cate_id"][item])] += count
            for value, part, _ in branch["categories"]["cate_id"][theme]:
                assert part == pytest.approx(categories[value] / sum(mine.values()), abs=1e-12)
    assert {branch["name"] for branch in view["branches"]} == {"item", "window"}
    for sequence in view["sequences"]:
        assert len(sequence["items"]) == len(sequence["themes"]["item"]) == len(sequence["labels"]) <= views.NEWEST
        for item, themes in zip(sequence["items"], sequence["themes"]["item"]):
            assert all((item, theme) in reads["item"] for theme in themes) and len(themes) == 2


def test_a_rival_s_readings_are_its_routing(make_run: MakeRun) -> None:
    folder = make_run("TWIN_tiny", model="GShard_TWIN", batch_size=40)
    run = load_trained(str(folder))
    [branch] = views.router_view(str(folder))["branches"]
    layer = run.model.method_layers()[0]
    counts = np.zeros((run.dataset.num_items, len(layer.experts.experts)))
    with torch.no_grad():
        for number, batch in enumerate(SequenceLoader(run.dataset, "valid", 40, run.params["max_len"])):
            if number == views.BATCHES:
                break
            tokens = run.model._read(batch)[2]
            members = layer.router(tokens).members & tokens.mask.unsqueeze(2)
            for row, column, expert in members.nonzero().tolist():
                counts[batch.history[row, column], expert] += 1
    assert branch["name"] == "experts"
    np.testing.assert_allclose(branch["share"], counts.sum(0) / counts.sum(), atol=1e-12)
    assert branch["distinct"] == (counts > 0).sum(0).tolist()


def test_a_view_is_computed_once_for_each_checkpoint(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run()
    first = views.router_view(str(folder))
    loaded = []
    monkeypatch.setattr(views, "load_trained", lambda where: loaded.append(where) or load_trained(where))
    assert views.router_view(str(folder)) == first and not loaded
    (folder / views.VIEW_FILE).write_text("{torn")
    assert views.router_view(str(folder)) == first and len(loaded) == 1
    other = load_trained(str(folder)).model
    with torch.no_grad():
        other.method_layers()[0].item_router.codebook.codes.neg_()
    other.save_weights(str(folder / "x.model"))
    assert views.router_view(str(folder))["branches"] != first["branches"] and len(loaded) == 2


def test_what_cannot_be_viewed_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="no router"):
        views.router_view(str(make_run("TWIN_tiny")))
    folder = make_run()
    found = json.loads((folder / "metrics.json").read_text())
    changed = {**found, "data_fingerprint": {**found["data_fingerprint"], "item_info": "0" * 32}}
    (folder / "metrics.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match="item_info changed"):
        views.router_view(str(folder))
    (folder / "x.model").unlink()
    with pytest.raises(ConfigError, match="no such checkpoint"):
        views.router_view(str(folder))
    (folder / "metrics.json").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        views.router_view(str(folder))
