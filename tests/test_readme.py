"""Every ``bash`` and ``python`` block of README.md and docs/*.md is run, or stands in a list here with the reason.

Python blocks of one document run one after the other in one namespace. Of bash blocks each command is looked at:
``python run_expid.py`` is run with ``--dry-run``, ``python data/synthetic.py`` at the tiny size, and what needs the
network, a GPU or somebody's data is matched by NOT_RUN. Commands run in a folder that looks like the repository.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BASH = {"bash", "sh", "shell", "console", "zsh"}
PYTHON = {"python", "py", "python3", "pycon"}

#: commands that are not run, and why
NOT_RUN = {
    r"git clone \S+( \S+)?": "needs the network",
    r"cd \S+": "the commands run in the repository's folder",
    r"python3? -m venv \S+": "environments are made by .ci/run",
    r"(\.|source) \S+/activate": "environments are made by .ci/run",
    r"(python -m )?pip install .*": "needs the network; .ci/run installs into a clean environment",
    r"python -m pytest.*": "is this test suite",
    r"(ruff|mypy|\.ci/run)\b.*": "is .ci/run's work",
    r"python data/download\.py \S+.*": "needs the network; tests/test_download.py",
    r"python tests/kills\.py.*": "runs for minutes; tests/experiment/test_resume_cli.py has a sample",
    r"python data/build_kuairand_sample\.py.*": "needs KuaiRand's raw files; tests/test_kuairand_sample.py",
    r"python benchmark/\S+\.py.*": "measures for minutes",
}
#: data sets that are not in the repository: their experiments are shown by --dry-run, but for the sizes of the files
ABSENT_DATA = {"MicroVideo1.7M_x2", "KuaiVideo_x2", "Ebnerd_small_x1", "Ebnerd_demo", "synthetic"}
#: first lines of python blocks that are not run, and why
PYTHON_NOT_RUN: dict[str, str] = {}

WHAT_TO_DO = (
    "make it a command that this test can run (python run_expid.py, python data/synthetic.py), or, if it needs a GPU, "
    "the network or data that is not in the repository, add a pattern with that reason to NOT_RUN in tests/test_readme.py"
)


class Block(NamedTuple):
    """A fenced block: its document, the line of its first line of text, its language, its text."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks_of(document: Path) -> list[Block]:
    """The fenced blocks of a markdown file."""
    blocks, opened = [], None
    text: list[str] = []
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"\s*(```+|~~~+)\s*(\S*)", line)
        if opened is None and fence:
            opened = (fence[1], fence[2].lower().strip("{.}"), number + 1)
            text = []
        elif opened is not None and fence and not fence[2] and fence[1].startswith(opened[0]):
            blocks.append(Block(document, opened[2], opened[1], "\n".join(text)))
            opened = None
        elif opened is not None:
            text.append(line)
    assert opened is None, f"{document.name}:{opened[2] - 1 if opened else 0}: the block is never closed"
    return blocks


