"""Pictures of what happens."""

from .confusion import plot_confusion
from .curves import plot_accuracy_curve, plot_loss_curve
from .grid import image_grid

__all__ = ["image_grid", "plot_accuracy_curve", "plot_confusion", "plot_loss_curve"]
