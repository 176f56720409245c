"""Draw training curves, confusions, decays and grids of images."""

from .charts import plot_accuracy_curve, plot_confusion, plot_loss_curve
from .decay import DecayRow, DecaySection, plot_decays
from .grid import image_grid

__all__ = [
    "DecayRow",
    "DecaySection",
    "image_grid",
    "plot_accuracy_curve",
    "plot_confusion",
    "plot_decays",
    "plot_loss_curve",
]
