"""Files whole or not at all, lines of processes that run at once, locks, and disks that are full."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from model_zoo import files, temporary_file
from model_zoo.errors import FileError
from model_zoo.files import append_line, copy_whole, locked, write_whole, write_whole_with

HOLD = """
import sys, time
from model_zoo.files import locked, write_whole_with
def write(file):
    file.write(b"half")
    file.flush()
    print("there", flush=True)
    time.sleep(60)
if sys.argv[1] == "lock":
    with locked(sys.argv[2]):
        write(open(sys.argv[3], "wb"))
else:
    write_whole_with(sys.argv[2], write)
"""

APPEND = """
import sys
from model_zoo.files import append_line
path, number = sys.argv[1:]
for line in range(200):
    append_line(path, f"{number} {line} " + number * (1 + 977 * line % 5000))
"""


SMALL = 4096


@contextmanager
def small_disk() -> Iterator[None]:
    """Inside, no file may grow beyond `SMALL` bytes, as on a full disk: in a fixture, that held for pytest's log, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start(*arguments: object) -> subprocess.Popen[str]:
    """A process that holds a lock or is within a write, once this returns."""
    command = [sys.executable, "-c", HOLD, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("", "é\n", "longer\n" * 9, "short"):
        write_whole(path, text)
        assert path.read_bytes() == text.encode() and list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_rights_that_others_have(tmp_path: Path) -> None:
    write_whole(str(tmp_path / "a"), "")
    (tmp_path / "b").write_text("")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, FileNotFoundError])
