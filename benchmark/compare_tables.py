"""`compare.py`'s document and its csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from comparison import LESS_IS_BETTER, Comparison, Entry, MeanRank, Place, mean_ranks, named
from machine import markdown
from reference_figures import footnotes, longctr_figures, paper_figures, paper_ranks

from model_zoo.experiment.statistics import EXACT_PAIRS, RESAMPLES, Spread

#: metrics that the paper prints
PRINTED = ("AUC", "gAUC")
FIELDS = ["dataset", "max_len", "head", "model", "backbone", "method", "metric", "mean", "sd", "seeds", "tried", "config",
          "expid", "rank", "difference", "low", "high", "level", "pairs", "wilcoxon_p", "paper", "longctr"]  # fmt: skip


def document(found: Comparison, command: str, problems: list[str], level: float) -> str:
    """The comparison in markdown."""
    notes = _Footnotes()
    tables = [text for place, entries in found.places.items() for text in ("", _table(found, place, entries, notes))]
    ranks = list(_rank_tables(found))
    runs = sum(len(entry.runs) for entries in found.places.values() for entry in entries)
    parts = [
        "# Comparison",
        "",
        f"`{command}`: {runs} runs, scores on {found.split}, in percent but for the losses.",
        "",
        "- Mean ± standard deviation (n - 1) over seeds. Of a model's configurations the one with the most seeds is shown,",
        "  of these the best on validation in the mean; *tried* says how many there were. Test has no part in it.",
        "- *vs plain* is the mean difference to the plain backbone over the seeds that both ran, in points, with its",
        f"  {level:.0%} percentile bootstrap interval (not BCa: a few seeds cannot carry its corrections). Up to",
        f"  {EXACT_PAIRS} seeds all resamples are taken, beyond {RESAMPLES:,} with a fixed seed. p is Wilcoxon's, exact,",
        "  from 6 pairs on; it is not corrected for the number of comparisons.",
        "- Heads are never mixed: `dot` scores history and target alone, `dnn` reads the context features, too.",
        *tables,
        *ranks,
    ]
    if found.notes:
        parts += ["", "## To be known", "", *(f"- {note}" for note in found.notes)]
    if problems:
        parts += ["", "## Left out", "", *(f"- {problem}" for problem in problems)]
    if notes.used:
        parts += ["", "## Footnotes to the figures of others", "", *notes.lines()]
    return "\n".join(parts) + "\n"


def to_csv(found: Comparison) -> str:
    """The same, a line for each place, model and metric; metrics as they are, not in percent, but for ``paper``."""
    text = io.StringIO()
    table = csv.DictWriter(text, FIELDS, lineterminator="\n")
    table.writeheader()
    for place, entries in found.places.items():
        for entry in entries:
            run = next(iter(entry.runs.values()))
            for metric, own in entry.spreads.items():
                gain = entry.differences.get(metric)
                line = {
                    **dict(zip(("dataset", "max_len", "head"), place, strict=True)),
                    "model": entry.name, "backbone": entry.backbone, "method": entry.method, "metric": metric,
                    "mean": own.mean, "sd": own.sd, "seeds": own.count, "tried": entry.tried, "config": run.config,
                    "expid": run.expid, "rank": entry.ranks.get(metric), "paper": _paper(place, entry).get(metric),
                    "longctr": _longctr(place, entry).get(metric),
                }  # fmt: skip
                if gain:
                    line |= {"difference": gain.mean, "low": gain.low, "high": gain.high, "level": gain.level,
                             "pairs": gain.pairs, "wilcoxon_p": gain.p_value}  # fmt: skip
                table.writerow({key: f"{v:.10f}" if isinstance(v, float) else v for key, v in line.items()})
    return text.getvalue()


class _Footnotes:
    """Which footnotes are cited."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def cite(self, letters: str) -> str:
        self.used |= set(letters.split())
        return "".join(f" [{letter}]" for letter in letters.split())

    def show(self, kind: str) -> None:
        self.used |= {letter for letter, note in footnotes().items() if note["shown"] == kind}

    def lines(self) -> list[str]:
        return [f"- [{letter}] {note['text']}" for letter, note in footnotes().items() if letter in self.used]


