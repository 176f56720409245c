"""What the page of the demo computes: a run of the sampler, and how far the heads look from a patch on its way."""

import copy
import io
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..blocks import SDTAttention
from ..evaluation.decay import record_decays
from ..evaluation.decay_maps import CAPTION, DecaySection, RecordedInput, decay_rows, plot_decays
from ..sampling.generate import describe_sampling, generate
from ..sampling.settings import SamplerArguments
from ..sdt import GUIDANCE_KINDS, SDTGuidance, SDTPipeline
from ..sdt.guidance import clean_image_of, sigma_at
from ..sdt.guided_prediction import check_guidance
from ..sdt.vae import decode_latents
from ..utils.ranges import LARGEST_SEED, Range, check_value

#: Steps of a run, evenly spaced, at which the page shows the pictures and, later, the decay.
NUM_MOMENTS = 6
MAX_PICTURES = 16
LEGEND = "At the left: what the model took the picture for at that noise level."


@dataclass
class Moment:
    """A step of the sampler.

    Args:
        timestep: The model's.
        sigma: The noise level, in the scheduler's unit.
        model_input: What the model saw, shape (pictures, channels, height, width).
        pictures: The clean images that it took this for, guidance included.
    """

    timestep: float
    sigma: float
    model_input: torch.Tensor
    pictures: list[Image.Image]


@dataclass
class SamplingRun:
    """A run of the sampler, finished or not.

    Args:
        pipe: The pipeline, with the settings of the run.
        label: Class of the pictures.
        seed: Picture i starts from the noise of sample i of this seed.
        sampler: The sampler in words.
        moments: Those so far.
        pictures: The latest: those of the last moment, and at the end the final ones.
        step: Steps done.
        num_steps: Steps in all.
        finished: Whether the pictures are the final ones.
    """

    pipe: SDTPipeline
    label: int
    seed: int
    sampler: str
    moments: list[Moment] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    step: int = 0
    num_steps: int = 0
    finished: bool = False

    @property
    def class_name(self) -> str:
        """Name of the class."""
        return self.pipe.id2label.get(self.label, str(self.label))


def sample_in_steps(
    pipe: SDTPipeline, label: int, num_pictures: int, seed: int, sampler: SamplerArguments
) -> Iterator[SamplingRun]:
    """Sample pictures of a class, and yield the run after each step and when it is finished.

    Args:
        pipe: The pipeline, which keeps its own settings.
        label: The class.
        num_pictures: How many.
        seed: Seed of the pictures; they are those of `sample/sample.py` with this class and seed.
        sampler: Scheduler, steps and guidance.

    Raises:
        ValueError: If a number is out of its range, or the settings do not fit together or to the model.
    """
    check_value("num_pictures", num_pictures, (int,), Range(1, MAX_PICTURES))
    check_value("seed", seed, (int,), Range(0, LARGEST_SEED))
    pipe = copy.copy(pipe)  # shares the networks
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    sampler.apply_to(pipe)
    labels, settings = pipe.prepare_class_labels([label] * num_pictures), sampler.settings(pipe)
    run = SamplingRun(pipe, labels[0], seed, describe_sampling(pipe, {"seed": seed, **settings}))
    events: queue.SimpleQueue[tuple[int, int, Moment | None] | list[Image.Image] | BaseException] = queue.SimpleQueue()
    left = threading.Event()

    def watch(pipe, step, timestep, tensors):
        pipe._interrupt = left.is_set()
        moment = None
        if step in _spaced(pipe.num_timesteps, NUM_MOMENTS):
            moment = _moment(pipe, float(timestep), tensors["model_input"], tensors["prediction"])
        events.put((step + 1, pipe.num_timesteps, moment))
        return {}

    def work():
        try:
            samples = generate(
                pipe,
                labels,
                seed,
                batch_size=num_pictures,
                progress=False,
                callback_on_step_end=watch,
                callback_on_step_end_tensor_inputs=["model_input", "prediction"],
                **settings,
            )
            events.put([picture for _, picture in samples])
        except BaseException as error:  # raised again where the run is watched
            events.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while not run.finished:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, list):
                run.pictures, run.finished = event, True
            else:
                run.step, run.num_steps, moment = event
                if moment is not None:
                    run.moments.append(moment)
                    run.pictures = moment.pictures
            yield run
    finally:
        left.set()  # the viewer may leave before the end
        worker.join()


