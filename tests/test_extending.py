"""docs/extending.md: its code is docs/example/my_models.py, and what it registers passes the conformance suite."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_conformance

from model_zoo import registry
from model_zoo.experiment.plugins import load_plugin

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "example" / "my_models.py"
NEW = ["RecencyPool", "MoS_RecencyPool", "GShard_RecencyPool", "Ages_RecencyPool", "Ages_TWIN"]
SUITE = {
    name: test
    for name, test in vars(test_conformance).items()
    if name.startswith("test_") and "name" in inspect.signature(test).parameters and "scope" not in name
}


@pytest.fixture
def registered(kept_registry: None) -> None:
    """The example's models, for one test."""
    load_plugin(str(EXAMPLE))


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    code = EXAMPLE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    parts = [part for block in blocks for part in block.strip().split("\n\n\n")]
    parts = [part for part in parts if not part.startswith(("import", "from"))]
    assert len(parts) == 5
    assert all(part in code for part in parts)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("test", SUITE)
def test_the_examples_conform(name: str, test: str, registered: None, tmp_path: Path) -> None:
    method = name.partition("_")[0]
    if test == "test_each_phase_of_mos_trains_exactly_its_part" and method != "MoS":
        return
    if test.startswith("test_without_weight") and method not in registry.METHODS:
        return
    given: dict[str, Any] = {"name": name, "options": {}, "tmp_path": tmp_path}
    function = SUITE[test]
    function(**{key: given[key] for key in inspect.signature(function).parameters})


@pytest.mark.parametrize("expid", ["RecencyPool_sample", "MoS_RecencyPool_sample", "Ages_TWIN_sample"])
def test_their_experiments_run_from_the_command_line(expid: str, registered: None, cli: Callable[..., Any]) -> None:
    answer = cli("--load", EXAMPLE, "--config", EXAMPLE.parent, "--expid", expid, "--dry-run")
    assert answer.code == 0, answer.err
    assert re.search(rf"^  model\s+{expid.removesuffix('_sample')}\b", answer.out, flags=re.M)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file"),
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError"),
        ("x = 1\n1 / 0\n", "line 2: ZeroDivisionError"),
        ("def f(:\n", "line 1: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_sentence(
    text: str | None, message: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    answer = cli("--load", path, "--dry-run")
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert answer.err.startswith("error: --load ") and message in answer.err


def test_a_loaded_file_finds_modules_beside_it_and_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "beside_me.py").write_text("value = 3\n")
    path = tmp_path / "torch.py"
    path.write_text("import beside_me\nimport torch.nn\nassert beside_me.value == 3\nassert torch.nn.Linear\n")
    before = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "beside_me", raising=False)
        load_plugin(str(path))
    assert sys.path == before
