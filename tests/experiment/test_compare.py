"""The comparison of runs, and the figures of others beside it."""

import csv
import io
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from run_records import MICRO, result, save

KUAI = "KuaiVideo_x2"
NEEDED = "Model,dataset,max_len,head,expid,seed,config"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, root: Path) -> dict[str, ModuleType]:
    """The modules of ``benchmark/``."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    return {name: import_module(name) for name in ("collect", "compare", "reference_figures")}


def lines_of(text: str, model: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if f"| {model} |" in line]


def test_a_comparison(tmp_path: Path, scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    plain = [result("TWIN", seed, auc) for seed, auc in ((1, 0.70), (2, 0.71), (3, 0.72))]
    mos = [result("MoS_TWIN", seed, auc) for seed, auc in ((1, 0.71), (2, 0.73), (3, 0.75), (4, 0.90))]
    runs = save(tmp_path / "runs", *plain, *mos, result("GShard_TWIN", 1, 0.70))
    out = tmp_path / "x.md"
    assert scripts["compare"].main([str(runs), "--out", str(out)]) == 0
    text = out.read_text()
    table, ranked = lines_of(text, "MoS_TWIN")
    # seed 4 has no partner: differences 1, 2, 3 points; of three, all 27 resamples' ends are the least and the greatest
    assert table[:5] == ["MoS_TWIN", "4", "1", "77.25 ± 8.66", "+2.00 [+1.00, +3.00]"]
    assert table[-1] == "-" and table[-2] == "71.11 / 70.26 [d]"
    assert ranked == ["TWIN", "MoS_TWIN", "1", "1.00", "2.00", "1.00", "1.00"]
    gshard, own = lines_of(text, "GShard_TWIN")[0], lines_of(text, "TWIN")[0]
    assert gshard[4] == "+0.00 (1 seed, no interval)"
    assert own[-1] == "70.57 / 69.91" and own[4] == ""  # LongCTR's TWIN at 200, chosen on validation
    assert "3 seeds: such an interval holds the true difference in about 75% of cases, not 95%" in text
    assert "- [d] The paper's table 2 prints other figures" in text and "- [e]" not in text
    (line,) = [line for line in csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text()))
               if line["model"] == "MoS_TWIN" and line["metric"] == "AUC"]  # fmt: skip
    assert (line["pairs"], line["low"], line["high"], line["paper"]) == ("3", "0.0100000000", "0.0300000000", "71.11")

    capsys.readouterr()
    assert scripts["collect"].main([str(runs), "--out", str(tmp_path / "t.csv")]) == 0
    assert scripts["compare"].main([str(tmp_path / "t.csv"), "--out", str(tmp_path / "y.md")]) == 0
    assert (tmp_path / "y.md").read_text().replace("t.csv", "runs") == text
    assert scripts["compare"].main([str(tmp_path / "t.csv"), "--out", str(tmp_path / "t.md")]) == 2
    assert "would replace" in capsys.readouterr().err


def test_validation_chooses_and_test_does_not(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    shown = result("TWIN", 1, 0.60, topk=5)
    shown["scores"]["final"]["valid"]["AUC"] = 0.9
    lucky = result("TWIN", 1, 0.80, topk=10)
    rows, _ = scripts["compare"].read([str(save(tmp_path, shown, lucky))])
    found = scripts["compare"].compare(rows, ["AUC"], "test", 0.95)
    ((entry,),) = found.places.values()
    assert entry.tried == 2 and entry.spreads["AUC"].mean == 0.60


def test_more_seeds_are_shown_and_better_validation_told(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    runs = save(tmp_path, *[result("TWIN", s, 0.6) for s in (1, 2)], result("TWIN", 1, 0.7, topk=10))
    found = scripts["compare"].compare(scripts["compare"].read([str(runs)])[0], ["AUC"], "test", 0.95)
    ((entry,),) = found.places.values()
    assert entry.spreads["AUC"].mean == 0.6
    assert "1 configuration(s) with fewer seeds validate better" in "\n".join(found.notes)


def test_of_repeated_runs_the_latest_counts(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    early, late = result("TWIN", 1, 0.6), {**result("TWIN", 1, 0.7), "finished": "20270101-000000"}
    rows, _ = scripts["compare"].read([str(save(tmp_path, late, early))])
    found = scripts["compare"].compare(rows, ["AUC"], "test", 0.95)
    ((entry,),) = found.places.values()
    assert entry.spreads["AUC"].mean == 0.7 and "came to different scores; the latest counts" in found.notes[0]


def test_ranks_count_only_data_sets_that_all_models_ran_on(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    models = ("TWIN", 0.70), ("MoS_TWIN", 0.72), ("GShard_TWIN", 0.71)
    runs = save(tmp_path / "runs", *[result(model, 1, auc) for model, auc in models])
    save(runs, *[result(model, 1, auc, dataset=KUAI) for model, auc in models[:2]])
    assert scripts["compare"].main([str(runs), "--out", str(tmp_path / "x.md")]) == 0
    text = (tmp_path / "x.md").read_text()
    assert lines_of(text, "MoS_TWIN")[-1][:4] == ["TWIN", "MoS_TWIN", "1", "1.00"]
    assert lines_of(text, "GShard_TWIN")[-1][3] == "2.00"
    assert f"- TWIN: not all of its models ran on {KUAI}; left out here." in text


def test_heads_lengths_and_versions_of_data_are_not_mixed(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    other = {**result("TWIN", 1, 0.7), "data_fingerprint": {"test_data": "11"}}
    dot, short = result("Mamba4Rec", 1, 0.7, head="dot"), result("TWIN", 1, 0.7, max_len=100)
    runs = save(tmp_path, result("TWIN", 1, 0.7), result("Mamba4Rec", 1, 0.7), other, dot, short)
    rows, _ = scripts["compare"].read([str(runs)])
    found = scripts["compare"].compare(rows, ["AUC"], "test", 0.95)
    assert sorted((place[1], place[2], len(entries)) for place, entries in found.places.items()) == [
        (100, "dnn", 1), (200, "dnn", 1), (200, "dnn", 2), (200, "dot", 1)
    ]  # fmt: skip
    assert "2 versions of its files" in found.notes[0]
    out = tmp_path / "x.md"
    assert scripts["compare"].main([str(save(tmp_path / "two", dot, result("Mamba4Rec", 1, 0.7))), "--out", str(out)]) == 0
    dnn, dotted = lines_of(out.read_text(), "Mamba4Rec")
    assert dotted[-1] == "66.55 / 69.16 [b]" and "69.16" not in "".join(dnn)  # the paper's Mamba4Rec is a dot


def test_experiments_of_one_model_apart(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    variant = {**result("MoS_TWIN", 1, 0.72, window_size=4), "expid": "MoS_TWIN_short_windows"}
    rows, _ = scripts["compare"].read([str(save(tmp_path, result("TWIN", 1, 0.7), result("MoS_TWIN", 1, 0.71), variant))])
    found = scripts["compare"].compare(rows, ["AUC"], "test", 0.95, by_expid=True)
    ((plain, short, mos),) = found.places.values()
    assert [entry.name for entry in (plain, short, mos)] == ["TWIN_x", "MoS_TWIN_short_windows", "MoS_TWIN_x"]
    assert short.differences["AUC"].mean == pytest.approx(0.02) and short.ranks["AUC"] == 1


def test_less_logloss_ranks_first(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    better = result("MoS_TWIN", 1, 0.71)
    better["scores"]["final"]["test"]["logloss"] = 0.4
    rows, _ = scripts["compare"].read([str(save(tmp_path, result("TWIN", 1, 0.7), better))])
    found = scripts["compare"].compare(rows, ["logloss"], "test", 0.95)
    ((plain, mos),) = found.places.values()
    assert (plain.ranks["logloss"], mos.ranks["logloss"]) == (2, 1) and mos.differences["logloss"].mean < 0


def test_mistakes_get_one_sentence(
    tmp_path: Path, scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(save(tmp_path / "runs", result("TWIN", 1, 0.7)))
    (tmp_path / "empty").mkdir()
    for call, said in (
        ([runs, "--metric", "MRR"], "no run has these on test; choose from AUC, gAUC, logloss"),
        ([runs, "--level", "95"], "must be between 0 and 1"),
        ([runs, "--out", "x.html"], "must end with .md"),
        ([str(tmp_path / "empty")], "no finished run"),
        ([str(tmp_path / "absent")], "no such folder"),
    ):
        assert scripts["compare"].main(call) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "lacks the columns Model, dataset"),
        ("", "holds no runs"),
        (f"{NEEDED},AUC\nTWIN,d,5,dnn,x,1,c,high\n", "line 2, column AUC: 'high' is no"),
        (f"{NEEDED},AUC\nTWIN,d,5,dnn,x,,c,0.5\n", "line 2: lacks the model or the seed"),
    ],
)
def test_tables_that_are_none_are_refused(
    text: str, said: str, tmp_path: Path, scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text(text)
    assert scripts["compare"].main([str(tmp_path / "x.csv")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# ---- figures of others ---------------------------------------------------------------------------------------------------


def test_the_papers_figures_and_ranks(scripts: dict[str, ModuleType]) -> None:
    paper, reference = scripts["reference_figures"].paper_figures(), scripts["reference_figures"]
    assert len(paper) == 69
    cited = {letter for line in paper.values() for letter in line["notes"].split()}
    assert cited == {letter for letter, note in reference.footnotes().items() if note["shown"] == "cited"}
    gains = [
        float(line[metric]) - float(paper[backbone, "", dataset, head][metric])
        for metric in ("AUC", "gAUC")
        for (backbone, method, dataset, head), line in paper.items() if method == "MoS"
    ]  # fmt: skip
    assert sum(gains[:12]) == pytest.approx(8.48) and sum(gains[12:]) / 12 == pytest.approx(0.72)
    assert reference.paper_ranks("SDIM", "AUC")["MoS"] == pytest.approx(4 / 3)
    assert reference.paper_ranks("SDIM", "gAUC")["MoS"] == 1 and reference.paper_ranks("MIRRN", "AUC") == {}


def test_longctrs_figures_are_those_chosen_on_validation(scripts: dict[str, ModuleType]) -> None:
    figures = scripts["reference_figures"].longctr_figures()
    shown = {key: tuple(round(100 * figures[key][metric], 2) for metric in ("AUC", "gAUC")) for key in figures}
    assert shown["TWIN", MICRO, 100] == (70.54, 69.78) and shown["SDIM", MICRO, 200] == (71.51, 69.84)
    assert shown["TransAct", KUAI, 200] == (68.59, 66.77) and shown["MIRRN", "Ebnerd_small_x1", 200] == (69.59, 69.21)
