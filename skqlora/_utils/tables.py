"""Small tables for people to read, as HTML for notebooks."""

import html
from collections.abc import Iterable, Sequence


def html_table(caption: str, rows: Iterable[Sequence[str]]) -> str:
    """Write a table as HTML, with every text in it escaped.

    Parameters
    ----------
    caption : str
    rows : iterable of sequence of str
        The cells of each row, of which the first one is its name.

    Returns
    -------
    table : str
    """
    lines = "".join(
        f"<tr><th scope='row' style='text-align: left'>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return f"<table><caption>{html.escape(caption)}</caption><tbody>{lines}</tbody></table>"