def test_an_exception_of_the_writer_passes_and_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def half(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_whole_with(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a loss of power: content, then name, then the folder that holds the name."""
    steps: list[Any] = []
    monkeypatch.setattr(os, "fsync", lambda d: steps.append(stat.S_ISDIR(os.fstat(d).st_mode) or os.fstat(d).st_size))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), real(*paths)))
    write_whole(tmp_path / "a.txt", "12345")
    assert steps == [5, "replace", True]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    texts = [character * 50_000 for character in "abcd"]
    threads = [threading.Thread(target=lambda t=t: [write_whole(path, t) for _ in range(10)]) for t in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in texts
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.txt"
    dead, living, other = start("write", path), start("write", path), start("write", tmp_path / "b.txt")
    kill(dead)
    kill(other)
    assert len(list(tmp_path.glob("*.partial"))) == 3 and not path.exists()
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [p.name.startswith(".a[1]*.txt.") for p in sorted(tmp_path.glob("*.partial"))] == [True, False]
    kill(living)
    write_whole(path, "newer")
    write_whole(tmp_path / "b.txt", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a[1]*.txt", "b.txt"]


def test_a_copy_is_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    copy_whole(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content
    with pytest.raises(FileError, match=r"absent: cannot be read \(No such file or directory\); .*b is untouched"):
        copy_whole(tmp_path / "absent", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content and len(list(tmp_path.iterdir())) == 2


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "\N{GRINNING FACE}" * 63, "[" * 255):
        path = tmp_path / name
        kill(start("write", path))
        write_whole(path, "x")
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()


@pytest.mark.parametrize("name", ["", "file/below", "absent/below", "pipe", "n" * 256])
def test_what_cannot_be_a_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match=r"(cannot be written \(|is not a regular file).*; choose another path") as error:
        write_whole(tmp_path / name, "x")
    assert "\n" not in str(error.value) and len(list(tmp_path.iterdir())) == 2


# ---- full disks ------------------------------------------------------------------------------------------------------


def assert_says_so(error: pytest.ExceptionInfo[FileError], path: object) -> None:
    text = str(error.value)
    assert text.startswith(f"{path}: cannot be written (") and "\n" not in text
    assert " MiB free there); " in text and "what was there before is untouched" in text
    assert error.value.__suppress_context__ or error.value.__cause__ is None


def test_a_full_disk_keeps_the_old_file_and_says_what_is_free(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    for size in (SMALL + 1, 10 * SMALL):  # seen at the flush, and within the write
        with small_disk(), pytest.raises(FileError, match="free some space") as error:
            write_whole(path, "x" * size)
        assert_says_so(error, path)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_lines_that_were_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    append_line(path, "x" * (SMALL - 100))
    before = path.read_bytes()
    with small_disk(), pytest.raises(FileError, match="free some space") as error:
        append_line(path, "y" * 150)  # 99 of its bytes fit
    assert_says_so(error, path)
    assert path.read_bytes() == before
    append_line(path, "z" * 50)
    assert path.read_bytes() == before + b"z" * 50 + b"\n"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "make the folder writable"),
        (errno.EROFS, "make the folder writable"),
        (errno.EIO, "choose another path"),
    ],
)
@pytest.mark.parametrize("where", ["fsync", "replace", "open"])
def test_whatever_fails_is_said_with_what_to_do(
    number: int, advice: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    owner, name = (temporary_file.io, "FileIO") if where == "open" else (os, where)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(FileError, match=advice) as error:
            write_whole(path, "new")
    assert_says_so(error, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_the_device_that_is_always_full() -> None:
    with pytest.raises(FileError, match=r"No space left on device.*free some space"):
        append_line("/dev/full", "a line")
    with pytest.raises(FileError, match="not a regular file"):  # root could replace the device
        write_whole("/dev/full", "text")


# ---- lines -----------------------------------------------------------------------------------------------------------


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert append_line(path, "one") and append_line(path, "two é") and append_line(path, "one")
    assert path.read_text(encoding="utf-8") == "one\ntwo é\none\n"
    append_line(path, "bytes \udcff of a command line")
    assert path.read_text(encoding="utf-8").splitlines()[-1] == "bytes \\udcff of a command line"
    with pytest.raises(ValueError, match="line break"):
        append_line(path, "a\nb")


def test_a_line_is_appended_once_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("one\nonetwo\nthree")  # only the last one's line break is missing
    assert not append_line(path, "three", once=True) and not append_line(path, "one", once=True)
    assert append_line(path, "two", once=True) and not append_line(path, "two", once=True)
    assert append_line(path, "thre", once=True)
    assert path.read_text() == "one\nonetwo\nthree\ntwo\nthre\n"


@pytest.mark.parametrize("torn", ["h", "half a li", "whole\nhalf"])
def test_a_torn_line_stays_by_itself(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(torn)
    append_line(path, "next")
    assert path.read_text() == f"{torn}\nnext\n"


def test_a_write_that_is_interrupted_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    append_line(path, "old")
    real = os.write

    def half(descriptor: int, content: bytes) -> int:
        real(descriptor, content[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(KeyboardInterrupt):
        append_line(path, "interrupted")
    assert path.read_text() == "old\n"


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:3]))
    append_line(tmp_path / "a.csv", "longer than three")
    assert (tmp_path / "a.csv").read_text() == "longer than three\n"


def test_lines_of_eight_processes_are_all_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    processes = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), str(number)]) for number in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    lines = path.read_text().splitlines()
    assert len(lines) == 1600
    assert set(lines) == {f"{n} {k} " + str(n) * (1 + 977 * k % 5000) for n in range(8) for k in range(200)}
    for number in range(8):  # each process's own in their order
        assert [int(line.split()[1]) for line in lines if line.startswith(f"{number} ")] == list(range(200))


# ---- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_excludes_other_processes_and_ends_with_its_holder(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    if kind == "folder":
        path.mkdir()
    holder = start("lock", path, tmp_path / "elsewhere")
    with pytest.raises(FileError, match="lock: another process holds it"), locked(path, wait=False):
        pass
    kill(holder)
    with locked(path, wait=False):
        pass
    with locked(path, wait=False):  # let go of at the end of the section
        pass


def test_a_lock_waits_for_its_holder(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def second() -> None:
        with locked(path):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(path):
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_line_goes_to_the_file_that_has_the_name_when_the_lock_is_had(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    append_line(path, "old")
    thread = threading.Thread(target=append_line, args=(path, "line"))
    with locked(path):
        thread.start()
        time.sleep(0.05)  # it waits for the old file's lock
        if change == "removed":
            path.unlink()
        else:
            write_whole(path, "new\n")
    thread.join()
    assert path.read_text() == ("line\n" if change == "removed" else "new\nline\n")


def test_without_locks_a_warning_and_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lockless(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", lockless)
        append_line(tmp_path / "a.csv", "one")
        write_whole(tmp_path / "b.txt", "text")
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(temporary_file, "fcntl", None)
    append_line(tmp_path / "a.csv", "two")
    write_whole(tmp_path / "b.txt", "other")
    assert (tmp_path / "a.csv").read_text() == "one\ntwo\n" and (tmp_path / "b.txt").read_text() == "other"
    assert [record.message.endswith("let no other run write to it meanwhile") for record in caplog.records] == [True] * 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_lock_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "lock"
    with pytest.raises(FileError, match=r"absent/lock: cannot be written \(No such file"), locked(path):
        pass
