"""The model card, README.md, from what the model's folder holds."""

import json
import warnings
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..utils.files import write_atomically
from .results import Result, read_results
from .run_record import as_yaml, read_record

CARD_FILE = "README.md"

#: What is written below it stays when the card is written again.
KEEP_MARK = "<!-- What stands below this line is yours: it stays when the card is written again. -->"

PIPELINE_SNIPPET = """\
import sdt_diffusion  # registers the classes with diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name})
images = pipe({labels}, guidance_scale={guidance_scale}, num_inference_steps={num_inference_steps}).images
images[0].save("sample.png")"""

CLASSIFIER_SNIPPET = """\
import sdt_diffusion.classification  # registers the classes with transformers
from transformers import pipeline

classify = pipeline("image-classification", model={name})
print(classify("image.png"))"""


def write_model_card(folder: Path, name: str | None = None, license: str | None = None) -> Path:
    """Writes `README.md` into the folder of a pipeline or classifier that a training script made.

    Written again, when there are new numbers, it keeps a license, other metadata, and the text below its last line. A
    README.md that is not of this function's making is left as it is.

    Args:
        folder: The folder.
        name: What `from_pretrained` is to be given; the folder by default.
        license: The model's license, in the Hub's names.

    Raises:
        ValueError: If the folder holds no finished run, or a file of it is damaged.
    """
    record = read_record(folder)
    path = folder / CARD_FILE
    previous = _read_card(path) if path.is_file() else None
    if previous is not None and KEEP_MARK not in previous.text:
        warnings.warn(f"{path} was not written by this program: left as it is.", stacklevel=2)
        return path
    name = name or str(folder).replace(f"{Path.cwd()}/", "")
    results = read_results(folder, record["weights"])
    data = previous.data if previous else ModelCardData()
    data.license = license or data.license
    _fill_metadata(data, folder, record, name, results)
    kept = previous.text.partition(KEEP_MARK)[2].strip() if previous else ""
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
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    write_atomically(path, card.save)
    return path


def _read_card(path):
    try:
        return ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the metadata above its text cannot be read: {error}") from error


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _fill_metadata(data: ModelCardData, folder: Path, record: dict[str, Any], name: str, results: list[Result]):
    pipeline = _is_pipeline(folder)
    # The Hub has no tag of its own for images by class.
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


def _introduction(folder, record):
    model, data = record["config"]["model"], record["data"]
    classes = f"{data['num_images']:,} images of {data['num_classes']:,} classes ({data['name']})"
    if not _is_pipeline(folder):
        return f"An image classifier ({model}) with spatial decay attention, trained on {classes}."
    return (
        f"A class-conditional [Spatial Decay Transformer](https://arxiv.org/abs/2508.09525) ({model}) for diffusers, "
        f"trained on {classes}."
    )


def _pictures(folder):
    return [f"![{path.stem}]({path.name})" for path in (folder / "samples.png",) if path.is_file()]


def _use(folder, record, name):
    config = record["config"]
    snippet = PIPELINE_SNIPPET if _is_pipeline(folder) else CLASSIFIER_SNIPPET
    code = snippet.format(
        name=json.dumps(name),
        labels=list(range(min(4, record["data"]["num_classes"]))),
        guidance_scale=config.get("guidance_scale"),
        num_inference_steps=config.get("num_inference_steps"),
    )
    return f"With the package sdt_diffusion {record['versions']['sdt_diffusion']}:\n\n```python\n{code}\n```"


def _results_table(results):
    if not results:
        return "None yet."
    rows = [("metric", "value", "images", "how", "measured on or against", "in full")]
    rows += [
        (result.metric, result.shown, f"{result.images:,}", result.how, result.data, f"[{result.file}]({result.file})")
        for result in results
    ]
    note = "The number of network evaluations (NFE) is per image; guidance takes two a step.\n\n"
    return (note if any(result.how for result in results) else "") + _table(rows)


def _facts(folder, record):
    config, data = record["config"], record["data"]
    component = "transformer/config.json" if _is_pipeline(folder) else "config.json"
    network = json.loads((folder / component).read_text())
    decay = network.get("spatial_decay") or config.get("spatial_decay")
    precision = {"no": "fp32"}.get(config["mixed_precision"], config["mixed_precision"])
    images = record["steps"] * record["images_per_step"]
    rows = [
        ("", ""),
        ("preset", config["model"]),
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
        ("weights", _averaging(config)),
        ("versions", ", ".join(f"{package} {number}" for package, number in record["versions"].items())),
    ]
    return _table([(key, value) for key, value in rows if value is not None])


def _table(rows):
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _averaging(config):
    if not config.get("use_ema"):
        return "of the last step"
    if config["ema_profile"] == "power":
        return f"averaged by the power function of sigma_rel {config['ema_sigma_rel'][0]:g}"
    return f"averaged, {config['ema_profile']} decay {config['ema_decay']:g}"
