"""Giving a trained model to others: what its run was, a model card, the Hub."""

from .hub import HubArguments, create_hub_repo, push_folder
from .model_card import write_model_card
from .run_record import describe_run
from .share import share_folder, share_run

__all__ = [
    "HubArguments",
    "create_hub_repo",
    "describe_run",
    "push_folder",
    "share_folder",
    "share_run",
    "write_model_card",
]
