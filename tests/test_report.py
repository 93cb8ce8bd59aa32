"""``benchmark/report.py``: one page that holds all it shows and nothing else, whatever the records say."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from finished_runs import put, record, untrained_run

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{script}}\u2028&amp;'\""
#: the smallest png: one pixel
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, root: Path) -> ModuleType:
    """``benchmark/report.py``."""
    monkeypatch.syspath_prepend(str(root / "benchmark"))
    import report

    return report


class Parsed(HTMLParser):
    """A page's scripts, styles and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = tag, attributes, text + data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(next(text for attributes, text in self.all("script") if attributes.get("id") == "data"))


def write(report: ModuleType, folder: Path, *options: str) -> Parsed:
    """The page of the runs below ``folder``."""
    out = folder.parent / "page.html"
    assert report.main([str(folder), "--out", str(out), *options]) == 0
    return Parsed(out.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else_and_its_policy_allows_nothing_else(report: ModuleType, tmp_path: Path) -> None:
    put(tmp_path / "runs", record())
    found = write(report, tmp_path / "runs")
    addresses = [attributes[name] for _, attributes, _ in found.elements for name in ("src", "href") if name in attributes]
    assert addresses and all(value.startswith(("#", "data:")) for value in addresses)
    policy = next(a["content"] for a, _ in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    [style], script = [text for _, text in found.all("style")], found.all("script")[1][1]
    for text, kind in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "innerHTML" not in script and script.count("http") == script.count("http://www.w3.org/2000/svg") == 1
    first = (tmp_path / "page.html").read_bytes()
    write(report, tmp_path / "runs")
    assert (tmp_path / "page.html").read_bytes() == first


def test_text_of_records_stays_text(report: ModuleType, tmp_path: Path) -> None:
    put(tmp_path / "runs", record(expid=EVIL, dataset_id=EVIL, config={"note": EVIL, EVIL: 1}, git_commit=EVIL))
    found = write(report, tmp_path / "runs", "--title", EVIL)
    assert len(found.all("script")) == 2 and not found.all("img")
    assert found.all("h1")[0][1].startswith(EVIL)
    [run] = found.data["runs"]
    assert (run["expid"], run["dataset"], run["config"][EVIL], run["config"]["note"]) == (EVIL, EVIL, 1, EVIL)


def test_comparison_and_history_are_those_of_the_records(report: ModuleType, tmp_path: Path) -> None:
    for seed, gain in ((1, 0.01), (2, 0.02), (3, 0.06)):
        put(tmp_path / "runs", record(seed=seed, auc=0.7))
        put(tmp_path / "runs", record("MoS_TWIN", seed, 0.7 + gain))
    data = write(report, tmp_path / "runs", "--router", "none").data
    line = next(one for one in data["comparison"] if (one["model"], one["metric"]) == ("MoS_TWIN", "AUC"))
    assert line["difference"] == pytest.approx(0.03) and line["pairs"] == 3 and line["rank"] == 1
    assert 0.01 <= line["low"] <= line["difference"] <= line["high"] <= 0.06 and "3 seeds" in line["trust"]
    assert data["metrics"] == ["AUC", "gAUC", "logloss"] and data["less"] == ["logloss"]
    run = next(run for run in data["runs"] if run["method"] == "MoS")
    assert [(entry["phase"], entry["step"]) for entry in run["history"]] == [("phase1", 10), ("phase2", 20)]
    assert run["history"][1]["load"] == {"item": [0.25, 0.75]}


def test_no_run_one_run_and_poor_records_make_a_page(report: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert write(report, tmp_path / "runs").data["runs"] == []
    sparse = {key: record()[key] for key in ("expid", "dataset_id", "model", "seed")}
    scores = {"final": {"test": {"AUC": 0.6, "gAUC": None}}}
    put(tmp_path / "runs", {**sparse, "config": {}, "scores": scores, "history": [{}, 3]})
    data = write(report, tmp_path / "runs").data
    assert [run["scores"] for run in data["runs"]] == [{"test": {"AUC": 0.6}}] and data["metrics"] == ["AUC"]
    assert [line["low"] for line in data["comparison"]] == [None]
    put(tmp_path / "runs", record(scores={"final": {"test": {"AUC": None}}}))
    (tmp_path / "runs" / "stopped").mkdir()
    (tmp_path / "runs" / "stopped" / "config.yaml").write_text("x: {}\n")
    runs, out = str(tmp_path / "runs"), tmp_path / "page.html"
    assert report.main([runs, runs, "--out", str(out)]) == 0  # twice, and yet each run counts once
    data = Parsed(out.read_text(encoding="utf-8")).data
    assert len(data["runs"]) == 1 and len(data["left_out"]) == 2
    assert any("no metric" in reason for _, reason in data["left_out"])


def test_pictures_are_in_the_page(report: ModuleType, tmp_path: Path) -> None:
    put(tmp_path / "runs", record())
    (tmp_path / "figures" / "hopping").mkdir(parents=True)
    (tmp_path / "figures" / "hopping" / "heat_map.png").write_bytes(PIXEL)
    [figure] = write(report, tmp_path / "runs", "--figures", str(tmp_path / "figures")).data["figures"]
    assert figure["title"] == "hopping · heat map"
    assert base64.b64decode(figure["source"].removeprefix("data:image/png;base64,")) == PIXEL


@pytest.mark.parametrize("case", ["folder", "figures", "empty figures", "no picture", "metric", "level", "out"])
def test_mistakes_are_told_in_one_line(
    report: ModuleType, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "runs", record())
    (tmp_path / "bad").mkdir()
    if case == "no picture":
        (tmp_path / "bad" / "x.png").write_bytes(b"GIF89a")
    options, word = {
        "folder": ([], "no such folder"),
        "figures": (["--figures", str(tmp_path / "absent")], "no such folder"),
        "empty figures": (["--figures", str(tmp_path / "bad")], "no *.png"),
        "no picture": (["--figures", str(tmp_path / "bad")], "not a png"),
        "metric": (["--metric", "AUK"], "choose from AUC"),
        "level": (["--level", "95"], "between 0 and 1"),
        "out": (["--out", str(tmp_path / "bad")], "regular file"),
    }[case]
    runs = tmp_path / ("absent" if case == "folder" else "runs")
    assert report.main([str(runs), "--out", str(tmp_path / "page.html"), *options]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "page.html").exists()


def test_the_page_says_why_a_run_has_no_view(
    report: ModuleType, tiny_params: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    kept, lost = (untrained_run(tiny_params("MoS_TWIN_tiny", seed=seed), tmp_path / "runs") for seed in (1, 2))
    (lost / "x.model").unlink()
    runs = write(report, kept.parent, "--router", "all").data["runs"]
    reasons = [(run["view"] is not None, run["no_view"]) for run in runs]
    assert reasons[0] == (True, None) and not reasons[1][0] and "no such checkpoint" in reasons[1][1]


def test_of_a_record_alone_the_page_says_that_there_is_no_more(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "runs", record("MoS_TWIN"))
    (run,) = write(report, tmp_path / "runs").data["runs"]
    assert run["view"] is None and run["no_view"].startswith("Only the record of this run is here")
    assert not capsys.readouterr().err


def test_a_browser_shows_it_at_desktop_and_phone_width(
    report: ModuleType, tiny_params: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Chromium: nothing on the console, no request, no sideways scrolling of the page, and the controls work."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package to drive a browser")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    runs = untrained_run(tiny_params("MoS_TWIN_tiny"), tmp_path / "runs").parent
    put(runs, record(expid=EVIL, dataset_id=EVIL * 2, seed=2, auc=0.8, history=[{"warnings": {"x": EVIL}, "phase": EVIL}]))
    put(runs, record("GShard_TWIN", auc=0.65))
    put(runs, record("TWIN", auc=0.6, scores={"final": {"test": {"AUC": 0.5}}}, history=[]))
    write(report, runs)
    said: list[str] = []
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for width, height in ((1440, 900), (390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
            page.goto((runs.parent / "page.html").as_uri())
            for run in range(4):
                page.evaluate(f"location.hash = 'run-{run}'")
                page.wait_for_function(f"document.querySelector('#runs select').value === '{run}'")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            table = page.locator("#leaderboard tbody tr")
            assert table.count() == 4
            page.get_by_role("button", name="AUC", exact=True).focus()
            page.keyboard.press("Enter")
            assert page.locator("#leaderboard th[aria-sort]").get_attribute("aria-sort") == "descending"
            assert "80.00" in table.first.inner_text()
            page.get_by_label("method").select_option("GShard")
            assert table.count() == 1
            unnamed = "[...document.querySelectorAll('select, input')].filter((one) => !one.labels.length).length"
            assert page.evaluate(unnamed) == 0
            assert page.locator("svg[role=img]:not([aria-label])").count() == 0
            page.close()
        browser.close()
    assert said == []
