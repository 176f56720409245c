"""Load networks of transformers from safetensors, whole and finite, with errors that name what is wrong."""

import textwrap
from pathlib import Path
from typing import Any

from torch import nn

from .reading import check_finite, shortened, verify_checksums


def load_network(auto_class: Any, name: str, what: str, may_lack: tuple[str, ...] = (), **kwargs: Any) -> nn.Module:
    """Load a network of transformers or this project from safetensors, in evaluation mode.

    Args:
        auto_class: Its class, or one of transformers' Auto classes.
        name: Folder or Hub name.
        what: What it must be, for the message.
        may_lack: Beginnings of the names of weights that may be missing or of another shape, such as those of a head
            that is initialized anew.
        **kwargs: Arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: If it cannot be loaded.
        ValueError: If weights are damaged, not finite or missing, which transformers would initialize at random.
    """
    if Path(name).is_dir():
        verify_checksums(Path(name))
    network, info = load_pretrained(auto_class, name, what, output_loading_info=True, use_safetensors=True, **kwargs)
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    wrong = {key for key in wrong if not key.startswith(may_lack)} if may_lack else wrong
    if wrong:
        raise ValueError(f"{name} has no weights that fit for {shortened(sorted(wrong))}: is it trained, and whole?")
    check_finite(network.state_dict(), name)
    return network.eval()


def load_pretrained(auto_class: Any, name: str, what: str, **kwargs: Any) -> Any:
    """Call `auto_class.from_pretrained(name, **kwargs)`.

    Raises:
        FileNotFoundError: If it cannot be loaded as `what`; says what to name instead.
        ValueError: If a file of it is damaged.
    """
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its reports of many lines
    try:
        # Without trust_remote_code, transformers asks on the terminal whether to run a model's own code.
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # it may raise anything for files that are damaged
        kind = FileNotFoundError if isinstance(error, (OSError, ValueError)) else ValueError
        raise kind(
            f"{name} cannot be loaded as {what} ({brief(error)}): name a folder written by save_pretrained, with "
            "config.json, model.safetensors and, for a classifier, preprocessor_config.json."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def brief(error: Exception) -> str:
    """Return the beginning of an error's text; errors of networks list every key."""
    return textwrap.shorten(str(error), 160) or type(error).__name__
