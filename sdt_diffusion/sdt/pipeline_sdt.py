"""Generate images from class labels, with any of diffusers' DDPM-family or flow-matching schedulers."""

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import DDPMScheduler, SchedulerMixin

from ..utils.ranges import Range, check_value
from ..utils.reading import CHECKSUMS_FILE, verify_checksums, write_checksums
from .class_names import labels_of_names
from .guidance import SDTGuidance
from .guided_prediction import check_guidance, check_network_output, check_parts, predict, step_ends
from .pipeline_inputs import SDTInputsMixin
from .pipeline_loaders import SDTLoaderMixin, objective_of_0_1
from .schedulers import (
    check_fits,
    check_objective,
    check_sampling_setting,
    learns_variance,
    objective_of,
    swap_scheduler,
)
from .steps import set_schedule
from .transformer_sdt import SDTTransformer2DModel
from .vae import decode_latents

#: Sampling settings of a pipeline that has none saved.
DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS = 4.0, 50
#: Values that DDIM's eta may have.
ETA_RANGE = Range(0, 1)


class SDTPipeline(SDTLoaderMixin, SDTInputsMixin, DiffusionPipeline):
    """Class-conditional image generation with an `SDTTransformer2DModel`.

    Args:
        transformer: The model; it predicts noise, v or flow, as the scheduler's `prediction_type` says.
        scheduler: Any DDPM-family scheduler for `epsilon` or `v_prediction` models, any flow-matching one for flows.
        vae: Decodes latents to pixels; without one the transformer works in pixels, -1 to 1.
        id2label: Label to class name; a name may hold several words for the class, separated by commas.
        guidance_scale: Guidance that calls use unless they name another, saved with the pipeline; 4 if `None`.
        num_inference_steps: Steps that calls use unless they name others, saved with the pipeline; 50 if `None`.
        guider: Guidance of another kind than plain classifier-free: `SDTGuidance`, or a guider of diffusers that
            changes no model. Its scale takes the place of `guidance_scale`.
        guide_transformer: The weaker model of autoguidance.
        objective: What the model has learned, which no scheduler may contradict: the prediction type and the betas or
            the number of timesteps; those of `scheduler` if `None`.
        uniform_sigmas: Whether Euler's and Heun's methods take the noise levels 1 - i/N of a flow, so that N steps are
            worth N, in place of diffusers', the last of which is 0.001; DEIS and SASolver end at the image.

    Raises:
        ValueError: If a part is of another kind, or a setting is none.
    """

    model_cpu_offload_seq = "transformer->guide_transformer->vae"
    _optional_components = ["vae", "guider", "guide_transformer"]  # noqa: RUF012 (diffusers' names and forms)
    _callback_tensor_inputs = ["latents", "model_input", "prediction"]  # noqa: RUF012

    def __init__(
        self,
        transformer: SDTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: torch.nn.Module | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        guider: BaseGuidance | None = None,
        guide_transformer: SDTTransformer2DModel | None = None,
        objective: dict[str, Any] | None = None,
        uniform_sigmas: bool = False,
    ):
        super().__init__()
        check_parts(transformer, scheduler, vae, id2label)
        if transformer is not None and not (guider is guide_transformer is None):
            check_guidance(guider or SDTGuidance(), transformer, guide_transformer)
        for name, value in (("guidance_scale", guidance_scale), ("num_inference_steps", num_inference_steps)):
            if value is not None:
                check_sampling_setting(name, value)
        if objective is not None:
            check_objective(objective)
        elif scheduler is not None:
            objective = objective_of_0_1(transformer) or objective_of(scheduler)
        if not isinstance(uniform_sigmas, bool):
            raise ValueError(f"uniform_sigmas must be true or false, not {uniform_sigmas!r}.")
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, guider=guider, guide_transformer=guide_transformer
        )
        self.id2label = {int(label): name for label, name in (id2label or {}).items()}  # in JSON, keys are strings
        self.register_to_config(
            id2label=self.id2label,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            objective=objective,
            uniform_sigmas=uniform_sigmas,
        )
        self._guider, self._current_timestep = copy.copy(guider or SDTGuidance()), None
        self._guidance_scale = self.own_guidance_scale
        self._labels_of_name = labels_of_names(self.id2label)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a pipeline as diffusers does; the checksums in a folder are compared first.

        Raises:
            ValueError: If weights are missing, left over, or changed since they were saved; names them.
        """
        verify_checksums(Path(pretrained_model_name_or_path, "vae"))  # the transformer compares its own
        kwargs.pop("low_cpu_mem_usage", None)  # without it, diffusers would make up what a VAE's files lack
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory, *args, with_code: bool = False, **kwargs):
        """Save the pipeline as diffusers does, with the checksums of its weights, and its code if asked for.

        Args:
            save_directory: The folder.
            *args: See diffusers.
            with_code: Write the model's code beside its weights, so that `DiffusionPipeline.from_pretrained(folder,
                trust_remote_code=True)` needs diffusers only.
            **kwargs: See diffusers.

        Raises:
            ValueError: If the code cannot be written; says what to do instead.
        """
        # diffusers forgets to name a part in model_index.json that was `None` when the pipeline was made.
        self.register_modules(**{name: getattr(self, name) for name in self._optional_components})
        folder = Path(save_directory, "vae")
        (folder / CHECKSUMS_FILE).unlink(missing_ok=True)  # those of what is replaced
        super().save_pretrained(save_directory, *args, with_code=with_code, **kwargs)
        if self.vae is not None:
            write_checksums(folder)

    @property
    def interrupt(self) -> bool:
        """Whether the running call skips its remaining steps; a step callback may set `_interrupt`."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call, or of the last one; a step callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call uses guidance: `guidance_scale > 1`, diffusers' convention."""
        return self._guidance_scale > 1

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the running call, for diffusers' caches; `None` between calls."""
        return self._current_timestep

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler timesteps of the running call."""
        return self._num_timesteps

    def sampling_settings(
        self, guidance_scale: float | None = None, num_inference_steps: int | None = None
    ) -> dict[str, Any]:
        """Return the settings of a call: those given, else those saved with the pipeline, else the defaults.

        Args:
            guidance_scale: Scale of classifier-free guidance.
            num_inference_steps: Steps of the scheduler.

        Returns:
            `guidance_scale` and `num_inference_steps`.

        Raises:
            ValueError: If one of them is out of range, there are more steps than the model was trained with, the
                scheduler does not fit the model, or the networks cannot give the guidance.
        """
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        settings = {
            "guidance_scale": self.own_guidance_scale if guidance_scale is None else guidance_scale,
            "num_inference_steps": DEFAULT_NUM_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps,
        }
        check_fits(self.scheduler, self.objective)
        check_network_output(self.transformer, self.scheduler)
        for name, value in settings.items():
            check_sampling_setting(name, value, self.scheduler)
        guider, networks = self.guider or SDTGuidance(), (self.transformer, self.guide_transformer)
        check_guidance(guider, *networks, settings["guidance_scale"])
        if isinstance(guider, SDTGuidance):
            guider.check_interval(self.scheduler)
        return settings

    @property
    def objective(self) -> dict[str, Any]:
        """What the model has learned: prediction type and noise schedule."""
        return self.config.objective or objective_of(self.scheduler)

    def swap_scheduler(self, name: str, **options: Any) -> None:
        """Sample with another scheduler from here on.

        For some pairs, `OtherScheduler.from_config(pipe.scheduler.config)` of diffusers loses the prediction type or
        the noise schedule, and the pipeline then refuses to sample. This keeps them:

            pipe.swap_scheduler("DPMSolverMultistepScheduler")

        The sampler of facebookresearch/DiT takes other steps than this package's default ("learned_range" after
        learn_sigma):

            pipe.swap_scheduler("DDPMScheduler", variance_type="fixed_large", timestep_spacing="linspace")

        Args:
            name: Class name in diffusers, or "FlowMatchSDEScheduler".
            **options: Arguments of that class, except those that follow from the model. The others are taken from the
                present scheduler if it fits the model.

        Raises:
            ValueError: If the name or an option is unknown, or the scheduler cannot sample from the model.
        """
        try:
            check_fits(self.scheduler, self.objective)
            present = self.scheduler
        except ValueError:
            present = self.objective
        self.scheduler = swap_scheduler(present, name, **options)

    @property
    def own_guidance_scale(self) -> float:
        """Guidance scale of calls that name none: the guider's, else that saved with the pipeline, else 4."""
        scale = self.config.guidance_scale if self.guider is None else getattr(self.guider, "guidance_scale", None)
        return DEFAULT_GUIDANCE_SCALE if scale is None else scale

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        end_timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict at a timestep, with the guidance of the running call where one is due; see `guided_prediction`.

        A learned variance, which is the second half of twice as many channels, comes from the unguided prediction.
        """
        self._guider.guidance_scale = self._guidance_scale
        inputs = (self.transformer, self.guide_transformer, latents, timestep, class_labels, end_timestep)
        prediction = predict(self._guider, *inputs)  # (B, C or 2C, H, W)
        takes_variance = isinstance(self.scheduler, DDPMScheduler) and learns_variance(self.scheduler)
        return prediction if takes_variance else prediction[:, : latents.shape[1]]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SDTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images of the given classes.

        Args:
            class_labels: A label id or class name, or a sequence of them: one image for each.
            guidance_scale: Scale of the guidance, which is the `guider`'s, else classifier-free; 1 or less samples
                without. By default what is saved with the pipeline, else 4; FIDs are reported at about 1.5.
            num_inference_steps: Steps of the scheduler; by default what is saved with the pipeline, else 50.
            num_images_per_prompt: Images for each label; the images of one label follow each other.
            height: Height of the images in pixels; the trained one by default.
            width: Width of the images in pixels.
            eta: DDIM's eta; other schedulers ignore it.
            generator: One generator, or one for each image, with which an image does not depend on its batch.
            latents: Initial noise of unit variance in place of the generator's.
            output_type: "pil", "np" (batch, height, width, channels; 0 to 1), "pt" (batch, channels, height, width; 0
                to 1) or "latent" (what the transformer works in).
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {"latents": ...})` after each step; it
                may return a dictionary with replaced latents.
            callback_on_step_end_tensor_inputs: Tensors that the callback gets: "latents" after the step, and
                "model_input" and guided "prediction" of the step.
            timesteps: The model's timesteps, decreasing, in place of a number of steps.
            sigmas: The scheduler's noise levels, decreasing, without the 0 at the end, in place of a number of steps.

        Returns:
            The images.

        Raises:
            ValueError: If a label, number, size, output type, generator list, callback input or guider does not fit.
        """
        label_ids = self.prepare_class_labels(class_labels)
        settings = self.sampling_settings(guidance_scale, num_inference_steps)
        check_value("eta", eta, (float,), ETA_RANGE)
        height, width = self.check_inputs(
            height, width, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs
        )
        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        device = self._execution_device
        class_labels = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_prompt)

        num_steps = num_inference_steps
        if timesteps is None and sigmas is None:
            num_steps = settings["num_inference_steps"]
        num_steps = set_schedule(self.scheduler, num_steps, device, timesteps, sigmas, self.config.uniform_sigmas)
        run = self.scheduler.timesteps
        self._num_timesteps = len(run)
        self._guider = copy.copy(self.guider or SDTGuidance())  # whose state is that of this call
        if isinstance(self._guider, SDTGuidance):
            self._guider.start_run(self.scheduler, run.tolist())
        latents = self.prepare_latents(len(class_labels), height, width, generator, latents)
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}

        with self.progress_bar(total=num_steps) as progress_bar:
            for i, (t, end) in enumerate(zip(run, step_ends(self.transformer, self.scheduler), strict=True)):
                if self.interrupt:
                    continue
                self._current_timestep = t
                self._guider.set_state(i, len(run), t)
                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, t)
                prediction = self.predict(model_input, t, class_labels, end)
                latents = self.scheduler.step(prediction, t, latents, return_dict=False, **step_kwargs)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "model_input": model_input, "prediction": prediction}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                if (i + 1) * num_steps // len(run) > progress_bar.n:
                    progress_bar.update()  # second-order schedulers have two timesteps a step

        self._current_timestep = None
        images = latents
        if output_type != "latent":
            pixels = latents if self.vae is None else decode_latents(self.vae, latents)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
