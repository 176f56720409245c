"""The page of a gallery: one HTML file that holds its pictures and needs nothing else."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from ..plots import printable

#: Width of a picture on the page: its own between these; smaller ones are enlarged pixel by pixel.
LEAST_WIDTH, MOST_WIDTH = 96, 192
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p { margin: 0.2rem 0; color: #444; }
table { border-spacing: 3px; }
th { font-weight: 400; text-align: left; padding-right: 0.8rem; white-space: nowrap; }
th small { display: block; color: #777; }
thead th { color: #777; font-size: 0.8rem; line-height: 1.2; padding: 0; text-align: center; }
tbody th { position: sticky; left: 0; background: #fff; max-width: 22rem; overflow: hidden; text-overflow: ellipsis; }
td { padding: 0; } img { display: block; }
"""


@dataclass
class Row:
    """A row of pictures.

    Args:
        name: At its left.
        note: Below the name, smaller.
        pictures: The pictures.
        titles: What each shows, in words, for the pointer and for readers of the screen.
    """

    name: str
    note: str
    pictures: list[Image.Image]
    titles: list[str]


@dataclass
class Section:
    """A table of pictures.

    Args:
        title: Above it, if not empty.
        columns: Names of the columns, of a line or more.
        rows: The rows.
    """

    title: str
    columns: list[str]
    rows: list[Row]


def render(title: str, lines: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        title: Its title.
        lines: Text below the title.
        sections: The tables.
    """
    text = "".join(f"<p>{escape(line)}</p>\n" for line in lines)
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n{text}{''.join(map(_table, sections))}</html>\n"
    )
    return printable(page)


def _table(section: Section) -> str:
    heading = f"<h2>{escape(section.title)}</h2>\n" if section.title else ""
    columns = "".join(f"<th>{'<br>'.join(escape(name).splitlines())}</th>" for name in section.columns)
    rows = "\n".join(map(_row, section.rows))
    return f"{heading}<table>\n<thead><tr><th></th>{columns}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n"


def _row(row: Row) -> str:
    note = f"<small>{escape(row.note)}</small>" if row.note else ""
    cells = "".join(
        f"<td>{_picture(picture, title)}</td>" for picture, title in zip(row.pictures, row.titles, strict=True)
    )
    return f'<tr><th title="{escape(row.name)}">{escape(row.name)}{note}</th>{cells}</tr>'


def _picture(picture: Image.Image, title: str) -> str:
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    width = min(max(picture.width, LEAST_WIDTH), MOST_WIDTH)
    pixelated = ' style="image-rendering: pixelated"' if picture.width < width else ""
    name = escape(title)
    return f'<img width="{width}" alt="{name}" title="{name}"{pixelated} src="data:image/png;base64,{data}">'
