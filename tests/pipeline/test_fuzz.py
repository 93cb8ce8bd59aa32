"""A sample of ``benchmark/fuzz.py``: damaged files end in a clear error or are read rightly, and nothing goes uncounted."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import in_groups

from model_zoo.errors import DataError
from model_zoo.pipeline import parquet_files
from model_zoo.pipeline.dataset import read_items
from model_zoo.pipeline.feature_map import build_feature_map


@pytest.fixture(scope="module")
def fuzz(root: Path) -> Iterator[ModuleType]:
    """``benchmark/fuzz.py``."""
    sys.path.insert(0, str(root / "benchmark"))
    import fuzz

    yield fuzz
    sys.path.remove(str(root / "benchmark"))


def test_a_sample_of_damaged_files_never_ends_in_a_traceback(
    fuzz: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All kinds in this process: a crash would end the tests, which is a failure too."""
    import fuzz_cases

    fuzz_cases.make_files(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    results = [
        (kind, number, *fuzz_cases.case(tmp_path, kind, number, work))
        for kind in fuzz.KINDS for number in range(5_000, 5_025)
    ]  # fmt: skip
    assert not capfd.readouterr().err  # no library prints its stack before it raises
    assert not [result for result in results if result[2].split(",")[0] in fuzz.FORBIDDEN]
    outcomes = {kind: [outcome for name, _, outcome, *_ in results if name == kind] for kind in fuzz.KINDS}
    for kind, found in outcomes.items():
        assert found.count("clear error") >= 4, kind
        assert "values changed" not in found or kind in ("h5", "yaml")  # all others have sums, or checksums of their own
    assert all("\n" not in words for kind, *_, words, _ in results if kind != "yaml")  # a config's problems: a line each


def test_a_reader_that_dies_or_hangs_is_counted_and_started_again(fuzz: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "reader.py"
    script.write_text(
        "import json, os, sys, time\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    number = json.loads(line)['number']\n"
        "    os.abort() if number == 1 else time.sleep(60) if number == 3 else None\n"
        "    print(json.dumps(['clear error', 'said', 'bit']), flush=True)\n"
    )
    reader = fuzz.Reader(tmp_path, tmp_path / "work", str(script), patience=2.0)
    try:
        found = [reader.result("train", number)[2] for number in range(5)]
    finally:
        reader.close()
    assert found == ["clear error", "crash", "clear error", "hang", "clear error"]
    shown = fuzz.table([("train", 0, "clear error", "", ""), ("h5", 0, "hang", "", "")])
    assert shown.splitlines()[0].startswith("| file | cases | clear error | schema changed | traceback | crash | hang")


def test_page_checksums_and_recorded_sums_find_a_change_that_stays_within_all_bounds(
    fuzz: ModuleType, tmp_path: Path
) -> None:
    import fuzz_cases

    fuzz_cases.make_files(tmp_path)
    feature_map = build_feature_map(fuzz_cases._validated(str(tmp_path / "config")))

    def changed(writer: str) -> str:
        """A copy of item_info in which one number of one image vector is another."""
        path = tmp_path / str(fuzz_cases.WRITERS.index(writer)) / "item_info.parquet"
        column = pq.read_metadata(path).row_group(1).column(3)
        content = bytearray(path.read_bytes())
        content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
        target = tmp_path / "changed.parquet"
        target.write_bytes(content)
        return str(target)

    sound = read_items(str(tmp_path / "0" / "item_info.parquet"), feature_map)["image_emb_dim4"]
    assert (read_items(changed("plain"), feature_map)["image_emb_dim4"] != sound).sum() == 1
    with pytest.raises(DataError, match=r"(?i)checksum.*copy or build it again"):
        read_items(changed("plain, page checksums"), feature_map)
    work = tmp_path / "work"
    work.mkdir()
    content = Path(changed("plain")).read_bytes()
    assert fuzz_cases.changes_found(tmp_path / "1", "item_info.parquet", content, work)


def test_each_way_of_damage_changes_the_bytes(fuzz: ModuleType) -> None:
    import fuzz_cases

    content = bytes(range(1, 201)) * 10
    for how in fuzz_cases.DAMAGES:
        for seed in range(20):
            random = np.random.default_rng(seed)
            found = fuzz_cases.damaged(content, how, random)
            assert len(found) == len(content) or (how == "cut" and len(found) < len(content))
            assert found != content or how in ("bytes", "swap")


# ---- what the readers do with it --------------------------------------------------------------------------------------


def test_a_panic_of_polars_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.parquet")
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)

    def panic(table: object) -> pl.DataFrame:
        raise parquet_files.PanicException("index out of bounds:\nthe length is 3")

    assert not issubclass(parquet_files.PanicException, Exception)
    monkeypatch.setattr(pl, "from_arrow", panic)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file \(index out of bounds\); copy or"):
        parquet_files.read_table(path, ["a"])


@pytest.mark.parametrize("name", [b"ARROW:schema", b"element", b"words"])
def test_bytes_that_are_no_text_do_not_reach_polars(
    name: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They would make it panic, and print its stack."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [[1], [2, 3]], "b": ["words", "words"]}), path)
    path.write_bytes(path.read_bytes().replace(name, b"\xff" + name[1:]))
    try:
        assert parquet_files.read_table(str(path), ["a", "b"])["a"].to_list() == [[1], [2, 3]]
        assert name != b"words"
    except DataError as error:
        assert "not a readable parquet file" in str(error)
    assert not capfd.readouterr().err


def test_an_interruption_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)
    with pytest.raises(KeyboardInterrupt), parquet_files.readable(str(path)):
        raise KeyboardInterrupt


def test_bytes_of_a_damaged_file_in_a_message_are_made_printable() -> None:
    assert parquet_files.reason_of(ValueError("header b'\x00\x1b[31m' differs.\nmore")) == "header b'??[31m' differs"
    assert parquet_files.reason_of(ValueError()) == "ValueError"


def test_footers_that_do_not_fit_their_file_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    in_groups(pl.DataFrame({"a": [1, 2, 3], "b": [[1], [], [2]]}), path, 2)
    assert parquet_files.row_groups(path) == [0, 2, 3]
    footer = pq.read_metadata(path)
    groups = [footer.row_group(number) for number in range(2)]
    size = (tmp_path / "a.parquet").stat().st_size
    assert not list(parquet_files._misfits(footer, groups, size))
    assert "do not add up to 3 rows" in next(parquet_files._misfits(footer, groups[:1], size))
    assert "column 'a' lies outside the file" in next(parquet_files._misfits(footer, groups, 8))
    assert list(parquet_files._misfits(footer, [groups[0], groups[0]], size))[-1] == "two of its columns overlap"


def test_a_file_that_was_written_anew_is_looked_at_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)
    assert parquet_files.row_count(path) == 2
    pl.DataFrame({"a": [1, 2, 3, 4, 5]}).write_parquet(path)
    assert parquet_files.row_count(path) == 5 and parquet_files.read_table(path, ["a"]).height == 5
