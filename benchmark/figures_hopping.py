"""``hopping``: how histories hop between sessions, as heat maps of self-similarity and in three figures."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import figures_style as style
import numpy as np
import torch
from figures_data import data_set, run_folder

from model_zoo.analysis.hopping import Categories, Measure, UserHistory, Vectors, View, measures, user_history
from model_zoo.analysis.sessions import KnownSessions, known_sessions
from model_zoo.analysis.trained_run import load_trained
from model_zoo.errors import ConfigError, DataError
from model_zoo.experiment.report import table
from model_zoo.pipeline.histories import Histories
from model_zoo.pipeline.pretrained_vectors import load_pretrained

#: of a heat map's users, where none are named
SHOWN = 2


def options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="FOLDER", help="a finished run: its trained item embeddings")
    source.add_argument("--dataset", metavar="ID", help="a data set: an item feature of type embedding, or categories")
    parser.add_argument("--phase", help="of the run: phase1 (default where there is one: the backbone's), phase2, phase3")
    parser.add_argument("--vectors", metavar="FEATURE", help="of the data set: which embedding (default: the first)")
    parser.add_argument("--categories", metavar="FEATURE", help="a categorical item feature, to look at as well")
    parser.add_argument("--users", type=int, nargs="+", help=f"user_index of each heat map (default: {SHOWN} by --seed)")
    parser.add_argument("--sessions", choices=("auto", "truth", "time", "change"), default="auto", help="from truth.npz, "
                        "gaps in time, or change points of the items (default: the first that the data have)")  # fmt: skip
    parser.add_argument("--gap", type=float, default=1800, help="seconds that end a session (default: %(default)g)")
    parser.add_argument("--window", type=int, default=4, help="items on a change point's sides (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="cosine of the sides up to which they may differ (default: the "
                        "10 %% quantile of the same items in random order)")  # fmt: skip
    parser.add_argument("--centre", action="store_true", help="subtract the mean vector of all events first")
    parser.add_argument("--max-len", type=int, default=100, help="newest items of a history (default: %(default)s)")
    parser.add_argument("--least", type=int, default=20, help="items a history must have (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=100, help="users of the figures (default: %(default)s)")
    parser.add_argument("--shuffles", type=int, default=199, help="of each baseline (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


@dataclass(frozen=True)
class Subject:
    """Whose histories, and what is known of the items in them."""

    dataset_id: str
    histories: Histories
    user_info: str
    views: list[View]


def command(chosen: argparse.Namespace) -> None:
    """Print the table, write numbers and picture."""
    if min(chosen.window, chosen.shuffles, chosen.sample) < 1 or min(chosen.max_len, chosen.least) < 2:
        raise ConfigError("--window, --shuffles and --sample must be at least 1, --max-len and --least at least 2")
    subject = _of_run(chosen) if chosen.run else _of_data_set(chosen)
    if chosen.centre:
        subject.views[:] = [_centred(view, subject.histories) for view in subject.views]
    sessions = known_sessions(subject.user_info, subject.histories, chosen.sessions, chosen.gap)
    sample = _sample(subject, chosen)
    shown = _named(subject, chosen) if chosen.users else _typical(subject, sample)
    maps, found = {}, {}
    for view in subject.views:
        sampled = [_history(view, subject, sessions, u, chosen) for u in sample]
        found[view.name] = measures(sampled, chosen.shuffles, chosen.seed)
        maps[view.name] = [_history(view, subject, sessions, u, chosen) for u in shown]
    rows = [{"items by": name, **asdict(m)} for name, part in found.items() for m in part]
    about = {"data set": subject.dataset_id, "sessions": sessions.described, "users sampled": len(sample),
             "options": {k: v for k, v in vars(chosen).items() if k not in ("out", "config")}}  # fmt: skip
    borders = {name: {str(h.user): np.flatnonzero(h.own_starts).tolist() for h in part} for name, part in maps.items()}
    files = style.Files(chosen.out, f"hopping-{subject.dataset_id}")
    files.numbers(rows, **about, session_starts=borders)
    print(f"{subject.dataset_id}: {len(sample)} users of at least {chosen.least} items; {sessions.described}")
    print(as_table(found))
    print(files.picture(draw(maps, found, f"Session hopping, {subject.dataset_id} ({sessions.described})")))


def as_table(found: dict[str, list[Measure]]) -> str:
    """The figures beside their baselines."""
    header = ["", "value", "shuffled", "95 % of shuffles", "p", "users", "note"]
    rows = []
    for name, part in found.items():
        for m in part:
            reach = "" if m.low is None or m.high is None else f"{m.low:.4f} to {m.high:.4f}"
            shown = [_shown(m.value), _shown(m.shuffled), reach, "" if m.p_value is None else f"{m.p_value:.3f}"]
            rows.append([f"{name}: {m.name}", *shown, str(m.users), m.missing])
    return table(header, rows)


def draw(maps: dict[str, list[UserHistory]], found: dict[str, list[Measure]], title: str) -> Any:
    """A row of heat maps for each view, and at its end the figures beside their baselines."""
    users = max(len(part) for part in maps.values())
    figure = style.new_figure(3.9 * users + 4.6, 3.9 * len(maps) + 0.4)
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(len(maps), users + 1, width_ratios=[*[1] * users, 1.05])
    for line, (name, part) in enumerate(maps.items()):
        binary = all(np.isin(h.unit, (0, 1)).all() for h in part)
        for column, history in enumerate(part):
            axes = figure.add_subplot(grid[line, column])
            _heat_map(figure, axes, history, name, binary, last=column == len(part) - 1)
        _intervals(figure.add_subplot(grid[line, users]), found[name], name)
    return figure


def _heat_map(figure: Any, axes: Any, history: UserHistory, name: str, binary: bool, last: bool) -> None:
    similar = history.unit @ history.unit.T
    length = len(similar)
    off = similar[~np.eye(length, dtype=bool)]
    low = 0.0 if binary else float(np.quantile(off, 0.02)) if len(off) else 0.0
    image = axes.imshow(similar, cmap=style.SEQUENTIAL, vmin=low, vmax=1, interpolation="nearest")
    edges = [*np.flatnonzero(history.own_starts), length]
    for begin, end in pairwise(edges):
        corners = np.array([begin, end, end, begin, begin]) - 0.5, np.array([begin, begin, end, end, begin]) - 0.5
        axes.plot(*corners, color=style.RED, linewidth=1.3, clip_on=False)
    count = f"{len(edges) - 1} session{'s' * (len(edges) > 2)}"
    axes.set(title=f"user {history.user}: {count} (boxes)", xlabel="item of the history, oldest first")
    axes.set_ylabel("item of the history, oldest first")
    axes.title.set_fontsize(9)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1] if binary else None)
    if last:
        bar.set_label(f"same {name} (1) or not (0)" if binary else f"cosine of {name}")


def _intervals(axes: Any, found: list[Measure], name: str) -> None:
    for place, m in enumerate(found):
        if m.low is not None and m.high is not None:
            axes.plot([m.low, m.high], [place, place], color=style.GREY, linewidth=7, solid_capstyle="butt", alpha=0.6)
        if m.value is not None:
            axes.plot(m.value, place, "o", color=style.RED, markersize=7)
        said = f"{_shown(m.value)}, p = {m.p_value:.3f}" if m.p_value is not None else m.missing
        axes.text(0.5, place - 0.22, f"{m.name}: {said}", ha="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set(ylim=(len(found) - 0.5, -0.5), yticks=[])
    axes.set_xlabel(f"by {name}: mean over users\ndot: histories; bar: 95 % of shuffles")
    axes.margins(x=0.15)
    axes.grid(True, axis="x", alpha=0.3)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# ---- whose, and by what --------------------------------------------------------------------------------------------------


def _of_run(chosen: argparse.Namespace) -> Subject:
    folder = run_folder(chosen.run)
    trained = load_trained(folder)
    model, dataset = trained.model, trained.dataset
    stem = os.path.join(folder, trained.params["model_id"])
    phase = chosen.phase or ("phase1" if os.path.exists(f"{stem}.phase1.model") else None)
    if phase is not None:
        path = f"{stem}.{phase}.model"
        if not os.path.exists(path):
            raise ConfigError(f"--phase {phase}: {path}: no such checkpoint; leave --phase out, or name another one")
        model.load_weights(path)
    assert model.item_features is not None
    with torch.no_grad():
        parts = [
            model.embedding_layer(model.item_features.rows(index), flatten_emb=True)
            for index in torch.arange(dataset.num_items).split(8192)
        ]
    views: list[View] = [Vectors("item embeddings", torch.cat(parts).float().numpy())]
    views += _categories(chosen, dataset.feature_map, dataset.item_columns)
    return Subject(trained.params["dataset_id"], dataset.histories, dataset.files["user_info"], views)


def _of_data_set(chosen: argparse.Namespace) -> Subject:
    if chosen.phase:
        raise ConfigError("--phase is for --run; a data set has no phases")
    found = data_set(chosen.dataset, chosen.config)
    specs = {name: spec for name, spec in found.feature_map.features.items() if spec.get("source") == "item"}
    usable = [name for name, spec in specs.items() if spec["type"] == "embedding" or "pretrained_emb" in spec]
    if chosen.vectors and chosen.vectors not in usable:
        raise ConfigError(f"--vectors {chosen.vectors}: not an item feature with vectors; {chosen.dataset} has "
                          f"{', '.join(usable) or 'none'}")  # fmt: skip
    views: list[View] = []
    name = chosen.vectors or (usable[0] if usable else None)
    if name is not None and specs[name]["type"] == "embedding":
        views.append(Vectors(name, np.asarray(found.item_columns[name], np.float32)))
    elif name is not None:
        vectors, _ = load_pretrained(found.feature_map, 0)[name]
        views.append(Vectors(name, vectors.numpy()[found.item_columns[name]].astype(np.float32)))
    views += _categories(chosen, found.feature_map, found.item_columns)
    if not views:
        names = [name for name, spec in specs.items() if spec["type"] == "categorical"]
        raise DataError(f"{chosen.dataset}: has no item vectors (no item feature of type embedding); take a trained run's "
                        f"with --run, or look at categories: --categories with one of {', '.join(names)}")  # fmt: skip
    return Subject(chosen.dataset, found.histories, found.user_info, views)


def _categories(chosen: argparse.Namespace, feature_map: Any, item_columns: dict[str, Any]) -> list[View]:
    if not chosen.categories:
        return []
    specs = {name: spec for name, spec in feature_map.features.items() if spec.get("source") == "item"}
    names = [name for name, spec in specs.items() if spec["type"] == "categorical"]
    if chosen.categories not in names:
        raise ConfigError(f"--categories {chosen.categories}: not a categorical item feature; there are {', '.join(names)}")
    return [Categories(chosen.categories, np.asarray(item_columns[chosen.categories]))]


def _centred(view: View, histories: Histories) -> View:
    if not isinstance(view, Vectors):
        return view
    counts = np.bincount(histories.items, minlength=len(view.table)).astype(np.float64)
    return Vectors(f"{view.name}, centred", (view.table - counts @ view.table / max(counts.sum(), 1)).astype(np.float32))


def _sample(subject: Subject, chosen: argparse.Namespace) -> list[int]:
    eligible = np.flatnonzero(subject.histories.lengths >= chosen.least)
    if not len(eligible):
        longest = int(subject.histories.lengths.max(initial=0))
        raise DataError(f"{subject.dataset_id}: no history has {chosen.least} items (at most {longest}); lower --least")
    drawn = np.random.default_rng(chosen.seed).permutation(eligible)[: chosen.sample]
    return sorted(int(user) for user in drawn)


def _named(subject: Subject, chosen: argparse.Namespace) -> list[int]:
    lengths = subject.histories.lengths
    for user in chosen.users:
        if not 0 <= user < len(lengths):
            raise ConfigError(f"--users {user}: users are numbered from 0 to {len(lengths) - 1}")
        if lengths[user] < 2:
            raise ConfigError(f"--users {user}: has {lengths[user]} item(s); a heat map needs at least 2")
    return list(chosen.users)


def _typical(subject: Subject, sample: list[int]) -> list[int]:
    """The first of the sample whose histories are at least as long as its median one."""
    lengths = subject.histories.lengths[sample]
    return [user for user, length in zip(sample, lengths, strict=True) if length >= np.median(lengths)][:SHOWN]


def _history(view: View, subject: Subject, sessions: KnownSessions, user: int, chosen: argparse.Namespace) -> UserHistory:
    end = subject.histories.offsets[user + 1]
    part = slice(max(int(subject.histories.offsets[user]), int(end) - chosen.max_len), int(end))
    known = None
    if sessions.starts is not None:
        known = sessions.starts[part].copy()
        known[:1] = True
    return user_history(view, user, subject.histories.items[part], known, chosen.window, chosen.threshold)
