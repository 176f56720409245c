"""Share a trained model: the record of its run, a model card, uploads to the Hub."""

from ..utils.carried_code import has_code
from ..utils.code_export import write_code
from .model_card import write_model_card
from .push import HubArguments, create_hub_repo, push_folder, share_folder, share_run
from .run_record import command_of, derive_record, describe_run

__all__ = [
    "HubArguments",
    "command_of",
    "create_hub_repo",
    "derive_record",
    "describe_run",
    "has_code",
    "push_folder",
    "share_folder",
    "share_run",
    "write_code",
    "write_model_card",
]
