"""What the model learns to predict: noise or velocity under a DDPM schedule, or the flow from data to noise.

A new objective is a class like those in `flow.py` and `ddpm.py`, and a line in `OBJECTIVES`. A further term of the
loss is a class like those in `auxiliary.py`.
"""

from .auxiliary import (
    AlignmentLoss,
    AuxiliaryLoss,
    ContrastiveLoss,
    DirectionLoss,
    DispersiveLoss,
    Predicted,
    SelfAlignmentLoss,
    build_auxiliary_losses,
)
from .ddpm import DDPMObjective
from .flow import FlowObjective
from .loss import DiffusionLoss
from .objective import OBJECTIVES, Noised, Objective, ObjectiveArguments

__all__ = [
    "OBJECTIVES",
    "AlignmentLoss",
    "AuxiliaryLoss",
    "ContrastiveLoss",
    "DDPMObjective",
    "DiffusionLoss",
    "DirectionLoss",
    "DispersiveLoss",
    "FlowObjective",
    "Noised",
    "Objective",
    "ObjectiveArguments",
    "Predicted",
    "SelfAlignmentLoss",
    "build_auxiliary_losses",
    "build_objective",
]

OBJECTIVES.update(flow=FlowObjective, ddpm=DDPMObjective)


def build_objective(args: ObjectiveArguments) -> Objective:
    """Build the objective that the arguments name."""
    return OBJECTIVES[args.objective](args)
