"""Rows of a split as checked arrays: the whole file, or any part of it by the same checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from model_zoo.compat import FeatureMap
from model_zoo.errors import DataError
from model_zoo.pipeline import columns, parquet_files
from model_zoo.pipeline.feature_map import ROW_COLUMNS

#: the label's name among a split's readers; its column may be called as a feature is
LABEL = "label:"

#: reads a column of a table, given the file's name, and refuses what cannot be
ColumnReader = Callable[[pl.DataFrame, str], Any]


@dataclass(frozen=True)
class Split:
    """The impressions of one file, or some of them.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        path: the file.
        user_index, item_index, seq_len: int32 ``[N]``.
        label: float32 ``[N]``, 0 or 1.
        context: context feature columns, ``[N]`` or ``[N, m]``.
        group: int64 ``[N]``, or None without ``group_id``.
        rows: int64 ``[N]``, where the rows stand in the file; None if they are all of it, in its order.
    """

    name: str
    path: str
    user_index: npt.NDArray[np.int32]
    item_index: npt.NDArray[np.int32]
    seq_len: npt.NDArray[np.int32]
    label: npt.NDArray[np.float32]
    context: dict[str, columns.Array]
    group: npt.NDArray[np.int64] | None
    rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        arrays = [self.user_index, self.item_index, self.seq_len, self.label, *self.context.values()]
        return sum(array.nbytes for array in [*arrays, self.group, self.rows] if array is not None)

    def parts(self) -> Iterator[Split]:
        """The split in parts that fit into memory: itself."""
        yield self

    def take(self, rows: npt.NDArray[np.int64]) -> Split:
        """The given rows, counted within this split."""
        return replace(
            self,
            user_index=self.user_index.take(rows),
            item_index=self.item_index.take(rows),
            seq_len=self.seq_len.take(rows),
            label=self.label.take(rows),
            context={name: column.take(rows, axis=0) for name, column in self.context.items()},
            group=None if self.group is None else self.group.take(rows),
            rows=rows if self.rows is None else self.rows.take(rows),
        )


def joined(parts: Sequence[Split]) -> Split:
    """Parts of one split, one after the other."""
    if len(parts) == 1:
        return parts[0]

    def column(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    names = ("user_index", "item_index", "seq_len", "label", "group", "rows")
    context = {name: np.concatenate([part.context[name] for part in parts]) for name in parts[0].context}
    return replace(parts[0], context=context, **{name: column(name) for name in names})


@dataclass(frozen=True)
class SplitReader:
    """Reads one file of impressions and checks its row columns against items and histories.

    Attributes:
        path: the file.
        name: ``train``, ``valid`` or ``test``.
        lengths: of each user's history, int64 ``[users]``.
        num_items: items, the padding row included.
        distinct: every group id of the file (`columns.distinct_groups`), if it is read in parts and they need numbering.
    """

    path: str
    name: str
    feature_map: FeatureMap
    lengths: npt.NDArray[np.int64]
    num_items: int
    distinct: pl.Series | None = None

    @property
    def context(self) -> dict[str, dict[str, Any]]:
        """Specifications of the context features."""
        features = self.feature_map.features.items()
        return {name: spec for name, spec in features if spec["type"] != "meta" and spec.get("source") != "item"}

    def table(self, rows: tuple[int, int] | None = None) -> pl.DataFrame:
        """The columns that a split needs, as the file has them.

        Raises:
            DataError: missing or unreadable file, missing column, no rows.
        """
        group_id = self.feature_map.group_id
        label = self.feature_map.labels[0]
        wanted = dict.fromkeys([*ROW_COLUMNS, *self.context, label, *([group_id] if group_id else [])])
        table = parquet_files.read_table(self.path, list(wanted), rows)
        if table.height == 0:
            raise DataError(f"{self.path}: no rows; the {self.name} split needs at least one impression")
        return table

    def read(self, rows: tuple[int, int] | None = None) -> Split:
        """The whole file, or the rows from the first number up to the second.

        Raises:
            DataError: a value that cannot be; names file, column and row.
        """
        table = self.table(rows)
        path: str = self.path if rows is None else columns.FilePart(self.path, rows[0])
        read = {name: column(table, path) for name, column in self.readers().items()}
        user, item, seq_len = (read.pop(name) for name in ROW_COLUMNS)
        self.check_history(user, seq_len, path)
        label = read.pop(LABEL)
        group_id = self.feature_map.group_id
        group = columns.groups(table[group_id], path, self.distinct) if group_id else None
        narrow = [column.astype(np.int32) for column in (user, item, seq_len)]
        numbers = None if rows is None else np.arange(*rows)
        return Split(self.name, self.path, narrow[0], narrow[1], narrow[2], label, read, group, numbers)

    def readers(self) -> dict[str, ColumnReader]:
        """How each column is read from the table and checked by itself: row columns, `LABEL`, context features."""
        users, items, label = len(self.lengths), self.num_items, self.feature_map.labels[0]
        width = self.feature_map.default_emb_dim

        def whole(name: str, bad: Callable[[Any], columns.Array], reason: str, dtype: Any = np.int64) -> ColumnReader:
            def read(table: pl.DataFrame, path: str) -> npt.NDArray[Any]:
                values = columns.integers(table[name], path).astype(dtype)
                columns.refuse(bad(values), values, path, name, reason, "{}:")
                return values

            return read

        def feature(name: str, spec: dict[str, Any]) -> ColumnReader:
            return lambda table, path: feature_column(table[name], path, spec, width)

        known_users, known_items = f"user_info holds users 0..{users - 1}", f"item_info holds items 1..{items - 1}"
        return {
            "user_index": whole("user_index", lambda user: (user < 0) | (user >= users), known_users),
            "item_index": whole("item_index", lambda item: (item <= 0) | (item >= items), known_items),
            "seq_len": whole("seq_len", lambda length: length < 0, "a length cannot be negative"),
            LABEL: whole(label, lambda value: (value != 0) & (value != 1), "labels must be 0 or 1", np.float32),
            **{name: feature(name, spec) for name, spec in self.context.items()},
        }

    def check_history(self, user: columns.Integers, seq_len: columns.Integers, path: str) -> None:
        """Refuse a ``seq_len`` beyond the user's history."""
        beyond = "beyond the user's history in user_info; rebuild the split"
        columns.refuse(seq_len > self.lengths[user], seq_len, path, "seq_len", beyond, "{}:")


def feature_column(
    series: pl.Series, path: str, spec: dict[str, Any], default_width: int | None = None
) -> columns.Array:
    """One feature's values as its type says: int32 ``[N]``, int32 ``[N, max_len]``, float32 ``[N]`` or ``[N, m]``.

    Args:
        default_width: the experiment's ``embedding_dim``, which an embedding feature has that names no width itself.

    Raises:
        DataError: a value that does not fit the feature's specification.
    """
    kind = spec["type"]
    if kind == "categorical":
        return columns.ids(series, path, spec["vocab_size"])
    if kind == "sequence":
        return columns.id_lists(series, path, spec["vocab_size"], spec["max_len"])
    if kind == "numeric":
        return columns.floats(series, path)
    encoder, embedding = spec.get("feature_encoder"), spec.get("embedding_dim", default_width)
    if not encoder:
        width = spec.get("pretrain_dim", embedding)
    elif "Identity" in str(encoder):
        width = spec.get("emb_output_dim", embedding)
    else:
        width = spec.get("pretrain_dim")
    return columns.vectors(series, path, width)
