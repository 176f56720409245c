"""What the model learns to predict: noise or velocity under a DDPM schedule, or a flow, itself or its average.

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
from .meanflow import MeanFlowObjective
from .objective import OBJECTIVES, Noised, Objective, ObjectiveArguments
from .routing import TokenRouting, build_routing

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
    "MeanFlowObjective",
    "Noised",
    "Objective",
    "ObjectiveArguments",
    "Predicted",
    "SelfAlignmentLoss",
    "TokenRouting",
    "build_auxiliary_losses",
    "build_objective",
    "build_routing",
]

OBJECTIVES.update(flow=FlowObjective, ddpm=DDPMObjective, meanflow=MeanFlowObjective)


def build_objective(args: ObjectiveArguments) -> Objective:
    """Build the objective that the arguments name."""
    return OBJECTIVES[args.objective](args)
