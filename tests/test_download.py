import hashlib
import json
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_zoo.errors import DataError
from model_zoo.pipeline import download as module
from model_zoo.pipeline.download import FILES, SUMS, check_sums, download, fetch_from_hub, main

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "download.py"
DATASET = "MicroVideo1.7M_x2"


def parquet(rows: int = 3) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"user_index": list(range(rows))}), sink)
    return sink.getvalue().to_pybytes()


def five(folder: str = "", **changes: bytes | None) -> dict[str, bytes]:
    """The hub's files by path; ``train=b"..."`` replaces a file's content, ``train=None`` leaves it out."""
    contents = {name: changes.get(Path(name).stem, parquet()) for name in FILES}
    return {folder + name: content for name, content in contents.items() if content is not None}


def zipped(files: dict[str, bytes], path: Path) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path.read_bytes()


def hub(files: dict[str, bytes]) -> Callable[[str, Path], None]:
    def fetch(repository: str, folder: Path) -> None:
        assert repository == f"reczoo/{DATASET}" and list(folder.iterdir()) == []
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return fetch


def assert_complete(out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, SUMS])
    assert check_sums(out) == []
    assert all(pq.read_table(out / name).num_rows == 3 for name in FILES)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("folder", ["", f"{DATASET}/", "a/b/"])
def test_plain_parquet_files(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "data" / DATASET
    assert download(DATASET, out, hub(five(folder) | {"README.md": b"x", "other.parquet": b"x"}))
    assert_complete(out)


@pytest.mark.parametrize("folder", ["", f"{DATASET}/", "./a/b/"])
def test_zipped_files(folder: str, tmp_path: Path) -> None:
    junk = {f"__MACOSX/{folder}train.parquet": b"x", f"{folder}readme.txt": b"x"}
    archive = zipped(five(folder) | junk, tmp_path / "a.zip")
    out = tmp_path / "data" / DATASET
    assert download(DATASET, out, hub({f"{DATASET}.zip": archive, ".gitattributes": b""}))
    assert_complete(out)


def test_some_files_zipped_and_one_archive_each(tmp_path: Path) -> None:
    plain = five()
    last = {name: plain.pop(name) for name in FILES[3:]}
    archives = {f"{n}.zip": zipped({n: content}, tmp_path / "a.zip") for n, content in last.items()}
    out = tmp_path / "data" / DATASET
    assert download(DATASET, out, hub(plain | archives))
    assert_complete(out)


def test_an_archive_beside_all_five_files_is_not_opened(tmp_path: Path) -> None:
    out = tmp_path / DATASET
    assert download(DATASET, out, hub(five() | {"copy.zip": b"not a zip"}))
    assert_complete(out)


def evil(tmp_path: Path, name: str) -> bytes:
    return zipped(five() | {name: parquet()}, tmp_path.parent / "evil.zip")


@pytest.mark.parametrize("name", ["../evil.parquet", "../train.parquet", "/etc/train.parquet", "a\\..\\..\\b", "C:/b"])
def test_an_archive_with_a_path_outside_of_itself_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside the archive"):
        download(DATASET, tmp_path / DATASET, hub({"a.zip": evil(tmp_path, name)}))
    assert list(tmp_path.iterdir()) == []


CUT = parquet()[:-10]
BAD_HUBS = {
    "one missing": (five(test=None), r"holds no test\.parquet"),
    "two missing": (five(valid=None, item_info=None), r"holds no valid\.parquet, item_info\.parquet"),
    "empty": ({}, r"holds no train\.parquet"),
    "truncated": (five(valid=CUT), r"valid\.parquet .* not a readable parquet file"),
    "zero bytes": (five(user_info=b""), r"user_info\.parquet .* not a readable parquet file"),
    "twice": (five() | {"old/train.parquet": parquet()}, r"train\.parquet more than once"),
    "not a zip": ({"a.zip": b"PK nonsense"}, r"a\.zip cannot be unzipped"),
}


@pytest.mark.parametrize("case", BAD_HUBS)
@pytest.mark.parametrize("existing", [False, True])
def test_an_incomplete_download_leaves_everything_as_it_was(case: str, existing: bool, tmp_path: Path) -> None:
    files, message = BAD_HUBS[case]
    out = tmp_path / DATASET
    if existing:
        out.mkdir()
        (out / "train.parquet").write_bytes(b"mine")
    with pytest.raises(DataError, match=message) as caught:
        download(DATASET, out, hub(files))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ([DATASET] if existing else [])
    assert not existing or [path.read_bytes() for path in out.iterdir()] == [b"mine"]


def test_bad_archives(tmp_path: Path) -> None:
    whole = zipped(five(train=bytes(range(256)) * 40), tmp_path.parent / "a.zip")
    damaged = whole.replace(whole[60:90], bytes(30), 1)  # inside the first file's compressed bytes
    for content, message in [
        (whole[:-40], "cannot be unzipped"),
        (damaged, "cannot be unzipped"),
        (zipped(five(train=CUT), tmp_path.parent / "b.zip"), "not a readable parquet file"),
        (zipped(five(train=None), tmp_path.parent / "c.zip"), "holds no train.parquet"),
        (zipped(five("a/") | five("b/"), tmp_path.parent / "d.zip"), "holds train.parquet twice"),
    ]:
        with pytest.raises(DataError, match=message):
            download(DATASET, tmp_path / DATASET, hub({"a.zip": content}))
        assert list(tmp_path.iterdir()) == []


def test_a_complete_folder_is_kept_and_an_incomplete_one_filled(tmp_path: Path) -> None:
    out = tmp_path / DATASET
    assert download(DATASET, out, hub(five()))

    assert not download(DATASET, out, refuse_to_fetch)
    (out / "train.parquet").write_bytes(CUT)
    (out / "valid.parquet").unlink()
    (out / "notes.txt").write_text("mine")
    assert download(DATASET, out, hub(five()))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert_complete(out)


def test_an_interrupted_fetch_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(_: str, folder: Path) -> None:
        (folder / "train.parquet").write_bytes(parquet())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(DATASET, tmp_path / DATASET, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="--out"):
            download(DATASET, out, hub(five()))


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("MicroVideo1.7M_x1", DATASET),
        ("kuaivideo_x2", "KuaiVideo_x2"),
        ("ebnerd", "Ebnerd_small_x1"),
        ("q", "KuaiVideo"),
    ],
)
def test_an_unknown_id_names_the_nearest(wrong: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"did you mean .*{near}"):
        download(wrong, tmp_path / wrong, hub(five()))
    assert list(tmp_path.iterdir()) == []


