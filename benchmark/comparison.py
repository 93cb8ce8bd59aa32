"""What `compare.py` compares: which runs stand for a model, their means, differences to the plain backbone, and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from model_zoo.experiment.collect import Row, duplicates, merits
from model_zoo.experiment.statistics import PairedDifference, Spread, paired_difference, ranks, spread
from model_zoo.registry import BACKBONES, METHODS

LESS_IS_BETTER = ("logloss", "binary_crossentropy")
#: data set, history length, head
Place = tuple[str, int | None, str]


@dataclass
class Entry:
    """A model at a place: the configuration that validation chose, over its seeds.

    Attributes:
        name: the model's, or the experiment's.
        runs: seed to run.
        tried: configurations that it was chosen from.
        spreads: metric to mean and deviation; without metrics that no run has.
        differences: metric to what it exceeds its plain backbone by; of a plain backbone, or without one, none.
        ranks: metric to rank among its backbone's entries, where all of them have that metric.
    """

    name: str
    backbone: str
    method: str
    runs: dict[int, Row]
    tried: int
    spreads: dict[str, Spread] = field(default_factory=dict)
    differences: dict[str, PairedDifference] = field(default_factory=dict)
    ranks: dict[str, float] = field(default_factory=dict)

    def values(self, split: str, metric: str) -> dict[int, float]:
        """Seed to value."""
        return {seed: run.scores[split][metric] for seed, run in self.runs.items() if metric in run.scores.get(split, {})}


@dataclass(frozen=True)
class Comparison:
    """Entries by place, and what must be said about them."""

    metrics: list[str]
    split: str
    places: dict[Place, list[Entry]]
    notes: list[str]


def compare(rows: Iterable[Row], metrics: list[str], split: str, level: float, by_expid: bool = False) -> Comparison:
    """Compare runs; of equal ones (configuration, seed) the latest, of a model's configurations the best on validation."""
    notes: list[str] = []
    rows = _by_data(_latest(rows, notes), notes)
    groups: dict[Place, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.dataset, row.max_len, row.head][row.expid if by_expid else row.model].append(row)
    places = {}
    for place in sorted(groups, key=lambda place: (place[0], place[1] or 0, place[2])):
        entries = [_entry(name, own, place, notes) for name, own in groups[place].items()]
        places[place] = sorted(entries, key=_order)
        _measure(places[place], metrics, split, level)
        _note_budgets(places[place], place, notes)
    return Comparison(metrics, split, places, notes)


