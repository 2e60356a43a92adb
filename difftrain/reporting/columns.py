"""Records as columns: the figures of many records, each name an array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from difftrain.errors import import_extra, near_matches

if TYPE_CHECKING:
    import pandas

WHOLE = range(-(2**63), 2**63)  # what int64 holds


class Columns(Mapping[str, "np.ndarray[Any, Any]"]):
    """Figures by name, one for each record: ``columns["loss"]`` is a NumPy array (n,).

    A figure within a figure has both names with a dot between, such as ``masked_nll.15`` or ``cases.masked.nll``.
    Whole numbers are int64, others float64 with NaN where a record lacks one, words are text with "" there.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        rows = [_flat(record) for record in records]
        names = dict.fromkeys(name for row in rows for name in row)
        self._columns = {name: _column([row.get(name) for row in rows]) for name in names}
        self._n_records = len(rows)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        try:
            return self._columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r}{near_matches(str(name), list(self._columns))}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"<{self._n_records} records: {', '.join(self) or 'no columns'}>"

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with these columns, a row a record; raises UserError where pandas is not installed."""
        return import_extra("pandas", "pandas").DataFrame(dict(self))


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record holds, inner names after a dot; without its kind, which all share, and without lists."""
    found, todo = {}, [("", record)]
    while todo:
        prefix, table = todo.pop()
        for name, value in table.items():
            if isinstance(value, Mapping):
                todo.append((f"{prefix}{name}.", value))
            elif not isinstance(value, list):
                found[prefix + name] = value
    found.pop("kind", None)
    return found


def _column(values: list[Any]) -> np.ndarray[Any, Any]:
    if all(type(value) is int and value in WHOLE for value in values):
        return np.array(values, dtype=np.int64)
    if any(isinstance(value, str) for value in values) and not any(map(_is_number, values)):
        return np.array([value if isinstance(value, str) else "" for value in values], dtype=np.str_)
    return np.array([_as_float(value) for value in values], dtype=np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _as_float(value: Any) -> float:
    try:
        return float(value) if _is_number(value) else float("nan")
    except OverflowError:
        return float("nan")
