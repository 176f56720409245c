"""Pictures of what happens: sample grids and loss curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def image_grid(
    images: Sequence[Image.Image], labels: Sequence[str], columns: int, min_side: int = 64, gap: int = 4
) -> Image.Image:
    """A grid of images with their labels above them.

    Args:
        images: Images of one size.
        labels: A text for each image; a text equal to that of the image to the left is not repeated.
        columns: Images in a row.
        min_side: Small images are enlarged, pixel by pixel, to at least this side.
        gap: Pixels between images.

    Returns:
        The grid as an RGB image.
    """
    width, height = images[0].size
    zoom = max(1, -(-min_side // min(width, height)))
    font = ImageFont.load_default(size=12)
    text_height = 16
    cell_width, cell_height = width * zoom + gap, height * zoom + text_height + gap
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        grid.paste(
            image.convert("RGB").resize((width * zoom, height * zoom), Image.Resampling.NEAREST),
            (left, top + text_height),
        )
        if i % columns == 0 or label != labels[i - 1]:
            draw.text((left, top), _shorten(label, draw, font, cell_width - gap), fill="black", font=font)
    return grid


def _shorten(text: str, draw: ImageDraw.ImageDraw, font, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def plot_loss_curve(records: Sequence[dict[str, float]], path: Path) -> None:
    """Loss over steps, as logged and smoothed, with the learning rate below.

    Args:
        records: Dictionaries with `step`, `loss` and `learning_rate`.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = np.array([record["step"] for record in records])
    losses = np.array([record["loss"] for record in records])
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="logged")
    loss_axes.plot(steps, _smooth(losses), color="tab:blue", label="smoothed")
    loss_axes.set_ylabel("loss")
    # The first steps would flatten all that comes after them.
    loss_axes.set_ylim(0.95 * losses.min(), 1.05 * np.percentile(losses, 98))
    loss_axes.grid(alpha=0.3)
    loss_axes.legend()
    rate_axes.plot(steps, [record["learning_rate"] for record in records], color="tab:gray")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    rate_axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential average over about 1/20 of the values, without a bias towards the first."""
    decay = 1 - 1 / max(1.0, len(values) / 20)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + 1 - decay
        smoothed.append(average / weight)
    return np.array(smoothed)