def commands_of(text: str) -> list[str]:
    """The single commands of a bash block: prompts and comments dropped, continued lines joined, ``&&`` taken apart."""
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = []
    for line in joined.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word in ("&&", ";")), len(words))
            commands.append(shlex.join(words[:end]))
            words = words[end + 1 :]
    return commands


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
BASH_BLOCKS = [block for block in BLOCKS if block.language in BASH]
PYTHON_DOCUMENTS = [
    document for document in DOCUMENTS if any(b.document == document for b in BLOCKS if b.language in PYTHON)
]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository; what is written to it, or to its data/, does not reach that."""
    folder = tmp_path_factory.mktemp("repository")
    for path in ROOT.iterdir():
        if path.name not in ("data", "checkpoints") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "data").mkdir()
    for path in (ROOT / "data").iterdir():
        if path.is_file() or path.name == "kuairand_sample":
            (folder / "data" / path.name).symlink_to(path)
    return folder


Cli = Callable[..., Any]


def run_command(command: str, place: str, sandbox: Path, cli: Cli) -> None:
    """Run one command, or find it among those that are not run."""
    plain = " ".join(shlex.split(command))
    if any(re.fullmatch(pattern, plain) for pattern in NOT_RUN):
        return
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # VARIABLE=value before a command
        words.pop(0)
    if words[:2] == ["python", "run_expid.py"]:
        dry_run(words[2:], place, sandbox, cli)
    elif words[:2] == ["python", "run_param_tuner.py"]:
        listed = [*words[1:], *([] if "--dry-run" in words else ["--dry-run"])]
        done = subprocess.run([sys.executable, *listed], cwd=sandbox, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and " runs, " in done.stdout, f"{place}: `{plain}` fails:\n{done.stderr}"
    elif words[:2] == ["python", "data/validate.py"]:
        done = subprocess.run([sys.executable, *words[1:]], cwd=sandbox, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{place}: `{plain}` finds faults:\n{done.stdout}{done.stderr}"
    elif words[:2] == ["python", "data/synthetic.py"]:
        small = words[1:] if "--preset" in words or "--help" in words else [*words[1:], "--preset", "tiny"]
        done = subprocess.run([sys.executable, *small], cwd=sandbox, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{place}: `{plain}` fails:\n{done.stderr}"
    else:
        pytest.fail(f"{place}: `{plain}` is not known to this test: {WHAT_TO_DO}")


def dry_run(arguments: list[str], place: str, sandbox: Path, cli: Cli) -> None:
    """``run_expid.py`` with these arguments and ``--dry-run``, on the CPU."""
    if "--help" in arguments:
        assert cli("--help", root=sandbox).code == 0
        return
    for option in ("--gpu",):
        if option in arguments:
            at = arguments.index(option)
            arguments = arguments[:at] + arguments[at + 2 :]
    answer = cli(*arguments, "--dry-run", root=sandbox)
    dataset = re.search(r"^  dataset_id\s+(\S+)", answer.out, flags=re.M)
    if answer.code == 2 and dataset and dataset[1] in ABSENT_DATA:
        assert re.fullmatch(r"error: \S+: no such file; see data/README\.md .*\n", answer.err), f"{place}: {answer.err}"
    else:
        assert answer.code == 0, f"{place}: python run_expid.py {shlex.join(arguments)} --dry-run fails: {answer.err}"


def run_python(document: Path, sandbox: Path) -> None:
    """All python blocks of a document, in order, in one process; an error names the block's place."""
    blocks = [b for b in blocks_of(document) if b.language in PYTHON]
    blocks = [b for b in blocks if b.text.strip().split("\n")[0] not in PYTHON_NOT_RUN]
    script = "import sys\nnamespace = {'__name__': '__main__'}\n"
    for block in blocks:
        assert ">>>" not in block.text, f"{block.place}: write python blocks without >>>, so that they can be copied"
        code = "\n" * (block.line - 1) + block.text
        script += f"exec(compile({code!r}, {block.document.name!r}, 'exec'), namespace)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=sandbox, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (
        f"a python block fails; the traceback names the line of {document.name}:\n{done.stderr}"
    )


@pytest.mark.parametrize("block", BASH_BLOCKS, ids=lambda block: block.place)
def test_bash_blocks_run(block: Block, sandbox: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sandbox)
    for command in commands_of(block.text):
        run_command(command, block.place, sandbox, cli)


@pytest.mark.parametrize("document", PYTHON_DOCUMENTS, ids=lambda document: document.name)
def test_python_blocks_run(document: Path, sandbox: Path) -> None:
    run_python(document, sandbox)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
        assert re.match(r"https?://|mailto:", target) or (document.parent / target).exists(), (
            f"{document.name}: {target}"
        )


# ---- the test itself -------------------------------------------------------------------------------------------------

MADE_UP = """\
# Title
```bash
# a comment
$ pip install -e . && python run_expid.py --expid TWIN_kuairand_sample \\
    --gpu 0
```
text
   ```python
x = 1
```
```
neither
```
"""


def test_blocks_and_commands_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(MADE_UP)
    found = blocks_of(tmp_path / "a.md")
    assert [(block.language, block.line) for block in found] == [("bash", 3), ("python", 9), ("", 12)]
    assert commands_of(found[0].text) == [
        "pip install -e .",
        "python run_expid.py --expid TWIN_kuairand_sample --gpu 0",
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "python somewhere/else.py --fast",
            "a.md:1: `python somewhere/else.py --fast` is not known to this test: make it",
        ),
        ("python run_expid.py --expid TWIN_kuairand", "expid 'TWIN_kuairand' is not in"),
        ("python run_expid.py --set epoch=3", "unknown key 'epoch' for model MoS_TWIN; did you mean 'epochs'?"),
        ("python data/synthetic.py --out data/x --users 0", "data/synthetic.py --out data/x --users 0` fails"),
    ],
)
def test_a_command_that_does_not_work_is_reported(
    command: str, message: str, sandbox: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sandbox)
    with pytest.raises((AssertionError, pytest.fail.Exception)) as failure:
        run_command(command, "a.md:1", sandbox, cli)
    assert message in str(failure.value)


def test_a_python_block_that_does_not_work_is_reported_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("```python\nx = 1\n```\n\n```python\nassert x == 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=r'File "a\.md", line 7'):
        run_python(tmp_path / "a.md", tmp_path)
