"""Write the model card of a trained model again, with the numbers found since, and push the model to the Hub.

python train/share.py --folder outputs/digits                                          # README.md only
python train/share.py --folder outputs/digits --push_to_hub --hub_model_id me/digits   # and push
python train/share.py --folder outputs/digits --with_code True                         # loads without this package

The first command writes nothing but the card. The last one writes the model's code beside its weights; whoever loads
the folder then has to trust it (`trust_remote_code=True`).
"""

import glob
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, get_token, upload_folder
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..utils.arguments import SECRET_KEY, exit_on_error, parse_arguments
from ..utils.carried_code import CODE_FILES
from ..utils.code_export import write_code
from ..utils.files import shorten_path, write_json
from ..utils.ranges import CheckedArguments
from ..utils.reading import read_json
from .model_card import write_model_card
from .run_record import read_record, write_record

#: Files of a model's folder, beside the folders of its components, that go to the Hub.
SHARED_FILES = ("*.json", "*.jsonl", "*.md", "*.png", "model*.safetensors", *CODE_FILES)


@dataclass
class HubArguments(CheckedArguments):
    """Whether and where to share."""

    push_to_hub: bool = field(default=False, metadata={"help": "Upload the finished model to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Its name there, such as me/my-model; the folder's name by default."}
    )
    hub_token: str | None = field(
        default=None,
        metadata={
            "help": "Token, written to no file; that of HF_TOKEN or `hf auth login` by default.",
            SECRET_KEY: True,
        },
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make the repository private; the default of your account otherwise."}
    )
    license: str | None = field(default=None, metadata={"help": "License of the model for its card, such as mit."})

    def __post_init__(self):
        super().__post_init__()
        if not self.push_to_hub:
            return
        try:
            validate_repo_id(self.hub_model_id)
        except HFValidationError as error:
            raise ValueError(f"hub_model_id: {error}") from error
        if (self.hub_token or get_token()) is None:
            raise ValueError("push_to_hub needs a token: log in by `hf auth login`, set HF_TOKEN, or give hub_token.")


def create_hub_repo(args: HubArguments, folder: Path) -> str | None:
    """Create the repository if there is none, which also checks early that it can be written.

    Args:
        args: Where to push to.
        folder: The folder, whose name the repository gets by default.

    Returns:
        The repository's full name, or `None` without `push_to_hub`.

    Raises:
        ValueError: If it cannot be created.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or folder.resolve().name
    try:
        return create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # the network, the Hub and its HTTP library all raise their own
        raise ValueError(f"push_to_hub: the repository {name} cannot be made or opened: {error}") from error


def files_to_share(folder: Path) -> list[str]:
    """List the files of the model and its card, relative to the folder: no checkpoints, samples or hidden files."""
    index = folder / "model_index.json"
    components = read_json(index) if index.is_file() else {}
    files = [path for pattern in SHARED_FILES for path in folder.glob(pattern)]
    for name, value in components.items():
        if isinstance(value, list) and Path(name).name == name:  # no path out of the folder
            files += (folder / name).rglob("*")
    names = (path.relative_to(folder) for path in files if path.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def remove_private_paths(folder: Path) -> None:
    """Shorten the `_name_or_path` that diffusers notes in the configs of models it has loaded from a local folder."""
    for name in files_to_share(folder):
        path = folder / name
        if path.name in ("config.json", "model_index.json"):
            config = read_json(path)
            short = shorten_path(config.get("_name_or_path"))
            if short != config.get("_name_or_path"):
                write_json(path, {**config, "_name_or_path": short})


def push_folder(folder: Path, repo_id: str, args: HubArguments) -> str:
    """Upload `files_to_share`.

    Returns:
        The address of the commit.
    """
    return upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        token=args.hub_token,
        allow_patterns=[glob.escape(name) for name in files_to_share(folder)],
        commit_message="Upload the model and its card",
    ).commit_url


def share_run(args: HubArguments, folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a finished run and its model card into its folder, and push all to the Hub if asked to.

    Args:
        args: Whether and where to push.
        folder: The run's folder.
        record: See `describe_run` and `derive_record`.
    """
    write_record(folder, record)
    share_folder(args, folder)


def share_folder(args: HubArguments, folder: Path, with_code: bool = False) -> None:
    """Write the model card from what the folder holds now, and push the folder to the Hub if asked to.

    Args:
        args: Whether and where to push.
        folder: The folder.
        with_code: Write the model's code into it too, see `write_code`.

    Raises:
        ValueError: If the folder holds no finished run, or a file of it is damaged.
        OSError: If pushing failed; says how to try again.
    """
    repo_id = create_hub_repo(args, folder)
    if with_code:
        read_record(folder)  # refuses a folder of no run before anything is written
        print(f"The model's code is {', '.join(map(str, write_code(folder)))}")
    print(f"The model card is {write_model_card(folder, repo_id, args.license)}")
    remove_private_paths(folder)
    if repo_id is None:
        return
    try:
        print(f"Pushed to {push_folder(folder, repo_id, args)}")
    except Exception as error:  # see create_hub_repo
        raise OSError(
            f"Pushing failed: {error}\nThe model is complete in {folder}. To push again: python train/share.py "
            f"--folder {folder} --push_to_hub --hub_model_id {repo_id}"
        ) from error


@dataclass
class FolderArguments(CheckedArguments):
    """What to share."""

    folder: str = field(metadata={"help": "Folder that train_dit.py, train_classifier.py or reconstruct_ema.py made."})
    with_code: bool = field(
        default=False, metadata={"help": "Write the model's code too, so that it loads without this package."}
    )


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    args, hub_args = parse_arguments((FolderArguments, HubArguments), argv, description=__doc__)
    share_folder(hub_args, Path(args.folder), args.with_code)


if __name__ == "__main__":
    main()
