"""What speaks against rows of prompts, gathered: one sentence for all rows with the same fault, in the order they were found."""

from __future__ import annotations

from collections.abc import Sequence

from marl_core.errors import DataError, counted

ROWS_NAMED = 5
FAULTS_NAMED = 5
"""How many different faults of single rows are told; a file of another kind has as many as rows."""


class RowProblems:
    """Faults of the rows of one source, and what was done about rows that the config allows to drop or cut."""

    def __init__(self, source: str, asked_by: str) -> None:
        """`source`: the file or data set as the config names it, under the key `asked_by`."""
        self.source, self.asked_by = source, asked_by
        self.errors: list[DataError] = []
        self.remarks: list[str] = []
        self._by_fault: dict[str, tuple[DataError, list[int]]] = {}

    def refuse_row(self, error: DataError, where: str, index: int) -> None:
        """A fault of one row; those that differ in the row's name alone are told together."""
        fault = str(error).replace(where, "")
        self._by_fault.setdefault(fault, (error, []))[1].append(index)

    def rows(self, rows: Sequence[int], *, refused: bool, what: tuple[str, str], why: str) -> None:
        """Rows of one kind: a fault where they are `refused` (`why`: the way out), else a remark that they were dropped (`why`: by what).

        `what`: what is said of one prompt, and of several.
        """
        if not rows:
            return
        said = f"{self.asked_by}: {counted(len(rows), 'prompt')} of {self.source} {what[len(rows) > 1]} ({named(rows)})"
        if refused:
            self.errors.append(DataError(f"{said}. Correct {'it' if len(rows) == 1 else 'them'}, or set {why}."))
        else:
            self.remarks.append(f"{said} and {'was' if len(rows) == 1 else 'were'} dropped ({why}).")

    def all(self) -> list[DataError]:
        """Every fault, those of single rows first."""
        return [*self._of_rows(), *self.errors]

    def _of_rows(self) -> list[DataError]:
        told = [_with_others(error, rows) for error, rows in list(self._by_fault.values())[:FAULTS_NAMED]]
        hidden = [rows for _, rows in list(self._by_fault.values())[FAULTS_NAMED:]]
        if hidden:
            count = sum(map(len, hidden))
            told.append(
                DataError(f"{self.asked_by}: {counted(count, 'more row')} of {self.source} can't be used either.")
            )
        return told


def named(rows: Sequence[int]) -> str:
    """The first few of some rows (0-based) by number, counted from 1: `row 6`, `rows 1, 2, 3, 4, 5, ...`."""
    numbers = [str(row + 1) for row in rows[:ROWS_NAMED]] + (["..."] if len(rows) > ROWS_NAMED else [])
    return f"row{'' if len(rows) == 1 else 's'} {', '.join(numbers)}"


def _with_others(error: DataError, rows: Sequence[int]) -> DataError:
    others = rows[1:]
    if not others:
        return error
    return DataError(f"{error} The same holds for {counted(len(others), 'more row')} ({named(others)}).")
