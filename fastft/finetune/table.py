"""Tables for a terminal."""

from collections.abc import Sequence
from typing import Any


def text(rows: Sequence[Sequence[Any]], digits: int = 4) -> str:
    """Rows under each other in columns: the first row heads them, floats are rounded to digits."""
    cells = [[f"{c:.{digits}g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # A column's first line decides nothing: names stand left, whatever is a number right.
    right = [
        all(isinstance(row[i], int | float) for row in rows[1:] if row[i] != "")
        for i in range(len(widths))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )
