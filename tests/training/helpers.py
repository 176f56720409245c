"""Small runs for the tests of training."""

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.training.config import RunArguments, TrainingConfig, TrainingSet
from sdt_diffusion.training.ema import EMAArguments
from sdt_diffusion.training.loop import train
from sdt_diffusion.training.optimizer import OptimizationArguments
from sdt_diffusion.training.run import TrainingRun
from tests.conftest import TINY


class Images:
    """Twenty plain images of five classes."""

    def __len__(self):
        return 20

    def __getitems__(self, indices):
        return [(torch.full((3, 8, 8), i / 20), i % 5) for i in indices]


class FunctionLoss:
    """A loss that is a function of (model, images, labels, draws)."""

    def __init__(self, compute):
        self.compute = compute

    def __call__(self, model, images, labels, draws):
        return self.compute(model, images, labels, draws)

    def pop_values(self):
        return {}


def mean_loss(model, images, labels, draws):
    return (model(images, draws.uniform() * 1000, labels).sample - images).square().mean()


class Projection:
    """A term with a head, through which the prediction is to give the image."""

    name, weight, blocks = "projection", 0.5, ()

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(3, 3)

    def __call__(self, predicted):
        return (self.head(predicted.prediction.transpose(1, 3)) - predicted.batch.transpose(1, 3)).square().mean()


def build_run(output_dir, model=None, optimization=None, ema=None, data=None, config=None, heads=None, **run):
    """A run on one CPU process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    arguments = RunArguments(
        output_dir=str(output_dir),
        **{"report_to": "none", "cpu_threads": 1, "mixed_precision": "no", "train_batch_size": 4}
        | {"max_train_steps": 6, "checkpointing_steps": 2}
        | run,
    )
    config = TrainingConfig(
        arguments,
        OptimizationArguments(**{"learning_rate": 1e-2, **(optimization or {})}),
        EMAArguments(**(ema or {})),
        **(config or {}),
    )
    torch.manual_seed(0)
    model = SDTTransformer2DModel(**{**TINY, **(model or {})})
    return TrainingRun(model, "transformer", TrainingSet(Images(), **(data or {})), config, heads=heads)


def trained(run, loss=mean_loss, validate=None):
    """Train a run to its end; return it."""
    train(run, FunctionLoss(loss) if callable(loss) and not hasattr(loss, "pop_values") else loss, validate)
    return run


def weights_of(run):
    return [parameter.detach().clone() for parameter in run.unwrapped_model.parameters()]
