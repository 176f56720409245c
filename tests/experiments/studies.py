"""A study for the tests of experiments, and results of its cells."""

import yaml

from sdt_diffusion.experiments.result_files import describe_machine, result_path, write_result
from sdt_diffusion.experiments.study import read_study

STUDY = {
    "title": "Two variants",
    "trainer": "train_dit",
    "baseline": "none",
    "seeds": [0, 1],
    "arguments": {
        **{"dataset": "digits", "model_overrides": {"num_layers": 1}, "train_batch_size": 4, "max_train_steps": 4},
        **{"lr_warmup_steps": 1, "ema_decay": 0.5, "cpu_threads": 1, "checkpointing_steps": 2, "logging_steps": 1},
        **{"report_to": "none", "num_validation_images": 0, "label_accuracy_samples": 0, "validation_steps": 2},
        **{"held_out_images": 12, "velocity_error_images": 8},
    },
    "variants": {"none": {"spatial_decay": "none"}, "context": {"spatial_decay": "context"}},
    "evaluation": {"reference": "digits", "samples": 10, "num_inference_steps": 2},
}


def write_study(folder, name="small", **changes):
    """Write the study with some keys changed, or left out if they are `None`, and return its path."""
    values = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.dump(values, sort_keys=False))
    return path


def build_study(folder, **changes):
    return read_study(write_study(folder, **changes))


def record_of(cell, losses=(1.0, 0.5), failed=None, **changes):
    """Results of a cell, as its process writes them."""
    identity = {"study": cell.study, "variant": cell.variant, "seed": cell.seed, "config": cell.config}
    record = {**identity, **describe_machine(), "seconds": 60.0, "failed": failed}
    if failed is None:
        curve = {"steps": [10 * (i + 1) for i in range(len(losses))], "values": list(losses)}
        metrics = {"held_out_loss": losses[-1], "fd": 3.0, "samples": 10, "extractor": {"weights": "none"}}
        record |= {
            **{"metrics": {**metrics, "sampler": "Euler, 2 steps, seed 0"}, "parameters": 1000, "steps": 20},
            **{"curves": {"loss": curve, "held_out_loss": curve}, "images_per_step": 4, "all_arguments": {}},
            **{"seconds_per_step": 0.2, "seconds_per_step_first_decile": 0.1},
        }
    return {**record, **changes}


def write_results(folder, study, **losses):
    """Write results of all cells; `losses` are those of the variants, to which the seed is added."""
    for cell in study.cells():
        values = [loss + 0.01 * cell.seed for loss in losses.get(cell.variant, (1.0, 0.5))]
        write_result(result_path(folder, cell), record_of(cell, values))
