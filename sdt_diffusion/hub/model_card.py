"""Write the model card, README.md, from what the model's folder holds."""

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..sdt.class_names import labels_of_names
from ..utils.carried_code import has_code
from ..utils.files import shorten_path, write_atomically
from ..utils.reading import read_json
from .results import Result, read_results
from .run_record import RECORD_FILE, as_yaml, read_record

CARD_FILE = "README.md"

#: Text below this line stays when the card is written again.
KEEP_MARK = "<!-- What stands below this line is yours: it stays when the card is written again. -->"

USE = """\
Install the package (this model was made with version {version}):

```bash
{install}
```

```python
{code}
```

`import {module}` must come first: without it, {library} does not know the classes and says `{error}`."""

USE_CODE = """\
This folder holds the code of the model, which `trust_remote_code=True` runs; {needs} all it needs.

```python
{code}
```

Training, evaluation and faster attention on CPUs need the package (this model was made with version {version}):

```bash
{install}
```"""

PIPELINE_SNIPPET = """\
import sdt_diffusion  # registers the classes with diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name})
images = pipe({arguments}).images
images[0].save("sample.png")"""

CLASSIFIER_SNIPPET = """\
import sdt_diffusion.classification  # registers the classes with transformers
from transformers import pipeline

classify = pipeline("image-classification", model={name})
print(classify("image.png"))"""


def write_model_card(folder: Path, name: str | None = None, license: str | None = None) -> Path:
    """Write `README.md` into the folder of a pipeline or classifier that a training script made.

    A card that is written again, with new numbers, keeps its license, other metadata, and the text below its last
    line. A README.md that this function did not write is left as it is.

    Args:
        folder: The folder.
        name: Name for `from_pretrained` in the card; by default the folder, relative to the working directory.
        license: The model's license, in the Hub's names.

    Raises:
        ValueError: If the folder holds no finished run, or a file of it is damaged.
    """
    record = _with_short_paths(read_record(folder))
    path = folder / CARD_FILE
    previous = _read_card(path) if path.is_file() else None
    if previous is not None and KEEP_MARK not in previous.text:
        warnings.warn(f"{path} was not written by this program: left as it is.", stacklevel=2)
        return path
    name = name or _name_of(folder)
    results = read_results(folder, record["weights"])
    data = cast(ModelCardData, previous.data) if previous else ModelCardData()
    data.license = license or data.license
    kept = previous.text.partition(KEEP_MARK)[2].strip() if previous else ""
    try:
        _fill_metadata(data, folder, record, name, results)
        sections = [
            f"# {Path(name).name}",
            _introduction(folder, record),
            *_pictures(folder),
            "## Use\n\n" + _use(folder, record, name),
            "## Results\n\n" + _results_table(results),
            "## Model and training\n\n" + _facts(folder, record),
            f"### Command\n\n```bash\n{record['command']}\n```",
            f"### Config\n\nAll arguments, as a file for `--config`:\n\n```yaml\n{as_yaml(record['config'])}```",
            KEEP_MARK,
            *([kept] if kept else []),
        ]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: {RECORD_FILE} or a config of the model is damaged ({what}).") from error
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    write_atomically(path, card.save)
    return path


def _with_short_paths(record: dict[str, Any]) -> dict[str, Any]:
    """Shorten the paths of a record; new records have short ones already."""
    data = {**record["data"], "name": shorten_path(record["data"]["name"])}
    return {**record, "data": data, "config": {key: shorten_path(value) for key, value in record["config"].items()}}


def _name_of(folder: Path) -> str:
    """Return the folder's path relative to the working directory, or its name if it is elsewhere."""
    folder = folder.resolve()
    return str(folder.relative_to(Path.cwd())) if Path.cwd() in folder.parents else folder.name


def _read_card(path: Path) -> ModelCard:
    try:
        return ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the metadata above its text cannot be read: {error}") from error


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _fill_metadata(
    data: ModelCardData, folder: Path, record: Mapping[str, Any], name: str, results: Sequence[Result]
) -> None:
    pipeline = _is_pipeline(folder)
    # The Hub has no tag for class-conditional images.
    data.pipeline_tag = task = "unconditional-image-generation" if pipeline else "image-classification"
    data.library_name = "diffusers" if pipeline else "transformers"
    own = ["sdt_diffusion", "spatial-decay-transformer", *(["class-conditional"] if pipeline else [])]
    data.tags = list(dict.fromkeys([*(data.tags or []), *own]))
    source = record["data"]
    if source["on_hub"]:
        data.datasets = [source["name"]]
    data.model_name = Path(name).name
    data.eval_results = [
        EvalResult(
            task_type=task,
            dataset_type=source["name"],
            dataset_name=Path(source["name"]).name,
            metric_type=result.metric,
            metric_value=result.value,
            metric_name=", ".join(filter(None, [result.metric, result.how, f"on {result.data}"])),
        )
        for result in results
    ] or None


def _introduction(folder: Path, record: Mapping[str, Any]) -> str:
    model, data = record["config"].get("model", "SDT"), record["data"]
    model = "continued from another model" if model == "stored" else model
    classes = f"{data['num_images']:,} images of {data['num_classes']:,} classes ({data['name']})"
    if not _is_pipeline(folder):
        return f"An image classifier ({model}) with spatial decay attention, trained on {classes}."
    return (
        f"A class-conditional [Spatial Decay Transformer](https://arxiv.org/abs/2508.09525) ({model}) for diffusers, "
        f"trained on {classes}."
    )


