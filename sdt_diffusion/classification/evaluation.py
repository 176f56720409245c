"""How often a classifier is right."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .image_processing_sdt_h import SDTHImageProcessor


class ProcessedImages(Dataset):
    """Pictures as the image processor hands them to the model.

    Args:
        images: Pictures and labels, see `sdt_diffusion.data.LabelledImages`.
        processor: What is saved with the model.
        indices: Which of them.
    """

    def __init__(self, images: Any, processor: SDTHImageProcessor, indices: range):
        self.images, self.processor, self.indices = images, processor, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        pictures, labels = zip(*self.images.__getitems__([self.indices[index] for index in indices]), strict=True)
        pixel_values = self.processor(list(pictures), return_tensors="pt").pixel_values
        return list(zip(pixel_values, labels, strict=True))


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    images: Any,
    processor: SDTHImageProcessor,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
) -> dict[str, float]:
    """Accuracy and loss, over all processes, each of which takes every n-th image.

    Args:
        model: Gives `logits`; in evaluation mode.
        images: Pictures and labels.
        processor: What is saved with the model.
        accelerator: Knows the processes, the device and the precision.
        batch_size: Images at a time.
        num_workers: Processes that load images.

    Returns:
        `test_accuracy` (top-1), `test_accuracy_top5`, `test_loss` (cross entropy), `test_images`.
    """
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = DataLoader(ProcessedImages(images, processor, mine), batch_size=batch_size, num_workers=num_workers)
    sums = torch.zeros(4, device=accelerator.device, dtype=torch.float64)
    for pixel_values, labels in tqdm(
        loader, desc="Test", leave=False, disable=not accelerator.is_local_main_process, delay=5
    ):
        labels = labels.to(accelerator.device)
        with accelerator.autocast():
            logits = model(pixel_values.to(accelerator.device)).logits.float()
        ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([ranks[:, 0].sum(), ranks.sum(), loss, torch.tensor(len(labels), device=loss.device)])
    right, among_five, loss, count = accelerator.reduce(sums, "sum").tolist()
    return {
        "test_accuracy": right / count,
        "test_accuracy_top5": among_five / count,
        "test_loss": loss / count,
        "test_images": int(count),
    }
