"""Fetch LongCTR's public data sets from the Hugging Face hub, as parquet files or zipped, and check them.

Everything happens in a temporary folder beside the data set's own; the five files move in once all of them have opened,
and with them their sizes and SHA-256 sums, by which a later change of a file is found.
"""

import argparse
import difflib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.parquet as pq

from model_zoo.errors import DataError, answered
from model_zoo.files import write_whole

HUB_OWNER = "reczoo"
DATASETS = ("MicroVideo1.7M_x2", "KuaiVideo_x2", "Ebnerd_small_x1")
FILES = tuple(f"{name}.parquet" for name in ("train", "valid", "test", "user_info", "item_info"))
SUMS = "checksums.json"


def fetch_from_hub(repository: str, folder: Path) -> None:
    """Copy the parquet and zip files of the hub's data set ``repository`` into ``folder``; DataError if it fails."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and not endpoint.lower().startswith("https://"):
        raise DataError(f"HF_ENDPOINT is {endpoint!r}; data are fetched over https:// only: unset it or correct it.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError("huggingface_hub is not installed; run `pip install -e .[hub]`.") from None
    try:
        snapshot_download(repository, repo_type="dataset", local_dir=folder, allow_patterns=["*.parquet", "*.zip"])
    except Exception as error:  # the hub's errors have no common base over its versions and its two http libraries
        reason = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
        raise DataError(
            f"{repository} could not be fetched from the Hugging Face hub ({type(error).__name__}: {reason}); "
            "check the network connection and run the command again."
        ) from None


def download(dataset_id: str, out: Path, fetch: Callable[[str, Path], None] | None = None) -> bool:
    """Put the five parquet files of ``dataset_id`` into ``out``; False when they are there and open already.

    ``fetch(repository, folder)`` fills an empty folder (default: ``fetch_from_hub``). Raises DataError for an unknown
    id, a failed fetch, a damaged or unsafe archive, a missing or unreadable file, and one that changed since it was
    downloaded; ``out`` then is as it was before.
    """
    if dataset_id not in DATASETS:
        known = {name.lower(): name for name in DATASETS}
        near = difflib.get_close_matches(dataset_id.lower(), known, cutoff=0.4) or list(known)
        names = " or ".join(known[name] for name in near)
        raise DataError(f"{dataset_id!r} is not a data set of LongCTR; did you mean {names}?")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give --out a folder.")
    if not _unreadable(out):
        if faults := check_sums(out):
            raise DataError(f"{'; '.join(faults)}. Delete what is wrong and run the command again.")
        return False
    repository = f"{HUB_OWNER}/{dataset_id}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".partial", dir=out.parent))
        try:
            fetched, ready = work / "fetched", work / "ready"
            fetched.mkdir()
            ready.mkdir()
            (fetch or fetch_from_hub)(repository, fetched)
            _collect(repository, fetched, ready)
            record_sums(repository, ready)
            _place(ready, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}); free the space or choose --out."
        ) from None
    return True


def check_sums(folder: Path, contents: bool = True) -> list[str]:
    """What differs from the sizes and SHA-256 sums recorded at the download, a clause for each file.

    Args:
        folder: of the five files; without a record of sums there is nothing to differ from.
        contents: compare sums too; sizes alone take no time.
    """
    record = folder / SUMS
    if not record.exists():
        return []
    try:
        sums = json.loads(record.read_text(encoding="utf-8"))["files"]
        wanted = {name: (int(sums[name]["size"]), str(sums[name]["sha256"])) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{record} is not a record of sizes and sums"]
    faults = []
    for name, (size, sha256) in wanted.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                faults.append(f"{path} has {path.stat().st_size} bytes, {size} when it was downloaded")
            elif contents and _sha256(path) != sha256:
                faults.append(f"{path} has changed since it was downloaded: its SHA-256 sum is another")
        except OSError as error:
            faults.append(f"{path} cannot be read ({error.strerror or error})")
    return faults


def unzip(archive: Path, folder: Path) -> None:
    """Extract the five files that are in ``archive``, in whatever folder there, flat into ``folder``.

    Raises DataError when the archive is damaged, holds a file twice, or names a path outside of itself.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.infolist():
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or PureWindowsPath(member.filename).drive:
                    raise DataError(
                        f"{archive.name} holds {member.filename!r}, a path outside the archive; do not use it."
                    )
                if path.name not in FILES or member.is_dir() or "__MACOSX" in path.parts:
                    continue
                if (folder / path.name).exists():
                    raise DataError(f"{archive.name} holds {path.name} twice; unzip it by hand and keep the right one.")
                with opened.open(member) as source, open(folder / path.name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, unknown method
        raise DataError(f"{archive.name} cannot be unzipped ({error}); fetch it again.") from None


@answered
def main(argv: Sequence[str] | None = None, data_root: Path = Path("data")) -> int:
    """``DATASET_ID [--out DIR]``, by default into ``data_root / DATASET_ID``; returns 2 with one line when it fails."""
    parser = argparse.ArgumentParser(description="Fetch a data set of LongCTR from the Hugging Face hub.")
    parser.add_argument("dataset_id", metavar="DATASET_ID", help=", ".join(DATASETS))
    parser.add_argument("--out", type=Path, help="folder for the five parquet files (default: data/DATASET_ID)")
    args = parser.parse_args(argv)
    out = args.out or data_root / args.dataset_id
    new = download(args.dataset_id, out)
    checked = "sizes and sums recorded" if new else "as recorded" if (out / SUMS).exists() else "no sums recorded"
    print(f"{out}: {'complete' if new else 'was complete already'}, {checked}")
    for name in FILES:
        print(f"{name}: {pq.read_metadata(out / name).num_rows} rows, {(out / name).stat().st_size} bytes")
    return 0


def record_sums(repository: str, folder: Path) -> None:
    files = {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in FILES}
    write_whole(folder / SUMS, json.dumps({"repository": repository, "files": files}, indent=2) + "\n")


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()


def _collect(repository: str, fetched: Path, ready: Path) -> None:
    """Move the five files of a fetched repository into ``ready``; archives are opened only for those it lacks."""
    if missing := _move_found(repository, fetched, ready):
        for number, archive in enumerate(sorted(fetched.rglob("*.zip"))):
            extracted = fetched / f"unzipped-{number}"
            extracted.mkdir()
            unzip(archive, extracted)
            archive.unlink()
        missing = _move_found(repository, fetched, ready, missing)
    if missing:
        raise DataError(
            f"{repository} holds no {', '.join(missing)}; see data/README.md for the layout it should have."
        )
    if reasons := _unreadable(ready):
        name, reason = next(iter(reasons.items()))
        raise DataError(f"{name} of {repository} is not a readable parquet file ({reason}); run the command again.")


def _move_found(repository: str, fetched: Path, ready: Path, names: Sequence[str] = FILES) -> list[str]:
    """Move each of ``names`` found anywhere below ``fetched`` into ``ready``; returns those not found."""
    missing = []
    for name in names:
        found = sorted(path for path in fetched.rglob(name) if path.is_file())
        if len(found) > 1:
            places = " and ".join(str(path.relative_to(fetched)) for path in found)
            raise DataError(f"{repository} holds {name} more than once ({places}); fetch the right one by hand.")
        if found:
            os.replace(found[0], ready / name)
        else:
            missing.append(name)
    return missing


def _unreadable(folder: Path) -> dict[str, str]:
    """The files missing from ``folder`` or without a readable parquet footer, each with the reason."""
    reasons = {}
    for name in FILES:
        try:
            pq.read_metadata(folder / name)
        except (pa.ArrowException, OSError) as error:
            reasons[name] = (str(error).splitlines() or [""])[0].rstrip(".")
    return reasons


def _place(ready: Path, out: Path) -> None:
    """Make ``ready`` the folder ``out``, or move its files there, the older ones gone before the first comes in."""
    if not out.exists():
        os.rename(ready, out)
        return
    for name in (*FILES, SUMS):
        (out / name).unlink(missing_ok=True)
    for name in (*FILES, SUMS):  # the sums last: they say that the files are all there
        os.replace(ready / name, out / name)
