"""Folders of images that are named by their class."""

import os
from collections.abc import Sequence
from pathlib import Path

from .raw_images import IMAGE_ENDINGS


def check_class_folders(folder: Path, class_names: Sequence[str]) -> None:
    """Refuses empty folders beside those of classes: `datasets` leaves them out, and all that follow would be one off.

    Other folders, such as the Hub's `data/` of parquet files, are none of its business.

    Args:
        folder: The data set's; nothing is checked where there is none.
        class_names: Of the data set.

    Raises:
        ValueError: Names them.
    """
    holding = {
        Path(parent)
        for parent, _, names in os.walk(folder, followlinks=True)
        if any(Path(name).suffix.lower() in IMAGE_ENDINGS for name in names)
    }
    class_folders = {path for path in holding if path != folder and path.name in class_names}
    beside = {path for parent in {path.parent for path in class_folders} for path in parent.iterdir() if path.is_dir()}
    above = {other for path in holding for other in path.parents}
    empty = [str(path) for path in sorted(beside - holding - above) if not path.name.startswith(".")]
    if empty:
        more = f" and {len(empty) - 20} more" if len(empty) > 20 else ""
        raise ValueError(
            f"{len(empty)} class folder(s) without an image: {', '.join(map(repr, empty[:20]))}{more}. Fill or remove "
            "them."
        )