def _pictures(folder: Path) -> list[str]:
    return ["![samples](samples.png)"] if (folder / "samples.png").is_file() else []


def _use(folder: Path, record: Mapping[str, Any], name: str) -> str:
    pipeline, carried = _is_pipeline(folder), has_code(folder)
    code = (PIPELINE_SNIPPET if pipeline else CLASSIFIER_SNIPPET).format(
        name=json.dumps(name) + ", trust_remote_code=True" * carried,
        arguments=_call_arguments(folder, record) if pipeline else "",
    )
    settings = {"version": record["versions"]["sdt_diffusion"], "install": _install_command()}
    if carried:
        needs = "diffusers is" if pipeline else "transformers, diffusers and timm are"
        return USE_CODE.format(**settings, needs=needs, code=code.partition("\n")[2])
    return USE.format(
        **settings,
        code=code,
        module="sdt_diffusion" if pipeline else "sdt_diffusion.classification",
        library="diffusers" if pipeline else "transformers",
        error="module diffusers has no attribute SDTPipeline"
        if pipeline
        else "Transformers does not recognize this architecture",
    )


def _install_command() -> str:
    """Return the command that installs this package: from its repository, if its metadata names one."""
    urls = dict(entry.split(", ", 1) for entry in metadata("sdt_diffusion").get_all("Project-URL") or [])
    named = {key.lower(): url for key, url in urls.items()}
    url = next((named[key] for key in ("repository", "source", "homepage") if key in named), None)
    return f'pip install "sdt_diffusion @ git+{url}"' if url else "pip install -e .  # in a checkout of sdt_diffusion"


def _call_arguments(folder: Path, record: Mapping[str, Any]) -> str:
    """Return the arguments of a call of the pipeline: some classes, and the settings that it has not saved."""
    index, config = read_json(folder / "model_index.json"), record["config"]
    names = index.get("id2label") or {}
    if not isinstance(names, dict) or not all(label.isdecimal() and isinstance(names[label], str) for label in names):
        raise ValueError(f"{folder / 'model_index.json'} is damaged: id2label is {names!r:.60}.")
    names = {int(label): name for label, name in names.items()}
    labels_of = labels_of_names(names)
    shown = []
    for label in range(min(4, record["data"]["num_classes"])):
        full = names.get(label, "")
        # The first of several words for a class reads best, but it may be a word for another class too.
        shown.append(next((n for n in (full.split(",")[0], full) if n and labels_of.get(n) == [label]), label))
    settings = [
        f"{key}={config[key]}"
        for key in ("guidance_scale", "num_inference_steps")
        if index.get(key) is None and config.get(key) is not None
    ]
    return ", ".join([json.dumps(shown, ensure_ascii=False), *settings])


def _results_table(results: Sequence[Result]) -> str:
    if not results:
        return "None yet."
    rows = [("metric", "value", "images", "how", "measured on or against", "in full")]
    rows += [
        (result.metric, result.shown, f"{result.images:,}", result.how, result.data, f"[{result.file}]({result.file})")
        for result in results
    ]
    note = "The number of network evaluations (NFE) is per image; with guidance each step has two.\n\n"
    return (note if any(result.how for result in results) else "") + _table(rows)


def _facts(folder: Path, record: Mapping[str, Any]) -> str:
    config, data = record["config"], record["data"]
    component = "transformer/config.json" if _is_pipeline(folder) else "config.json"
    network = read_json(folder / component)
    decay = network.get("spatial_decay") or config.get("spatial_decay")
    precision = {"no": "fp32"}.get(config.get("mixed_precision", "no"), config.get("mixed_precision"))
    images = record["steps"] * record["images_per_step"]
    rows = [
        ("", ""),
        ("preset", config.get("model")),
        ("attention", f"`spatial_decay` {decay}" if decay else None),
        ("parameters", f"{record['parameters']:,}"),
        ("resolution", config.get("resolution")),
        ("latents of", config.get("pretrained_vae_model_name_or_path")),
        ("data", f"{data['name']}: {data['num_images']:,} images, {data['num_classes']:,} classes"),
        ("objective", config.get("objective")),
        ("steps", f"{record['steps']:,} of {record['images_per_step']:,} images"),
        ("processes", record["num_processes"]),
        ("images seen", f"{images:,} ({images / data['num_images']:.4g} epochs)"),
        ("precision", precision),
        ("weights", _averaging(record)),
        ("versions", ", ".join(f"{package} {number}" for package, number in record["versions"].items())),
    ]
    return _table([(key, value) for key, value in rows if value is not None])


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _averaging(record: Mapping[str, Any]) -> str:
    config, derived = record["config"], record.get("derived", {})
    if "sigma_rel" in derived:
        made = f", combined from {derived['snapshots']} snapshots" if "snapshots" in derived else ""
        return f"averaged by the power function of sigma_rel {derived['sigma_rel']:g}{made} of {derived['source']}"
    if not config.get("use_ema"):
        return "of the last step"
    if config.get("ema_profile") == "power":
        return f"averaged by the power function of sigma_rel {config['ema_sigma_rel'][0]:g}"
    return f"averaged, {config.get('ema_profile')} decay {config.get('ema_decay')}"
