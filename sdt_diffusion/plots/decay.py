"""Draw maps of the decay of attention, head by head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

#: Kind of row -> colormap, and what its colors mean.
KINDS = {
    "decay": ("magma", "exp(M): factor of the decay on attention"),
    "attention": ("viridis", "attention, relative to the map's highest"),
}
MARK = "#00e5ff"
#: Maps in a line; more go to the next.
COLUMNS = 8
#: Sizes in inches: a map; the space between maps, at the left for labels, below a map, above a section, above all and
#: below all.
CELL, GAP, LEFT, NOTE, SECTION, TOP, BOTTOM = 1.1, 0.08, 0.85, 0.2, 0.3, 0.72, 0.75
#: Characters of a title that fit into the narrowest picture.
MAX_TITLE = 75
#: Smallest side of the mark around a patch, as a part of the picture.
MIN_MARK = 1 / 14


@dataclass
class DecayRow:
    """One patch, and a map for each head.

    Args:
        kind: A key of `KINDS`.
        label: Text at the left.
        picture: What the network sees; `None` for the same as in the row above.
        patch: Row and column of the patch.
        maps: Values from 0 to 1, shape (heads, rows, columns).
        notes: Text below each map.
    """

    kind: str
    label: str
    picture: Image.Image | None
    patch: tuple[int, int]
    maps: np.ndarray
    notes: Sequence[str]

    @property
    def num_lines(self) -> int:
        """Number of lines of at most `COLUMNS` maps."""
        return -(-len(self.maps) // COLUMNS)

    @property
    def height(self) -> float:
        """Height of a line of maps in inches; a map is `CELL` wide."""
        return CELL * self.maps.shape[1] / self.maps.shape[2]


@dataclass
class DecaySection:
    """Rows of one block."""

    title: str
    rows: Sequence[DecayRow]


def plot_decays(sections: Sequence[DecaySection], title: str, caption: str, path: Path) -> None:
    """Draw a section for each block, in it a row for each patch, and in that a map for each head.

    All maps of a kind share one color scale, 0 to 1.

    Args:
        sections: The blocks.
        title: Title of the picture; one that is too long is cut.
        caption: Two lines below the title.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rows = [row for section in sections for row in section.rows]
    columns = min(max(len(row.maps) for row in rows), COLUMNS)
    width = max(_left_of(columns), 6.8)
    lines = sum(row.num_lines * (row.height + NOTE + GAP) for row in rows)
    height = TOP + len(sections) * SECTION + lines + BOTTOM
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def axes_at(left, top, wide, high):
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    def write(left, top, text, size, **style):
        figure.text(left / width, 1 - top / height, text, fontsize=size, **{"va": "top", **style})

    write(GAP, GAP, title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…", 10, fontweight="bold")
    write(GAP, GAP + 0.22, caption, 8)
    top = TOP
    for section in sections:
        write(GAP, top, section.title, 10)
        top += SECTION
        for row in section.rows:
            write(LEFT - GAP, top + row.height / 2, row.label, 8, ha="right", va="center")
            if row.picture is not None:
                _show(axes_at(LEFT, top, CELL, row.height), row.picture.convert("RGB"), row)
            for head, (values, note) in enumerate(zip(row.maps, row.notes, strict=True)):
                left = _left_of(head % COLUMNS)
                y = top + head // COLUMNS * (row.height + NOTE + GAP)
                _show(axes_at(left, y, CELL, row.height), values, row, cmap=KINDS[row.kind][0], vmin=0, vmax=1)
                write(left + CELL / 2, y + row.height + 0.03, note, 8, ha="center")
            top += row.num_lines * (row.height + NOTE + GAP)

    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    for i, kind in enumerate(kinds):
        colormap, meaning = KINDS[kind]
        bar = axes_at(LEFT + i * (width - LEFT) / 2, height - BOTTOM + 0.15, 2.7, 0.12)
        figure.colorbar(ScalarMappable(cmap=colormap), cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=8)
        bar.set_xlabel(meaning, fontsize=9)
    figure.savefig(path, dpi=150)


def _left_of(column: int) -> float:
    """Return where a map begins in inches; the picture of what the network sees is to the left of the first."""
    return LEFT + (column + 1) * (CELL + GAP) + GAP


def _show(axes, picture: Image.Image | np.ndarray, row: DecayRow, **colors) -> None:
    """Draw an image or a map in the grid's coordinates, with the patch marked."""
    from matplotlib.patches import Rectangle

    rows, columns = row.maps.shape[1:]
    axes.imshow(picture, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest", **colors)
    side = max(1, MIN_MARK * columns)
    y, x = (i + 0.5 - side / 2 for i in row.patch)
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=MARK, linewidth=1.5, clip_on=False))
    axes.set_xticks([])
    axes.set_yticks([])
