"""Sample a gallery: a page with every class for the same seeds, uncurated, and the same seeds under other settings.

    python sample/gallery.py --model outputs/digits --output_dir outputs/gallery
    python sample/gallery.py --model outputs/digits --output_dir outputs/compared \
        --vary guidance_scale=1,1.5,3 num_inference_steps=2,5,25 scheduler=FlowMatchHeunDiscreteScheduler

Rows are classes; column i starts from the noise of sample i in every row. For each setting to vary there is a section
whose rows are its values and whose columns are classes in turn: each picture is the one above but for that setting.
`--vary` takes what `eval/sweep.py --axes` takes.

Writes index.html, which holds its pictures and needs no other file; contact_sheet.png, the classes; and gallery.json.
If the command is killed, the same command goes on where it was.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.sweep_axes import parse_axes, shown
from ..plots import image_grid
from ..sampling.folder import guider_record, scaling_record, weights_of
from ..sampling.generate import class_labels_for, count_evaluations, describe_sampling, generate
from ..sampling.settings import SamplingArguments, default_device, load_pipeline, parse_classes
from ..sdt import SDTPipeline
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import FolderLock, move_into, shorten_path, valid_json, write_atomically, write_json
from ..utils.fingerprint import differences
from ..utils.ranges import CheckedArguments, between
from ..utils.reading import read_json, walk_files
from .gallery_page import Row, Section, render

RECORD_FILE, PAGE_FILE, SHEET_FILE = "gallery.json", "index.html", "contact_sheet.png"
#: Where finished rows are until the page is written.
ROWS_FOLDER = "rows"
#: Classes of a gallery that names none: all, or so many of more, evenly spaced.
MAX_CLASSES = 100
#: More pictures make a page that browsers show badly.
MAX_PICTURES = 4000


@dataclass(kw_only=True)
class GalleryArguments(CheckedArguments):
    """What the gallery shows, and where it is written."""

    output_dir: Path = field(metadata={"help": "Folder for the gallery: new, empty, or begun by the same command."})
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": f"Class ids or names; all by default, or {MAX_CLASSES} of more, evenly spaced."},
    )
    columns: int = field(default=8, metadata={"help": "Pictures in a row, each of its own noise."} | between(1, 64))
    vary: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings to vary, one at a time, such as guidance_scale=1,1.5,3 model=FOLDER,FOLDER."},
    )
    device: str | None = field(default=None, metadata={"help": "Torch device; a GPU if there is one by default."})


@dataclass
class PlannedRow:
    """A row to sample.

    Args:
        name: At its left.
        labels: Class of each picture; picture i starts from the noise of sample i.
        settings: What to sample with.
        record: What made the row, for `gallery.json`.
    """

    name: str
    labels: list[int]
    settings: SamplingArguments
    record: dict[str, Any]


class Gallery:
    """Samples what the arguments ask for.

    Args:
        args: What to show.
        sampling_args: How to sample, where `vary` does not say otherwise.

    Raises:
        FileNotFoundError: If a model does not exist.
        ValueError: If a class or a setting is unknown or does not fit a model, or there are too many pictures.
    """

    def __init__(self, args: GalleryArguments, sampling_args: SamplingArguments):
        self.args, self.sampling_args = args, sampling_args
        self._loaded: tuple[SamplingArguments, SDTPipeline] | None = None
        pipe = self._load(sampling_args)
        self.num_classes, self.names = pipe.transformer.config.num_classes, dict(pipe.id2label)
        self.classes = parse_classes(pipe, args.classes) if args.classes else spaced(self.num_classes, MAX_CLASSES)
        axes = parse_axes(args.vary)
        rows = len(self.classes) + sum(map(len, axes.values()))
        if rows * args.columns > MAX_PICTURES:
            raise ValueError(
                f"The gallery would have {rows * args.columns} pictures, at most {MAX_PICTURES}: give fewer classes "
                "or columns."
            )
        record = self._record_of(sampling_args)
        planned = [
            PlannedRow(self.name_of(label), [label] * args.columns, sampling_args, record) for label in self.classes
        ]
        self.plan = {"": planned, **{name: self._vary(name, values) for name, values in axes.items()}}

    def name_of(self, label: int) -> str:
        """Return the name of a class."""
        return self.names.get(label, str(label))

    def describe(self) -> dict[str, Any]:
        """Return what the gallery shows and what made it, as `gallery.json` holds it."""
        return valid_json(
            {
                "kind": "gallery",
                "model": self.sampling_args.model,
                "classes": self.classes,
                "columns": self.args.columns,
                "vary": {title: {row.name: row.record for row in rows} for title, rows in self.plan.items() if title},
                **self.plan[""][0].record,
            }
        )

    def write(self) -> None:
        """Sample the rows that are missing, and write the page.

        Raises:
            OSError: If it cannot be written.
            ValueError: If the folder holds something else, or another process is writing to it.
        """
        folder = self.args.output_dir
        begun = (folder / RECORD_FILE).is_file()
        if folder.exists() and not begun and (not folder.is_dir() or any(walk_files(folder))):
            raise ValueError(f"output_dir {folder} is not an empty folder: choose another.")
        with FolderLock(folder):
            if begun:
                found = differences(read_json(folder / RECORD_FILE), self.describe(), unquoted=("classes", "vary"))
                if found:
                    raise ValueError(
                        f"output_dir {folder} holds another gallery ({'; '.join(found)}). Choose another."
                    )
                if all((folder / name).is_file() for name in (PAGE_FILE, SHEET_FILE)):
                    return
            else:
                write_json(folder / RECORD_FILE, self.describe())
            (folder / ROWS_FOLDER).mkdir(exist_ok=True)
            sections = [self._sample(title, rows) for title, rows in self.plan.items()]
            move_into(folder, lambda partial: self._save(partial, sections))
            shutil.rmtree(folder / ROWS_FOLDER)

    def _vary(self, name: str, values: Sequence[Any]) -> list[PlannedRow]:
        if name not in {each.name for each in fields(SamplingArguments)}:
            raise ValueError(f"vary: {name} is no setting of a picture.")
        rows, labels = [], class_labels_for(self.args.columns, self.classes)
        for value in values:
            settings = replace(self.sampling_args, **{name: value})
            try:
                rows.append(PlannedRow(shown(value), labels, settings, self._record_of(settings)))
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"vary: {name}={shown(value)}: {error}") from error
        return rows

    def _record_of(self, settings: SamplingArguments) -> dict[str, Any]:
        """Return what makes a row, after loading its pipeline and trying its settings."""
        pipe = self._load(settings)
        if pipe.transformer.config.num_classes != self.num_classes:
            raise ValueError(f"the model has {pipe.transformer.config.num_classes} classes, not {self.num_classes}.")
        sampling = settings.settings(pipe)
        return {
            "sampler": describe_sampling(pipe, sampling),
            "network_evaluations": count_evaluations(pipe, sampling),
            "dtype": settings.dtype,
            "weights": weights_of(pipe),
            "scheduler": str(pipe.scheduler.to_json_string()),
            **sampling,
            **guider_record(pipe),
            **scaling_record(pipe, sampling),
        }

    def _load(self, settings: SamplingArguments) -> SDTPipeline:
        """Load a pipeline with its settings; the last one is kept."""
        if self._loaded is None or self._loaded[0] != settings:
            self._loaded = None
            self._loaded = settings, load_pipeline(settings, self.args.device or default_device())
        return self._loaded[1]

    def _sample(self, title: str, planned: Sequence[PlannedRow]) -> Section:
        """Sample the rows of a section, but for those that an earlier run of the command has made."""
        rows = []
        for number, row in enumerate(planned):
            path = self.args.output_dir / ROWS_FOLDER / f"{title or 'classes'}-{number:04d}.png"
            if not path.is_file():
                pipe = self._load(row.settings)
                samples = generate(
                    pipe, row.labels, batch_size=row.settings.batch_size, progress=False, **row.settings.settings(pipe)
                )
                strip = in_a_row([picture for _, picture in samples])
                write_atomically(path, strip.save)
                print(f"{title or 'class'} {row.name}: {len(row.labels)} pictures.", flush=True)
            with Image.open(path) as strip:
                pictures = cut(strip, len(row.labels))
            notes = [f"{self.name_of(label)}, sample {index}" for index, label in enumerate(row.labels)]
            cost = f"{row.record['network_evaluations']} evaluations" if title else ""
            rows.append(Row(row.name, cost, pictures, notes))
        names = [f"{self.name_of(label)}\n" if title else "" for label in planned[0].labels]
        columns = [f"{name}sample {index}" for index, name in enumerate(names)]
        return Section(title, columns, rows)

    def _save(self, folder: Path, sections: Sequence[Section]) -> None:
        record = self.describe()
        count = len(self.classes)
        some = "all classes" if count == self.num_classes else f"{count} of {self.num_classes} classes"
        name = shorten_path(self.sampling_args.model).removeprefix(".../")
        lines = [
            f"{record['sampler']}; {record['dtype']}, weights {record['weights']}.",
            f"Uncurated: {some}. Column i starts from the noise of sample i in every row and section.",
        ]
        (folder / PAGE_FILE).write_text(render(name, lines, sections), encoding="utf-8")
        labeled = [(picture, row.name) for row in sections[0].rows for picture in row.pictures]
        pictures, names = zip(*labeled, strict=True)
        image_grid(pictures, names, self.args.columns).save(folder / SHEET_FILE)


def spaced(total: int, most: int) -> list[int]:
    """Return 0 to total - 1, or `most` of them, evenly spaced."""
    return list(range(total)) if total <= most else [i * total // most for i in range(most)]


def in_a_row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures of one size side by side."""
    width, height = pictures[0].size
    row = Image.new(pictures[0].mode, (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * width, 0))
    return row


def cut(row: Image.Image, count: int) -> list[Image.Image]:
    """Return the pictures that `in_a_row` put side by side."""
    width = row.width // count
    return [row.crop((index * width, 0, (index + 1) * width, row.height)) for index in range(count)]


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    args, sampling_args = parse_arguments((GalleryArguments, SamplingArguments), argv, description=__doc__)
    Gallery(args, sampling_args).write()
    print(f"The gallery is {args.output_dir / PAGE_FILE}.")


if __name__ == "__main__":
    main()
