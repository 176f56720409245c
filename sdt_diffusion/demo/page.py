"""The page of the demo: what is on it, and what its buttons do. `session.py` computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch

from ..sampling.settings import SamplerArguments
from ..sdt import SDTPipeline
from ..sdt.guidance import sigma_at
from ..sdt.schedulers import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS, is_flow
from ..utils.arguments import one_line
from .session import MAX_PICTURES, SamplingRun, draw_view, grid_of, num_blocks_of, sample_in_steps, usable_guidance
from .sheet import Sheet

#: Choice of the guidance that is saved in a pipeline, if it has one of its own or can use none.
SAVED = "saved with the pipeline"
#: One run or view at a time: both use the one model.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
#: Pictures without loss, whose upper left corner no label hides.
SHOWN_ONLY: dict[str, Any] = {"format": "png", "show_label": False, "interactive": False}
HINT = "Click a patch of a picture to see how far each head looks from it, from noise to image."
CSS = """
.gradio-container { max-width: 1500px !important; }
#sheet img { cursor: crosshair; image-rendering: pixelated; }
#view { background: white; }
"""

#: A picture of the run, and a patch of it.
Place = tuple[int, tuple[int, int]]


def build_page(pipe: SDTPipeline, name: str, seed: int = 0) -> gr.Blocks:
    """Build the page for a pipeline.

    Args:
        pipe: The pipeline; its settings are those that the page opens with.
        name: What to call it.
        seed: Seed that the page opens with.
    """
    settings, grid = pipe.sampling_settings(), grid_of(pipe)
    schedulers = FLOW_SCHEDULERS if is_flow(pipe.scheduler) else DIFFUSION_SCHEDULERS
    scheduler = type(pipe.scheduler).__name__
    usable = usable_guidance(pipe)
    kinds = [*([] if pipe.guider is None and usable else [SAVED]), *usable]
    center = (0, (grid[0] // 2, grid[1] // 2))
    with gr.Blocks(title=f"{name}: sdt_diffusion", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"## {name}\n{describe(pipe)}")
        run, place = gr.State(None), gr.State(center)
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                label = gr.Dropdown(class_choices(pipe), value=0, label="Class", elem_id="class")
                with gr.Row():
                    seed_box = gr.Number(seed, label="Seed", min_width=90, elem_id="seed")
                    count = gr.Number(4, label=f"Pictures, 1 to {MAX_PICTURES}", min_width=90, elem_id="count")
                with gr.Row():
                    steps = gr.Number(settings["num_inference_steps"], label="Steps", min_width=90, elem_id="steps")
                    scale = gr.Number(
                        settings["guidance_scale"],
                        label="Guidance scale",
                        step=0.1,
                        min_width=90,
                        elem_id="scale",
                    )
                names = dict.fromkeys([scheduler, *schedulers])
                choices = [(each.removesuffix("Scheduler"), each) for each in names]
                scheduler_box = gr.Dropdown(choices, value=scheduler, label="Scheduler", elem_id="scheduler")
                kind = gr.Dropdown(kinds, value=kinds[0], label="Kind of guidance", elem_id="kind")
                interval = gr.Textbox(
                    label="Guide only at sigma (two numbers)",
                    placeholder=f"everywhere, {greatest_sigma(pipe):.4g} to 0",
                    elem_id="interval",
                )
                with gr.Row():
                    button = gr.Button("Sample", variant="primary", elem_id="sample")
                    stop = gr.Button("Stop", min_width=60, scale=0)
            with gr.Column(scale=4, min_width=320):
                status = gr.Markdown("Press *Sample*.", elem_id="status")
                sheet = gr.Image(elem_id="sheet", buttons=[], **SHOWN_ONLY)  # each corner is a patch to click
            with gr.Column(scale=5, min_width=400):
                block = gr.Slider(0, num_blocks_of(pipe) - 1, num_blocks_of(pipe) // 2, step=1, label="Block")
                view = gr.Image(elem_id="view", buttons=["download", "fullscreen"], **SHOWN_ONLY)

        settings_boxes = [label, seed_box, count, steps, scale, scheduler_box, kind, interval]

        def sample(label, seed, count, steps, scale, scheduler, kind, interval):
            with shown_errors():
                sampler = SamplerArguments(
                    scheduler=scheduler,
                    num_inference_steps=steps,
                    guidance_scale=scale,
                    guidance=None if kind == SAVED else kind,
                    guidance_interval=parse_interval(interval),
                )
                for run in sample_in_steps(pipe, label, count, seed, sampler):
                    yield sheet_of(run).draw(run.pictures), status_of(run), run, center

        def look(run: SamplingRun | None, place: Place, block: int):
            if run is None:
                return gr.skip(), gr.skip()
            picture, patch = place
            with shown_errors():
                return sheet_of(run).draw(run.pictures, picture, patch), draw_view(run, picture, patch, block)

        def choose(run: SamplingRun | None, event: gr.SelectData) -> Place:
            return center if run is None else sheet_of(run).find(*event.index)

        looked: dict[str, Any] = {
            "fn": look,
            "inputs": [run, place, block],
            "outputs": [sheet, view],
            "show_progress_on": view,
            "api_visibility": "private",
            **ONE_AT_A_TIME,
        }
        sampling = button.click(
            sample,
            settings_boxes,
            [sheet, status, run, place],
            show_progress="hidden",
            api_visibility="private",
            **ONE_AT_A_TIME,
        )
        sampling.success(**looked)
        stop.click(None, cancels=[sampling])
        sheet.select(choose, [run], [place], show_progress="hidden", api_visibility="private").then(**looked)
        block.release(**looked)
    return page


@contextmanager
def shown_errors() -> Iterator[None]:
    """Show what the user can correct on the page, which goes on."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError) as error:
        raise gr.Error(one_line(error), print_exception=False) from error


