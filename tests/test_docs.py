"""Tests that documents name exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = sorted(
    {
        (document.name, match[1], match[2])
        for document in (ROOT / "docs").glob("*.md")
        for match in re.finditer(r"`(tests/\S+\.py)::(\w+)`", document.read_text())
    }
)


def test_the_table_of_fixes_names_a_test_in_every_row() -> None:
    text = (ROOT / "docs" / "longctr.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 15
    assert all(re.search(r"`tests/\S+::test_\w+` \|$", row) for row in rows)


@pytest.mark.parametrize("document, path, name", NAMED)
def test_a_named_test_exists(document: str, path: str, name: str) -> None:
    functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions
