"""What `SDTPipeline` makes of the arguments of a call: labels, sides of images, latents to start from."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..utils.ranges import Range, check_value
from .class_names import flat_labels, label_ids
from .schedulers import learns_variance
from .vae import check_images_made, vae_spatial_scale

#: Values that the numbers of a call may have.
IMAGES_RANGE, SIDE_RANGE = Range(1, 10_000), Range(1, 16_384)


class SDTInputsMixin:
    """Reads the arguments of a call for a pipeline's parts. To be inherited from before `DiffusionPipeline`."""

    transformer: Any
    scheduler: Any
    vae: Any
    id2label: dict[int, str]
    _labels_of_name: dict[str, list[int]]
    _callback_tensor_inputs: list[str]
    _execution_device: torch.device

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along a side, of the VAE that the pipeline has now: 1 without one."""
        return vae_spatial_scale(self.vae)

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Turns decoded pixels, -1 to 1, into images."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def labels(self) -> dict[str, int]:
        """Label id of each class name that means one class only."""
        return {name: ids[0] for name, ids in self._labels_of_name.items() if len(ids) == 1}

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Return the label ids of class names.

        Raises:
            ValueError: If a name is unknown, or means several classes.
        """
        return label_ids(label, self._labels_of_name, list(self.id2label.values()))

    def prepare_class_labels(self, class_labels: Any) -> list[int]:
        """Turn ids, names, or a sequence or tensor of them, nested at most once, into a list of label ids.

        Raises:
            ValueError: If a label is out of range, of a wrong type, or an unknown name.
        """
        class_labels = flat_labels(class_labels)
        if not class_labels:
            raise ValueError("class_labels is empty.")
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in class_labels:
            label = self.get_label_ids(label)[0] if isinstance(label, str) else label
            if isinstance(label, bool) or not hasattr(label, "__index__"):
                raise ValueError(f"A class label must be an integer or a class name, not {label!r}.")
            if not 0 <= label < num_classes:
                raise ValueError(f"Class label {label} is out of range: the model has labels 0..{num_classes - 1}.")
            ids.append(int(label))
        return ids

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the start of sampling: noise, or the given latents, times the scheduler's initial sigma, in fp32."""
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        device = self._execution_device
        if latents is None:
            if isinstance(generator, list) and len(generator) != batch_size:
                raise ValueError(f"{len(generator)} generators were given for a batch of {batch_size} images.")
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}; {shape} is needed.")
        # Flow-matching schedulers start at sigma 1 and lack this attribute.
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def check_inputs(
        self,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> tuple[int, int]:
        """Refuse arguments of a call, see `SDTPipeline.__call__`, that the parts cannot serve.

        Returns:
            Height and width of the images, the trained ones where none are given.

        Raises:
            ValueError: If a side is not divisible into patches, or another argument does not fit; says why.
        """
        sample_size = self.transformer.config.sample_size
        trained = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        height, width = (
            trained_side * self.vae_scale_factor if side is None else side
            for side, trained_side in zip((height, width), trained, strict=True)
        )
        unit = self.transformer.config.patch_size * self.vae_scale_factor
        for name, side in (("height", height), ("width", width)):
            check_value(name, side, (int,), SIDE_RANGE)
        if height % unit or width % unit:
            raise ValueError(
                f"An image of {height}x{width} is not divisible into patches: both sides must be multiples of {unit} "
                f"(patch_size {self.transformer.config.patch_size}, VAE factor {self.vae_scale_factor})."
            )
        channels = self.transformer.config.in_channels
        if learns_variance(self.scheduler) and self.transformer.config.get("out_channels") != 2 * channels:
            variance = f"variance_type {self.scheduler.config.variance_type!r}"
            raise ValueError(f"{variance} needs a model that predicts the variance: {2 * channels} out_channels.")
        check_value("num_images_per_prompt", num_images_per_prompt, (int,), IMAGES_RANGE)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"Unknown output_type {output_type!r}: choose 'pil', 'np', 'pt' or 'latent'.")
        if output_type != "latent":
            check_images_made(self.vae, channels, height, width)
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be in {self._callback_tensor_inputs}, but has {unknown}."
            )
        return height, width
