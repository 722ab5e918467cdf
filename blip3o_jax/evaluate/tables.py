"""Numbers as people read them, beside the JSON for programs."""

from collections.abc import Mapping

Row = Mapping[str, float | None]


def table(rows: Mapping[str, Row]) -> str:
    """A line a row and a column a key of the first row, whose words stand above each other.

    Two digits behind the point; "-" where nothing was measured, nothing where a row has no such
    key.
    """
    columns = list(next(iter(rows.values())))
    titles = [column.split("_") for column in columns]
    depth = max(map(len, titles))
    lines = [
        ["", *line] for line in zip(*([""] * (depth - len(t)) + t for t in titles), strict=True)
    ]
    lines += [[name, *(_cell(row, column) for column in columns)] for name, row in rows.items()]
    # Names to the left, numbers to the right.
    first, *others = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([f"{name:{first}}", *map(str.rjust, cells, others)]).rstrip()
        for name, *cells in lines
    )


def _cell(row: Row, column: str) -> str:
    value = row.get(column, "")
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
