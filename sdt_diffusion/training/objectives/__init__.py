"""What the model learns to predict: noise or velocity under a DDPM schedule, or the flow from data to noise.

A new objective is a class like those in `flow.py` and `ddpm.py`, and a line in `OBJECTIVES`.
"""

from .ddpm import DDPMObjective
from .flow import FlowObjective
from .loss import DiffusionLoss
from .objective import OBJECTIVES, Noised, Objective, ObjectiveArguments

__all__ = [
    "OBJECTIVES",
    "DDPMObjective",
    "DiffusionLoss",
    "FlowObjective",
    "Noised",
    "Objective",
    "ObjectiveArguments",
    "build_objective",
]

OBJECTIVES.update(flow=FlowObjective, ddpm=DDPMObjective)


def build_objective(args: ObjectiveArguments) -> Objective:
    """Build the objective that the arguments name."""
    return OBJECTIVES[args.objective](args)
