"""A table on the terminal."""

from collections.abc import Container, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    below: str | None = None,
    ends: Sequence[bool] = (),
    wraps: Container[int] = (),
) -> None:
    """Print a table, two blanks between its columns.

    Args:
        console: where to.
        titles: of the columns.
        rows: one text for each column.
        left: number of first columns whose texts begin at the left; those of the others end at the right.
        below: what the numbers are.
        ends: for each row whether a line comes after it.
        wraps: columns whose texts are broken into lines where the console is narrow.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=below, caption_justify="left")
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < left else "right", no_wrap=i not in wraps)
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=any(ends[i : i + 1]))
    console.print(table)