def test_fetch_asks_the_hub_for_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(*args: object, **options: object) -> None:
        calls.append((args, options))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    fetch_from_hub("reczoo/KuaiVideo_x2", tmp_path)
    [(args, options)] = calls
    assert args == ("reczoo/KuaiVideo_x2",)
    assert options["repo_type"] == "dataset" and options["local_dir"] == tmp_path
    assert options["allow_patterns"] == ["*.parquet", "*.zip"]


@pytest.mark.parametrize("endpoint", ["http://mirror.example", "ftp://mirror.example", "mirror.example"])
def test_the_hub_is_read_over_https_only(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fetch(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=no_fetch))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(DataError, match=f"HF_ENDPOINT is '{endpoint}'; data are fetched over https:// only"):
        download(DATASET, tmp_path / DATASET)
    assert list(tmp_path.iterdir()) == []


def refuse_to_fetch(*_: object) -> None:
    raise AssertionError


def test_sizes_and_sums_are_recorded(tmp_path: Path) -> None:
    out = tmp_path / DATASET
    download(DATASET, out, hub(five(test=parquet(9))))
    record = json.loads((out / SUMS).read_text())
    assert record["repository"] == f"reczoo/{DATASET}" and list(record["files"]) == list(FILES)
    for name in FILES:
        content = (out / name).read_bytes()
        assert record["files"][name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_file_that_changed_since_is_named_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / DATASET
    download(DATASET, out, hub(five()))
    whole = (out / "valid.parquet").read_bytes()
    flipped = whole[:6] + bytes([whole[6] ^ 1]) + whole[7:]  # within the data: the file opens, and reads other numbers
    (out / "valid.parquet").write_bytes(flipped)
    (out / "test.parquet").write_bytes(parquet(9))
    size, now = len(parquet()), len(parquet(9))
    assert check_sums(out) == [
        f"{out}/valid.parquet has changed since it was downloaded: its SHA-256 sum is another",
        f"{out}/test.parquet has {now} bytes, {size} when it was downloaded",
    ]
    assert check_sums(out, contents=False) == check_sums(out)[1:]
    assert main([DATASET, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {out}/valid.parquet has changed") and captured.err.count("\n") == 1
    assert captured.err.endswith("Delete what is wrong and run the command again.\n")
    assert (out / "valid.parquet").read_bytes() == flipped
    (out / "test.parquet").unlink()
    assert check_sums(out)[1] == f"{out}/test.parquet cannot be read (No such file or directory)"
    assert download(DATASET, out, hub(five()))
    assert_complete(out)


def test_files_without_a_record_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / DATASET
    download(DATASET, out, hub(five()))
    (out / SUMS).unlink()
    (out / "test.parquet").write_bytes(parquet(9))
    assert check_sums(out) == [] and not download(DATASET, out, refuse_to_fetch)
    assert main([DATASET, "--out", str(out)]) == 0
    assert "was complete already, no sums recorded" in capsys.readouterr().out
    assert not (out / SUMS).exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"files": 3}', b'{"files": {"train.parquet": {}}}', b"\xff\xfe", b'{"files": null}']
)
def test_a_damaged_record_is_named(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / DATASET
    download(DATASET, out, hub(five()))
    (out / SUMS).write_bytes(content)
    assert check_sums(out) == [f"{out / SUMS} is not a record of sizes and sums"]
    with pytest.raises(DataError, match="is not a record of sizes and sums"):
        download(DATASET, out, refuse_to_fetch)


def test_a_network_failure_is_one_sentence_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def snapshot_download(*_: object, local_dir: Path, **__: object) -> None:
        (local_dir / "train.parquet").write_bytes(b"half")
        raise ConnectionError("the host cannot be reached.\nMax retries exceeded")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert main([DATASET, "--out", str(tmp_path / "set")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "ConnectionError: the host cannot be reached)" in captured.err and "check the network" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_hub_library_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main([DATASET, "--out", str(tmp_path / "set")]) == 2
    assert "pip install -e .[hub]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_main_reports_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(module, "fetch_from_hub", hub(five()))
    assert main([DATASET], data_root=tmp_path) == 0
    assert_complete(tmp_path / DATASET)
    assert "train.parquet: 3 rows" in capsys.readouterr().out
    assert main([DATASET], data_root=tmp_path) == 0
    assert "already" in capsys.readouterr().out


def test_script_answers_an_unknown_id_with_code_2() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "KuaiVideo_x3"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean KuaiVideo_x2" in done.stderr
