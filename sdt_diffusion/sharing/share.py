"""What training scripts do at their end, and train/share.py later: a record, a card, and the Hub if asked to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..training.run import Training
from .hub import HubArguments, create_hub_repo, push_folder
from .model_card import write_model_card
from .run_record import command_of, describe_run, write_record


def share_run(
    args: HubArguments,
    training: Training,
    images: Any,
    networks: Sequence[nn.Module],
    script: str,
    argv: Sequence[str],
) -> None:
    """Puts the record of a finished run and its model card beside the model, and pushes all to the Hub if asked to.

    Called by all processes; the main one acts.

    Args:
        args: Whether and where to push.
        training: The run, finished.
        images: The data set.
        networks: What is saved: the trained network, and others that sampling needs.
        script: Path of the script.
        argv: Its arguments.
    """
    accelerator = training.accelerator
    if not accelerator.is_main_process:
        return
    record = describe_run(
        command_of(script, argv, accelerator.num_processes),
        training.config,
        images,
        networks,
        training.step,
        training.images_per_step,
        accelerator.num_processes,
    )
    write_record(training.output_dir, record)
    share_folder(args, training.output_dir)


def share_folder(args: HubArguments, folder: Path) -> None:
    """Writes the model card from what the folder holds now, and pushes the folder to the Hub if asked to.

    Raises:
        ValueError: If the folder holds no finished run, or a file of it is damaged.
        RuntimeError: If pushing failed; says how to try again.
    """
    repo_id = create_hub_repo(args, folder)
    print(f"The model card is {write_model_card(folder, repo_id, args.license)}")
    if repo_id is None:
        return
    try:
        print(f"Pushed to {push_folder(folder, repo_id, args)}")
    except Exception as error:
        raise RuntimeError(
            f"Pushing failed: {error}\nThe model is whole in {folder}. To push again: python train/share.py --folder "
            f"{folder} --push_to_hub --hub_model_id {repo_id}"
        ) from error