def is_better_higher(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric not in LESS_IS_BETTER


def named(place: Place) -> str:
    """A place in words."""
    dataset, length, head = place
    return f"{dataset}, length {'not recorded' if length is None else length}, head {head}"


@dataclass(frozen=True)
class MeanRank:
    """Mean ranks of a backbone's entries.

    Attributes:
        methods: name of each entry to its method.
        datasets: that were counted.
        left_out: others, on which not all of the entries have all metrics.
        ranks: metric to name to mean rank; names are left out if no data set counts.
    """

    backbone: str
    methods: dict[str, str]
    datasets: list[str]
    left_out: list[str]
    ranks: dict[str, dict[str, float]]


def mean_ranks(places: dict[Place, list[Entry]], metrics: list[str]) -> dict[tuple[int | None, str], list[MeanRank]]:
    """As in the paper's table 1: each backbone's entries are ranked on each data set, then ranks are averaged over these.

    Only data sets on which all of a backbone's entries (at that length and with that head) have the metrics count.

    Returns:
        Length and head to one of each backbone that has something to rank.
    """
    found: dict[tuple[int | None, str], list[MeanRank]] = defaultdict(list)
    by_backbone: dict[tuple[int | None, str, str], dict[str, list[Entry]]] = defaultdict(dict)
    for (dataset, length, head), entries in places.items():
        for entry in entries:
            by_backbone[length, head, entry.backbone].setdefault(dataset, []).append(entry)
    for (length, head, backbone), datasets in by_backbone.items():
        names = {entry.name: entry.method for entries in datasets.values() for entry in entries}
        whole = [
            dataset for dataset, entries in datasets.items()
            if len(entries) == len(names) and all(metric in entry.ranks for entry in entries for metric in metrics)
        ]  # fmt: skip
        if len(names) < 2:
            continue
        means = {
            metric: {
                name: sum(e.ranks[metric] for d in whole for e in datasets[d] if e.name == name) / len(whole)
                for name in (names if whole else [])
            }
            for metric in metrics
        }
        found[length, head].append(MeanRank(backbone, names, whole, [d for d in datasets if d not in whole], means))
    return found


def _latest(rows: Iterable[Row], notes: list[str]) -> list[Row]:
    """One run of each configuration and seed."""
    rows = list(rows)
    superseded = set()
    for group in duplicates(rows):
        superseded |= {id(row) for row in group[:-1]}
        if any(row.scores != group[-1].scores for row in group):
            notes.append(
                f"{group[-1].expid}, seed {group[-1].seed}: {len(group)} runs of the same configuration came to different "
                f"scores; the latest counts ({group[-1].path})"
            )
    return [row for row in rows if id(row) not in superseded]


def _by_data(rows: list[Row], notes: list[str]) -> list[Row]:
    """Runs on files of one name and different content are not compared: each content becomes a data set of its own."""
    contents: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        contents[row.dataset].add(row.data)
    mixed = sorted(dataset for dataset, found in contents.items() if len(found) > 1)
    for dataset in mixed:
        notes.append(f"{dataset}: the runs read {len(contents[dataset])} versions of its files; they are kept apart")
    return [
        replace(row, dataset=f"{row.dataset} (files {row.data or 'not recorded'})") if row.dataset in mixed else row
        for row in rows
    ]


def _entry(name: str, rows: list[Row], place: Place, notes: list[str]) -> Entry:
    """A model's runs of the configuration with the most seeds, of these the one with the best mean validation figure."""
    configs: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        configs[row.config][row.seed] = row
    where = f"{name} ({named(place)})"
    if len(configs) > 1 and any(row.monitored is None for row in rows):
        notes.append(f"{where}: a configuration without validation figures is not chosen")
    if len({row.monitor for row in rows}) > 1:
        notes.append(f"{where}: its configurations were monitored by different figures, so their choice is arbitrary")
    merit = merits(rows)
    chosen = max(configs, key=lambda config: merit[config])
    better = [config for config in configs if merit[config][1] > merit[chosen][1]]
    if better:
        notes.append(
            f"{where}: {len(better)} configuration(s) with fewer seeds validate better than the one shown "
            f"({', '.join(sorted(next(iter(configs[config].values())).expid for config in better)[:3])})"
        )
    first = rows[0]
    return Entry(name, first.backbone, first.method, dict(sorted(configs[chosen].items())), len(configs))


def _measure(entries: list[Entry], metrics: list[str], split: str, level: float) -> None:
    """Fill in means, differences and ranks."""
    for entry in entries:
        for metric in metrics:
            if values := entry.values(split, metric):
                entry.spreads[metric] = spread(list(values.values()))
    for entry in entries:
        base = _plain(entries, entry.backbone) if entry.method else None
        for metric in metrics if base else []:
            found = paired_difference(entry.values(split, metric), base.values(split, metric), level)  # type: ignore
            if found:
                entry.differences[metric] = found
    for backbone in {entry.backbone for entry in entries}:
        rivals = [entry for entry in entries if entry.backbone == backbone]
        for metric in metrics:
            if len(rivals) > 1 and all(metric in entry.spreads for entry in rivals):
                places = ranks([entry.spreads[metric].mean for entry in rivals], is_better_higher(metric))
                for entry, rank in zip(rivals, places, strict=True):
                    entry.ranks[metric] = rank


def _plain(entries: list[Entry], backbone: str) -> Entry | None:
    """The plain backbone's entry; of several experiments with it, the best on validation."""
    plain = [entry for entry in entries if entry.backbone == backbone and not entry.method]

    def merit(entry: Entry) -> float:
        figures = [run.monitored for run in entry.runs.values() if run.monitored is not None]
        return sum(figures) / len(figures) if figures else float("-inf")

    return max(plain, key=merit, default=None)


def _note_budgets(entries: list[Entry], place: Place, notes: list[str]) -> None:
    for backbone in dict.fromkeys(entry.backbone for entry in entries):
        tried = {entry.name: entry.tried for entry in entries if entry.backbone == backbone}
        if len(set(tried.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in tried.items())
            notes.append(f"{named(place)}: unequal tuning, configurations tried: {shown}")


def _order(entry: Entry) -> tuple[Any, ...]:
    backbones, methods = list(BACKBONES), ["", *METHODS]
    known = (entry.backbone in backbones, entry.method in methods)
    return (backbones.index(entry.backbone) if known[0] else len(backbones), entry.backbone,
            methods.index(entry.method) if known[1] else len(methods), entry.method, entry.name)  # fmt: skip
