"""Batches of images to the moments of their latents, and a picture to check them by."""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import nn

from ..data.image_rows import ShardBatch
from ..plots import image_grid
from ..sdt.latents import decode_raw_latents, posterior_moments

#: Images in the preview.
NUM_SHOWN = 8


class ShardEncoder:
    """Encodes images and their mirrors.

    Args:
        vae: The VAE.
        latent_shape: Channels, height and width of its latents.
        dtype: Of the moments.
    """

    def __init__(self, vae: nn.Module, latent_shape: tuple[int, int, int], dtype: torch.dtype):
        self.vae, self.latent_shape, self.dtype = vae, latent_shape, dtype
        self._shown: list[torch.Tensor] = []

    def __call__(self, batches: Iterator[ShardBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the batches of a shard.

        Returns:
            Moments of shape (images, 2, 2, channels, height, width) and labels of shape (images,), of the images that
            could be decoded.

        Raises:
            ValueError: If moments are not finite.
        """
        moments, labels = [torch.empty(0, 2, 2, *self.latent_shape, dtype=self.dtype)], []
        self._shown = []
        for batch in batches:
            readable = [i for i, image in enumerate(batch.images) if isinstance(image, torch.Tensor)]
            if not readable:
                continue
            pixels = torch.stack([batch.images[i] for i in readable])
            self._shown += pixels[: NUM_SHOWN - len(self._shown)]
            labels += [batch.labels[i] for i in readable]
            moments.append(self.moments(pixels))
        return torch.cat(moments), torch.tensor(labels, dtype=torch.int64)

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Moments of images and of their mirrors, whose pixels are mirrored, on the CPU."""
        pixels = pixels.to(self.vae.device)
        both = [posterior_moments(self.vae, side) for side in (pixels, pixels.flip(-1))]
        moments = torch.stack(both, dim=1).to(self.dtype)
        if not moments.isfinite().all():
            raise ValueError(
                f"The VAE gives latents that are not finite in {str(self.dtype).removeprefix('torch.')}: give --dtype "
                "float32, or a finer --vae_dtype."
            )
        return moments.cpu()

    @torch.no_grad()
    def preview(self, moments: torch.Tensor, labels: torch.Tensor, class_names: list[str] | None) -> Image.Image:
        """The shard's first images, and what the VAE makes of their latents and of those of their mirrors."""
        if not self._shown:
            return Image.new("RGB", (64, 64), "white")
        means = moments[: len(self._shown), :, 0].to(self.vae.device, torch.float32)
        decoded = [decode_raw_latents(self.vae, side).cpu() for side in means.unbind(dim=1)]
        rows = (torch.stack(self._shown), *decoded)
        names = [class_names[label] if class_names else str(int(label)) for label in labels[: len(self._shown)]]
        texts = [*names, *["decoded"] * len(names), *["mirrored"] * len(names)]
        return image_grid([_picture(image) for row in rows for image in row], texts, columns=len(names))


def _picture(pixels):
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(values if values.shape[2] == 3 else values[..., 0])
