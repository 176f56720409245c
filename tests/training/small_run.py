"""A small run in a process of its own, alone or as one of several: for test_processes.py.

    python small_run.py OUTPUT_DIR STRATEGY [FIELD=VALUE ...]

STRATEGY is "ddp", which a single process does without, or "fsdp2". A FIELD is one of `RunArguments`, or
`num_workers`, `seconds`, which an image takes to be loaded, `unreadable`, the index of an image, or `objective`, a
function of this file.
"""

import sys
import time
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.data import CorruptImageError
from sdt_diffusion.training import run as training_run
from sdt_diffusion.training.config import RunArguments, TrainingConfig, TrainingSet
from sdt_diffusion.training.ema import EMAArguments
from sdt_diffusion.training.loop import train
from sdt_diffusion.training.objectives import (
    AlignmentLoss,
    ContrastiveLoss,
    DiffusionLoss,
    DirectionLoss,
    DispersiveLoss,
    ObjectiveArguments,
    TokenRouting,
    build_objective,
)
from sdt_diffusion.training.optimizer import OptimizationArguments
from sdt_diffusion.utils.arguments import exit_on_error
from tests.conftest import TINY
from tests.training.helpers import Projection


class Images:
    """More than a step and not a multiple of it: epochs end within batches."""

    def __init__(self, seconds=0.0, unreadable=None):
        self.seconds, self.unreadable = seconds, unreadable

    def __len__(self):
        return 21

    def __getitems__(self, indices):
        time.sleep(self.seconds * len(indices))
        if self.unreadable in indices:
            raise CorruptImageError(f"Cannot read the image of row {self.unreadable}.")
        ramp = torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)
        return [(ramp * (i + 1) / 21, i % 5) for i in indices]


class Patches:
    """Features to align with: the mean colors of 2 x 2 patches."""

    feature_shape = (4, 4, 3)

    def features(self, batch):
        return F.avg_pool2d(batch, 2).permute(0, 2, 3, 1)


def flow():
    """Every term that works under FSDP2, and routes of tokens."""
    terms = [DirectionLoss(0.5), ContrastiveLoss(0.05), DispersiveLoss(0.5, block=0, num_images=2), Projection()]
    terms.append(AlignmentLoss(0.5, 32, 0, (4, 4), Patches(), hidden_width=8))
    objective = build_objective(ObjectiveArguments())
    return DiffusionLoss(objective, 0.5, auxiliary=terms, routing=TokenRouting(16, 0.5, 1, 2))


def plain():
    """One further term, which has a head."""
    return DiffusionLoss(build_objective(ObjectiveArguments()), 0.5, auxiliary=[Projection()])


def meanflow():
    """Guidance in training, too, which asks the model a second time."""
    return DiffusionLoss(build_objective(ObjectiveArguments("meanflow", meanflow_guidance_scale=1.5)), 0.5)


def sharded(build_accelerator):
    """Accelerate takes FSDP to be for accelerators only; torch's fully_shard works between CPU processes too."""

    def build(run):
        accelerator = build_accelerator(run)
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does, or it is forgotten
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        if run.mixed_precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(run.mixed_precision)  # as accelerate would have
        return accelerator

    return build


def main(output_dir, strategy, *words):
    values = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in words)}
    images = Images(values.pop("seconds", 0.0), values.pop("unreadable", None))
    objective = values.pop("objective", "flow")
    data = TrainingSet(images, num_workers=values.pop("num_workers", 0))
    run_args = RunArguments(
        output_dir=output_dir,
        report_to="none",
        cpu_threads=1,
        logging_steps=2,
        **{
            "mixed_precision": "no",
            "train_batch_size": 8,
            "max_train_steps": 6,
            "checkpointing_steps": 3,
            **values,
        },
    )
    # With its usual epsilon AdamW makes full steps of gradients that are nothing but rounding errors.
    optimization = OptimizationArguments(  # Muon for matrices, AdamW for everything else
        optimizer="muon", learning_rate=1e-2, adam_epsilon=1e-4, lr_scheduler="cosine", lr_warmup_steps=2
    )
    torch.manual_seed(0)
    loss = {"flow": flow, "plain": plain, "meanflow": meanflow}[objective]()
    torch.manual_seed(0)
    model = SDTTransformer2DModel(**TINY, **loss.objective.model_config(TINY["in_channels"]))
    build = training_run.build_accelerator
    with exit_on_error():
        with mock.patch.object(training_run, "build_accelerator", sharded(build) if strategy == "fsdp2" else build):
            config = TrainingConfig(run_args, optimization, EMAArguments(ema_profile="power"))
            run = training_run.TrainingRun(model, "transformer", data, config, heads=loss.heads)
        with run:
            train(run, loss)
            if run.accelerator.is_main_process:
                run.trained_model.save_pretrained(run.output_dir / "product")
            run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
