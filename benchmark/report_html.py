"""The report page's file: markup, style, script and values in one, nothing of it from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from typing import Any

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_page")
#: in the order in which they need each other
SCRIPTS = ("dom.js", "charts.js", "leaderboard.js", "comparison.js", "router.js", "runs.js", "main.js")


def page(found: dict[str, Any]) -> str:
    """The page.

    Text of records reaches it as json alone, which the script puts in place as text, never as markup. A policy in the page
    keeps a browser from running any other script and from asking the network for anything.

    Args:
        found: from `report_content.content`, with ``title``, ``level`` and ``less``.
    """
    script = "\n".join(_read(name) for name in SCRIPTS)
    style = _read("page.css")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    parts = {
        "policy": policy,
        "title": html.escape(found["title"]),
        "style": style,
        "data": embedded_json(found),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("page.html"))


def embedded_json(value: Any) -> str:
    """Json that can stand inside a script element: no text in it can end the element, or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, default=str, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _read(name: str) -> str:
    with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
        return file.read()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