def _table(found: Comparison, place: Place, entries: list[Entry], notes: _Footnotes) -> str:
    """One place's table, with columns of others' figures only where they have any."""
    papers = [_paper(place, entry) for entry in entries]
    records = [_longctr(place, entry) for entry in entries]
    header = ["model", "seeds", "tried"]
    for metric in found.metrics:
        header += [metric, f"{metric} vs plain"]
    theirs = [metric for metric in found.metrics if metric in PRINTED]
    shown = "/".join(theirs)
    if any(papers) and theirs:
        header.append(f"paper {shown}")
        notes.show("always")
    if any(records) and theirs:
        header.append(f"LongCTR {shown}")
        notes.show("longctr")
    plain = {entry.backbone for entry in entries if not entry.method}
    lines = []
    for entry, paper, record in zip(entries, papers, records, strict=True):
        line = [entry.name, str(len(entry.runs)), str(entry.tried)]
        for metric in found.metrics:
            line += [_mean(entry.spreads.get(metric), metric), _difference(entry, metric, plain)]
        if any(papers) and theirs:
            line.append(" / ".join(paper[m] for m in theirs) + notes.cite(paper["notes"]) if paper else "-")
        if any(records) and theirs:
            line.append(" / ".join(_value(record[m], m) for m in theirs) if record else "-")
        lines.append(line)
    gains = sorted({(gain.pairs, gain.note) for entry in entries for gain in entry.differences.values() if gain.note})
    text = [f"## {named(place)}", "", markdown(header, lines)]
    if gains:
        text += ["", *(f"- {note}." for _, note in gains)]
    return "\n".join(text)


def _rank_tables(found: Comparison) -> Iterator[str]:
    """Mean ranks, a table for each length and head."""
    for (length, head), backbones in mean_ranks(found.places, found.metrics).items():
        datasets = {dataset for ranked in backbones for dataset in ranked.datasets}
        theirs = datasets & {dataset for _, _, dataset, _ in paper_figures()}
        printed = [metric for metric in found.metrics if metric in PRINTED and theirs]
        lines = [line for ranked in backbones if ranked.datasets for line in _rank_lines(ranked, found.metrics, printed)]
        missing = [
            f"- {ranked.backbone}: not all of its models ran on {', '.join(ranked.left_out)}; left out here."
            for ranked in backbones if ranked.left_out
        ]  # fmt: skip
        yield from ("", f"## Mean ranks, length {length}, head {head}", "")
        yield "1 is best. Each backbone's models are ranked on each data set by their means; equal ones share a rank."
        if printed:
            yield "The paper's ranks are counted here from its table 1, five models on three data sets."
        if lines:
            paper = [f"paper {metric}" for metric in printed]
            yield from ("", markdown(["backbone", "model", "data sets", *found.metrics, *paper], lines))
        if missing:
            yield from ("", *missing)


def _rank_lines(ranked: MeanRank, metrics: list[str], printed: list[str]) -> Iterator[list[str]]:
    counted = [paper_ranks(ranked.backbone, metric) for metric in printed]
    for name, method in ranked.methods.items():
        own = [f"{ranked.ranks[metric][name]:.2f}" for metric in metrics]
        theirs = [f"{figures[method]:.2f}" if method in figures else "-" for figures in counted]
        yield [ranked.backbone, name, str(len(ranked.datasets)), *own, *theirs]


def _paper(place: Place, entry: Entry) -> dict[str, str]:
    """The paper's line for a model with that head, whatever its length and configuration."""
    dataset, _, head = place
    return paper_figures().get((entry.backbone, entry.method, dataset, head), {})


def _longctr(place: Place, entry: Entry) -> dict[str, float]:
    """LongCTR's figures for a plain backbone; all of its models read context features."""
    dataset, length, head = place
    if entry.method or head != "dnn" or length is None:
        return {}
    return longctr_figures().get((entry.backbone, dataset, length), {})


def _mean(own: Spread | None, metric: str) -> str:
    if own is None:
        return "-"
    return _value(own.mean, metric) + ("" if own.sd is None else f" ± {_value(own.sd, metric)}")


def _difference(entry: Entry, metric: str, plain: set[str]) -> str:
    """The difference to the plain backbone, its interval, and how far that can be trusted if hardly."""
    gain = entry.differences.get(metric)
    if gain is None:
        return "" if not entry.method else "no common seed" if entry.backbone in plain else "no plain run"
    text = _value(gain.mean, metric, "+")
    if gain.low is None or gain.high is None:
        return f"{text} (1 seed, no interval)"
    text += f" [{_value(gain.low, metric, '+')}, {_value(gain.high, metric, '+')}]"
    text += "" if gain.pairs > 2 else " (2 seeds, unreliable)"
    return text if gain.p_value is None else f"{text} p {gain.p_value:.3f}"


def _value(value: float, metric: str, sign: str = "") -> str:
    """Percent with two digits; a loss as it is, with five."""
    return f"{value:{sign}.5f}" if metric in LESS_IS_BETTER else f"{100 * value:{sign}.2f}"
