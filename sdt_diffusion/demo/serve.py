"""Open a page on which a pipeline samples, and shows how far each of its heads looks from a patch.

    sdt-diffusion demo outputs/digits
    sdt-diffusion demo outputs/digits --port 7000 --guidance apg --guidance_scale 2

The first word is the folder or the Hub name. The page needs gradio, `pip install "sdt_diffusion[demo]"`, and no
network. What is given of sampling is what the page opens with. Ctrl-C ends it.
"""

import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..sampling.settings import PipelineArguments, default_device, load_pipeline
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import shorten_path
from ..utils.ranges import between


@dataclass(kw_only=True)
class DemoArguments(PipelineArguments):
    """What to show, and where."""

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on; 0.0.0.0 lets other machines see the page, without a password."},
    )
    port: int | None = field(
        default=None, metadata={"help": "Port; the first free one from 7860 by default."} | between(1, 65_535)
    )
    device: str | None = field(default=None, metadata={"help": "Torch device; a GPU if there is one by default."})
    share: bool = field(
        default=False, metadata={"help": "Also open the page to the internet through gradio's servers."}
    )


def check_gradio() -> None:
    """Refuse to go on without gradio.

    Raises:
        ValueError: Says how to install it.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The page needs gradio: pip install "sdt_diffusion[demo]"')


def open_page(args: DemoArguments):
    """Load the pipeline, and serve its page in the background.

    Returns:
        The page, gradio's `Blocks`; `page.local_url` is its address, and `page.close()` ends it.

    Raises:
        FileNotFoundError: If the folder holds no pipeline.
        OSError: If the port is taken.
        ValueError: If gradio is missing, or the model or a setting cannot be used.
    """
    check_gradio()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio when it is imported
    pipe = load_pipeline(args, args.device or default_device())
    from .page import CSS, build_page

    page = build_page(pipe, shorten_path(args.model).removeprefix(".../"), args.seed)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        css=CSS,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
    )
    return page


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` is the command line's by default."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    (args,) = parse_arguments((DemoArguments,), words, description=__doc__)
    page = open_page(args)
    print(f"The page is at {page.share_url or page.local_url} until Ctrl-C.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("Closed.")
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    main()
