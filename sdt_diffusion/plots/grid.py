"""Grids of images."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def image_grid(
    images: Sequence[Image.Image], labels: Sequence[str], columns: int, min_side: int = 64, gap: int = 4
) -> Image.Image:
    """A grid of images with their labels above them.

    Args:
        images: Images of one size.
        labels: A text for each image; one that stands to the left or above already is not repeated.
        columns: Images in a row.
        min_side: Small images are enlarged, pixel by pixel, to at least this side.
        gap: Pixels between images.

    Returns:
        The grid as an RGB image.
    """
    zoom = max(1, -(-min_side // min(images[0].size)))
    width, height = (side * zoom for side in images[0].size)
    font = ImageFont.load_default(size=12)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    shown = {
        i
        for i, label in enumerate(labels)
        if (i % columns == 0 or label != labels[i - 1]) and (i < columns or label != labels[i - columns])
    }
    text_heights = [16 if shown & set(row) else 0 for row in rows]
    size = (columns * (width + gap) + gap, sum(text_heights) + len(rows) * (height + gap) + gap)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    top = gap
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            picture = images[i].convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (left, top + text_height))
            if i in shown:
                draw.text((left, top), _shorten(labels[i], draw, font, width), fill="black", font=font)
        top += text_height + height + gap
    return grid


def _shorten(text: str, draw: ImageDraw.ImageDraw, font, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
