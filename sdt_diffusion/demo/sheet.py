"""Pictures side by side, enlarged pixel by pixel, on which a click means a patch of one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

#: Color of the mark around a patch, that of the pictures of the decay; pixels between pictures.
MARK, GAP = "#00e5ff", 4


@dataclass(frozen=True)
class Sheet:
    """Places pictures of one size in a grid that is about square.

    Args:
        count: How many pictures.
        size: Width and height of each in pixels.
        grid: Rows and columns of patches of each.
        side: About how wide the sheet shall be; pictures that are larger are not made smaller.
    """

    count: int
    size: tuple[int, int]
    grid: tuple[int, int]
    side: int = 720

    @property
    def columns(self) -> int:
        """Pictures in a row."""
        return -int(-(self.count**0.5) // 1)

    @property
    def zoom(self) -> int:
        """Pixels of the sheet for each pixel of a picture, along each side."""
        return max(1, self.side // (self.columns * max(self.size)))

    def draw(
        self, pictures: Sequence[Image.Image], marked: int | None = None, patch: tuple[int, int] = (0, 0)
    ) -> Image.Image:
        """Draw the pictures.

        Args:
            pictures: As many as the sheet has places.
            marked: Which of them to mark a patch on; none by default.
            patch: Row and column of that patch.
        """
        width, height = (side * self.zoom for side in self.size)
        rows = -(-self.count // self.columns)
        sheet = Image.new("RGB", (self.columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
        for index, picture in enumerate(pictures):
            enlarged = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, self._corner(index))
        if marked is not None:
            left, top = self._corner(marked)
            high, wide = height / self.grid[0], width / self.grid[1]
            box = [left + patch[1] * wide, top + patch[0] * high, left + (patch[1] + 1) * wide - 1]
            ImageDraw.Draw(sheet).rectangle([*box, top + (patch[0] + 1) * high - 1], outline=MARK, width=3)
        return sheet

    def find(self, x: int, y: int) -> tuple[int, tuple[int, int]]:
        """Return the picture and its patch, row and column, at a pixel of the sheet, or the nearest ones."""
        width, height = (side * self.zoom for side in self.size)
        column = min(max(x // (width + GAP), 0), self.columns - 1)
        row = max(y // (height + GAP), 0)
        picture = min(row * self.columns + column, self.count - 1)
        left, top = self._corner(picture)
        rows, columns = self.grid
        across, down = (x - left) * columns // width, (y - top) * rows // height
        return picture, (min(max(down, 0), rows - 1), min(max(across, 0), columns - 1))

    def _corner(self, index: int) -> tuple[int, int]:
        """Return left and top of a picture."""
        width, height = (side * self.zoom + GAP for side in self.size)
        return index % self.columns * width, index // self.columns * height