def describe(pipe: SDTPipeline) -> str:
    """Describe a pipeline in a line."""
    model, (rows, columns) = pipe.transformer, grid_of(pipe)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{parameters / 1e6:.3g} million parameters, {num_blocks_of(pipe)} blocks of "
        f"{model.config.num_attention_heads} heads, spatial decay *{model.config.spatial_decay}*, "
        f"{rows} x {columns} patches, {pipe.objective['prediction_type'].replace('_', ' ')}; "
        f"on {pipe.device} in {str(pipe.dtype).removeprefix('torch.')}"
    )


def parse_interval(text: str) -> list[float] | None:
    """Return the noise levels in a text such as "0.2 0.8" or "0.2, 0.8"; `None` for an empty one.

    Raises:
        ValueError: If they are no numbers.
    """
    try:
        return [float(word) for word in text.replace(",", " ").split()] or None
    except ValueError:
        raise ValueError(f"Guide only at sigma: give two numbers such as 0.2 0.8, not {text!r:.60}.") from None


def class_choices(pipe: SDTPipeline) -> list[tuple[str, int]]:
    """Return names and ids of the classes; the id follows a name that is another text."""
    choices = []
    for label in range(pipe.transformer.config.num_classes):
        name = pipe.id2label.get(label, str(label))
        choices.append((name if name == str(label) else f"{name} ({label})", label))
    return choices


def greatest_sigma(pipe: SDTPipeline) -> float:
    """Return the noise level at which sampling starts, in the scheduler's unit."""
    return sigma_at(pipe.scheduler, pipe.scheduler.config.num_train_timesteps)


def sheet_of(run: SamplingRun) -> Sheet:
    """Return the sheet for the pictures of a run."""
    return Sheet(len(run.pictures), run.pictures[0].size, grid_of(run.pipe))


def status_of(run: SamplingRun) -> str:
    """Return the line above the pictures."""
    if run.finished:
        return f"**{run.class_name}**: {run.sampler}. {HINT}"
    moment = run.moments[-1]
    return (
        f"**{run.class_name}**: step {run.step} of {run.num_steps}; what the model took the pictures for at "
        f"t = {moment.timestep:.0f}, sigma {moment.sigma:.3g}."
    )
