"""Checkpoints: what they hold, whom they load into, and what damage to the file does."""

import io
import logging
import os
import pickle
import random
import shutil
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_zoo.checkpoint import misfits, read_checkpoint, read_weights, write_checkpoint, write_weights
from model_zoo.errors import ConfigError, FileError

STATE = {
    "block.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    "block.codes": torch.arange(5),
    "head.scale": torch.tensor(2.5, dtype=torch.bfloat16),
    "head.on": torch.tensor([True, False]),
}
CONFIG = {"num_heads": 2, "dnn_hidden_units": [8, 4], "lr": 1e-5, "head": "dnn", "dropout": None, "batch_norm": True}
CASES = 200


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).tolist())


def same(found: Any, wanted: Any) -> bool:
    """Equal to the last bit, types included."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, Tensor):
        return found.dtype == wanted.dtype and found.shape == wanted.shape and bits(found) == bits(wanted)
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.model"
    write_weights(path, "TWIN", CONFIG, STATE)
    return path


# ---- what they hold --------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_plain_values_and_comes_back_bit_for_bit(path: Path) -> None:
    wanted = {"format": "longctr-mos checkpoint", "version": 1, "model": "TWIN", "config": CONFIG, "state": STATE}
    content = torch.load(path, weights_only=True)
    assert content.keys() == {*wanted, "digest"} and content["config"] == CONFIG
    found = read_weights(path)
    assert (found.model, found.config) == ("TWIN", CONFIG)
    assert list(found.state) == list(STATE) and all(torch.equal(found.state[name], STATE[name]) for name in STATE)
    assert [value.dtype for value in found.state.values()] == [value.dtype for value in STATE.values()]


def test_nested_content_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {
        "format": "a state", "none": None, "yes": True, "number": 2**63 + 1, "real": [0.1, float("inf")],
        "text": "é", "list": [1, [2, (3, "x")]], "keys": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "empty": [(), {}, torch.zeros(0, 2)],
    }  # fmt: skip
    write_checkpoint(tmp_path / "a", content)
    found = read_checkpoint(tmp_path / "a")
    assert same(found, content)


def test_what_is_almost_plain_is_made_plain(tmp_path: Path) -> None:
    class Text(str):
        pass

    content = {
        "dict": OrderedDict(a=1), "parameter": nn.Parameter(torch.ones(2)), "size": torch.Size([2, 3]), "text": Text("x"),
        "real": np.float64(0.1), "single": np.float32(0.5), "whole": np.int64(3), "yes": np.bool_(True),
    }  # fmt: skip
    write_checkpoint(tmp_path / "a", content)
    wanted = {
        "dict": {"a": 1}, "parameter": torch.ones(2), "size": (2, 3), "text": "x",
        "real": 0.1, "single": 0.5, "whole": 3, "yes": True,
    }  # fmt: skip
    found = read_checkpoint(tmp_path / "a")
    assert same(found, wanted) and type(found["parameter"]) is Tensor


@pytest.mark.parametrize("value", [np.zeros(2), object(), {1, 2}, b"bytes", lambda: None])
def test_what_could_not_be_read_again_is_not_written(value: Any, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(TypeError, match=rf"content\['deep'\]\[1\] is a {type(value).__name__}"):
        write_checkpoint(path, {"deep": [0, value]})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_config_value_of_any_kind_does_not_keep_weights_from_being_written(tmp_path: Path) -> None:
    write_weights(tmp_path / "a", "TWIN", {"activation": nn.ReLU(), "units": (8,)}, STATE)
    assert read_weights(tmp_path / "a").config == {"activation": "ReLU()", "units": (8,)}


def test_a_view_does_not_bring_along_what_it_is_a_view_of(tmp_path: Path) -> None:
    table = torch.zeros(100_000)
    write_checkpoint(tmp_path / "a", {"row": table[:5], "twice": [table[:0]]})
    assert (tmp_path / "a").stat().st_size < 10_000
    shared = torch.zeros(10_000)
    write_checkpoint(tmp_path / "b", {"a": shared, "b": shared})
    assert (tmp_path / "b").stat().st_size < 50_000


# ---- whom they load into ---------------------------------------------------------------------------------------------


def check(found: Path, model: str, own: dict[str, Tensor], **config: Any) -> None:
    weights = read_weights(found)
    weights.check(model, {**CONFIG, **config}, own, weights.state)


def refusal(*args: Any, **config: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(*args, **config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_model_and_config_that_were_written_load(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(path, "TWIN", STATE, another_key=1)
    assert not caplog.records


def test_another_model_is_refused_with_both_names_even_if_all_shapes_fit(path: Path) -> None:
    assert refusal(path, "DIN", STATE) == f"{path}: holds TWIN, which does not fit DIN"
    own = {**STATE, "block.codes": torch.zeros(6)}
    assert refusal(path, "DIN", own) == f"{path}: holds TWIN, which does not fit DIN: block.codes is (5,), not (6,)"


def test_mismatches_are_named_up_to_four_and_counted_and_the_config_tells_why(path: Path) -> None:
    own = {**STATE, "block.weight": torch.zeros(4, 4)}
    assert refusal(path, "TWIN", own, num_heads=4) == (
        f"{path}: holds TWIN of another config and does not fit TWIN: block.weight is (4, 3), not (4, 4) "
        "(num_heads is 2 there, 4 here)"
    )
    many = {f"own.{number}": torch.zeros(1) for number in range(9)}
    assert refusal(path, "TWIN", many).endswith(
        "does not fit TWIN: own.0 is missing; own.1 is missing; own.2 is missing; own.3 is missing; and 9 more"
    )
    assert len(misfits(many, STATE)) == 13


def test_a_config_that_changes_no_shape_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "model_zoo"):
        check(path, "TWIN", STATE, num_heads=4, dnn_hidden_units=[8, 4])
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: trained with another config: num_heads is 2 there, 4 here"
    ]


def test_a_bare_state_dict_loads_where_its_parameters_fit(tmp_path: Path) -> None:
    for content in (STATE, OrderedDict(STATE)):
        torch.save(content, tmp_path / "bare")
        found = read_weights(tmp_path / "bare")
        assert found.model is None and found.config == {} and list(found.state) == list(STATE)
        check(tmp_path / "bare", "TWIN", STATE)
    assert refusal(tmp_path / "bare", "DIN", {"w": torch.zeros(1)}).startswith(
        f"{tmp_path / 'bare'}: does not fit DIN: w is missing; block.weight is not in this model; "
    )


# ---- other files -----------------------------------------------------------------------------------------------------


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    for legacy in (False, True):
        torch.save({"w": Malice(tmp_path / "run")}, tmp_path / "a", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ConfigError, match="cannot be read as a checkpoint") as error:
            read_weights(tmp_path / "a")
        assert "\n" not in str(error.value) and (legacy or "could run code" in str(error.value))
    (tmp_path / "a").write_bytes(pickle.dumps(Malice(tmp_path / "run")))
    with pytest.raises(ConfigError, match="cannot be read as a checkpoint"):
        read_weights(tmp_path / "a")
    assert not (tmp_path / "run").exists()


def test_other_files_are_refused_in_one_sentence(path: Path) -> None:
    def saved(content: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("train.parquet", b"PAR1")
    header = {"format": "longctr-mos checkpoint", "model": "TWIN", "config": {}, "state": STATE}
    newer = r"newer version of this package \(checkpoint version 2, this one reads 1\)"
    training = saved({"format": "longctr-mos training state", "model": STATE})
    cases: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "cannot be read as a checkpoint: it is damaged, cut short or another kind of file"),
        "text": (b"expid: TWIN\n", "cannot be read as a checkpoint: it is damaged"),
        "zip": (archive.getvalue(), r"cannot be read as a checkpoint \("),
        "tensor": (saved(torch.zeros(3)), "holds no named tensors"),
        "numbered": (saved({0: torch.zeros(3)}), "holds no named tensors"),
        "nothing": (saved({}), "holds something else, not a model's weights"),
        "numbers": (saved({"AUC": 0.5}), "holds something else, not a model's weights"),
        "state": (training, "holds a longctr-mos training state, not"),
        "newer": (saved({**header, "version": 2}), newer),
        "no version": (saved(header), "newer version"),
        "no tensors": (saved({**header, "version": 1, "state": {"w": 1}}), "not a model's weights"),
    }
    for name, (content, message) in cases.items():
        other = path.with_name(name)
        other.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as error:
            read_weights(other)
        assert str(error.value).startswith(f"{other}: ") and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no such checkpoint"):
        read_weights(path.with_name("absent"))
    with pytest.raises(ConfigError, match=r"cannot be read as a checkpoint \(Is a directory\)"):
        read_weights(path.parent)


# ---- damage ----------------------------------------------------------------------------------------------------------


def outcome(path: Path, damaged: bytes, wanted: dict[str, Any]) -> str:
    path.write_bytes(damaged)
    try:
        found = read_checkpoint(path)
    except ConfigError as error:
        assert str(error).startswith(f"{path}: cannot be read as a checkpoint") and "\n" not in str(error)
        return "refused"
    return "as it was" if same(found, wanted) else "changed"


@pytest.mark.parametrize("kind", ["ours", "bare"])
def test_damage_never_changes_what_is_read_and_never_gives_a_traceback(kind: str, path: Path) -> None:
    """Flipped bits, overwritten stretches, cuts and gaps; bytes that pad the archive may change without a consequence."""
    if kind == "bare":
        torch.save(STATE, path)
    whole, wanted = path.read_bytes(), read_checkpoint(path)
    draw = random.Random(0)
    seen: Counter[tuple[str, str]] = Counter()
    for _ in range(CASES):
        place = draw.randrange(len(whole))
        flipped = bytes([whole[place] ^ 1 << draw.randrange(8)])
        size = draw.choice([1, 8, 64])
        for name, damaged in {
            "bit": whole[:place] + flipped + whole[place + 1 :],
            "stretch": whole[:place] + draw.randbytes(size) + whole[place + size :],
            "cut": whole[:place],
            "gap": whole[:place] + whole[place + size :],
        }.items():
            seen[name, outcome(path, damaged, wanted)] += 1
    assert not [key for key in seen if key[1] == "changed"]
    assert seen["cut", "refused"] == seen["gap", "refused"] == CASES
    assert seen["bit", "refused"] > CASES / 3 and seen["bit", "as it was"] > 0


def test_every_byte_of_a_weight_is_guarded(path: Path) -> None:
    """Without the check of sums ``torch.load`` reads such a file, and gives other weights."""
    whole, weights = path.read_bytes(), STATE["block.weight"].numpy().tobytes()
    start = whole.index(weights)
    unnoticed = 0
    for place in range(start, start + len(weights)):
        damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        unnoticed += not torch.equal(torch.load(io.BytesIO(damaged), weights_only=True)["state"]["block.weight"],
                                     STATE["block.weight"])  # fmt: skip
        assert outcome(path, damaged, {}) == "refused"
    assert unnoticed == len(weights)


def test_a_weight_that_differs_from_the_recorded_digest_is_refused(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    for change in ({"state": {**STATE, "head.on": torch.tensor([True, True])}}, {"model": "DIN"}, {"config": {}}):
        torch.save({**content, **change}, path)
        with pytest.raises(ConfigError, match="is damaged"):
            read_checkpoint(path)
    del content["digest"]
    torch.save(content, path)  # as a script may write that edits a checkpoint
    assert same(read_checkpoint(path), content)


def test_a_part_called_a_folder_is_refused(tmp_path: Path) -> None:
    """``torch.load`` would take memory that nobody wrote for that part's tensor."""
    torch.save(STATE, tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        part = next(name for name in archive.namelist() if name.endswith("data/0"))
        attributes = whole.index(part.encode(), archive.start_dir) - 46 + 38  # a part's name follows 46 bytes about it
    damaged = whole[:attributes] + bytes([whole[attributes] | 0x10]) + whole[attributes + 1 :]
    assert zipfile.ZipFile(io.BytesIO(damaged)).testzip() is None
    assert torch.load(io.BytesIO(damaged), weights_only=True).keys() == STATE.keys()
    assert outcome(tmp_path / "a", damaged, {}) == "refused"


# ---- full disks ------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for size in (5_000, 500_000):  # the disk is full at the end of the archive, and within a tensor
            with pytest.raises(FileError, match=r"a\.model: cannot be written \(.* MiB free there\); free some space"):
                write_weights(path, "TWIN", CONFIG, {"w": torch.zeros(size)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_gone_is_said(path: Path) -> None:
    shutil.rmtree(path.parent)
    with pytest.raises(FileError, match="No such file or directory"):
        write_weights(path, "TWIN", CONFIG, STATE)
