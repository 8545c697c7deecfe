"""Tables that print: text for terminals, HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence


class Table:
    """A printable table: text for terminals, HTML for notebooks."""

    def _title(self) -> str:
        raise NotImplementedError

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """The header and the rows."""
        raise NotImplementedError

    def _footer(self) -> str:
        return ""

    def __str__(self) -> str:
        header, rows = self._cells()
        widths = [
            max(len(row[i]) for row in [header, *rows]) for i in range(len(header))
        ]
        lines = [
            "  ".join(
                cell.ljust(w) for cell, w in zip(row, widths, strict=True)
            ).rstrip()
            for row in [header, *rows]
        ]
        rule = "-" * max(len(line) for line in lines)
        parts = [self._title(), lines[0], rule, *lines[1:], rule, self._footer()]
        return "\n".join(part for part in parts if part)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, rows = self._cells()

        def line(cells: Sequence[str], tag: str) -> str:
            inside = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells)
            return f"<tr>{inside}</tr>"

        body = line(header, "th") + "".join(line(row, "td") for row in rows)
        caption = f"<caption>{html.escape(self._title())}</caption>"
        footer = f"<p>{html.escape(self._footer())}</p>"
        return f"<table>{caption}{body}</table>{footer}"


_LISTED = 12  # lines


def some(title: str, lines: Sequence[str]) -> Iterator[str]:
    """The first lines under a title, and how many more there are."""
    if lines:
        yield f"{title}:"
        yield from (f"  {line}" for line in lines[:_LISTED])
    if len(lines) > _LISTED:
        yield f"  and {len(lines) - _LISTED} more"