@torch.no_grad()
def draw_view(run: SamplingRun, picture: int, patch: tuple[int, int], block: int) -> Image.Image:
    """Draw how far each head of a block looked from a patch, at each moment of a run.

    Args:
        run: The run.
        picture: Which of its pictures.
        patch: Row and column on the grid of patches.
        block: Number of the block.

    Returns:
        A row for each moment, and in it a map for each head, as `eval/decay_maps.py` draws them.

    Raises:
        ValueError: If there is no such picture, patch or block, or the block has no decay.
    """
    if not 0 <= picture < len(run.pictures):
        raise ValueError(f"picture must be one of the {len(run.pictures)} of the run, from 0, not {picture}.")
    model, rows, where = run.pipe.transformer, [], ""
    for moment in run.moments:
        # The conditional half of what sampling computed; the gates of a picture do not depend on the others.
        latents = moment.model_input[picture : picture + 1].to(model.device, model.dtype)
        with record_decays(model, [block]) as decays:
            model(
                latents,
                torch.tensor([moment.timestep], device=model.device),
                torch.tensor([run.label], device=model.device),
            )
        seen = RecordedInput(f"t = {moment.timestep:.0f}", moment.pictures[picture], decays)
        where = decays[0].describe()
        rows += decay_rows(seen, decays[0], [patch], decays[0].grid_size, attention=False)
    title = f"a sample of the class {run.class_name!r}, seed {run.seed}, picture {picture}"
    file = io.BytesIO()
    plot_decays([DecaySection(where, rows)], title, f"{LEGEND}\n{CAPTION}", file)
    return Image.open(file)


def usable_guidance(pipe: SDTPipeline) -> list[str]:
    """Return the keys of `GUIDANCE_KINDS` that the model can use, without one that would be plain guidance again."""
    kinds = []
    for kind in GUIDANCE_KINDS:
        guider = SDTGuidance.from_kind(kind)
        weaker = pipe.guide_transformer if guider.config.guide_model else None
        try:
            check_guidance(guider, pipe.transformer, weaker, scale=2.0)
        except ValueError:
            continue
        if guider.config.guided_channels != pipe.transformer.config.in_channels:
            kinds.append(kind)
    return kinds


def grid_of(pipe: SDTPipeline) -> tuple[int, int]:
    """Return rows and columns of the grid of patches."""
    size, patch = pipe.transformer.config.sample_size, pipe.transformer.config.patch_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows // patch, columns // patch


def num_blocks_of(pipe: SDTPipeline) -> int:
    """Return the number of blocks."""
    return sum(isinstance(module, SDTAttention) for module in pipe.transformer.modules())


def _spaced(total: int, count: int) -> set[int]:
    """Return at most `count` of the steps 0 to total - 1, evenly spaced, with the first and the last."""
    return {round(i * (total - 1) / max(count - 1, 1)) for i in range(count)}


def _moment(pipe: SDTPipeline, timestep: float, model_input: torch.Tensor, prediction: torch.Tensor) -> Moment:
    on_input, on_prediction = clean_image_of(pipe.scheduler, timestep)
    clean = on_input * model_input + on_prediction * prediction[:, : model_input.shape[1]]  # (B, C, H, W)
    pixels = clean if pipe.vae is None else decode_latents(pipe.vae, clean)
    pictures = pipe.image_processor.postprocess(pixels)
    return Moment(timestep, sigma_at(pipe.scheduler, timestep), model_input.cpu(), pictures)
