"""Draw grids of images."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: Columns of a grid whose caller names no number.
MAX_COLUMNS = 10
#: Smallest size of the labels' font, and its part of an image's width: the labels of large images are to be readable
#: where the grid is shown reduced.
MIN_FONT_SIZE, FONT_PART = 12, 1 / 8


def image_grid(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int | None = None,
    min_side: int = 64,
    gap: int = 4,
) -> Image.Image:
    """Draw a grid of images with their labels above them.

    A label is written where it begins: an image without one has that of the image to its left, a row without any
    those of the row above.

    Args:
        images: Images of one size.
        labels: A text for each image. If one is too long, only the words before a first comma are written.
        columns: Images in a row. By default about as many as rows, at most 10, with one class in each column where the
            classes take turns.
        min_side: Small images are enlarged, pixel by pixel, to at least this side.
        gap: Pixels between images.

    Returns:
        The grid as an RGB image.

    Raises:
        ValueError: If there is no image, or not one label for each.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"A grid needs images and a label for each; there are {len(images)} and {len(labels)}.")
    columns = columns or choose_columns(labels)
    zoom = max(1, -(-min_side // min(images[0].size)))
    width, height = (side * zoom for side in images[0].size)
    font_size = max(MIN_FONT_SIZE, round(width * FONT_PART))
    font = ImageFont.load_default(size=font_size)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    shown = _where_labels_begin(labels, rows)
    texts = _fit(labels, font, width - font_size // 2)  # leave a space before the next label
    text_heights = [font_size * 4 // 3 if shown & set(row) else 0 for row in rows]
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
                draw.text((left, top), texts[i], fill="black", font=font)
        top += text_height + height + gap
    return grid


def choose_columns(labels: Sequence[str]) -> int:
    """Return a number of columns for images with these labels; see `image_grid`."""
    about_square = min(MAX_COLUMNS, -int(-(len(labels) ** 0.5) // 1))
    classes = list(dict.fromkeys(labels))
    take_turns = all(label == classes[i % len(classes)] for i, label in enumerate(labels))
    if not take_turns or len(classes) > MAX_COLUMNS or len(labels) == len(classes):
        return about_square
    return max(len(classes), about_square // len(classes) * len(classes))


def _where_labels_begin(labels: Sequence[str], rows: Sequence[range]) -> set[int]:
    """Return the indices of the images whose labels are written."""
    texts = [[labels[i] for i in row] for row in rows]
    shown = set()
    for number, row in enumerate(rows):
        if number and texts[number] == texts[number - 1][: len(row)]:
            continue
        shown |= {i for i in row[1:] if labels[i] != labels[i - 1]}
        if number == 0 or set(texts[number - 1]) != {labels[row[0]]}:  # a row of one label continues in the next one
            shown.add(row[0])
    return shown


def _fit(labels: Sequence[str], font: Font, width: int) -> list[str]:
    """Shorten labels to a width: to the words before their first comma, all of them if one is too long, then cut."""
    if any(font.getlength(label) > width for label in labels):
        labels = [label.partition(",")[0] for label in labels]
    return [_cut(label, font, width) for label in labels]


def _cut(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
