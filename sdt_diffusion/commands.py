"""The command `sdt-diffusion`, whose first word names what to do."""

import difflib
import importlib
import sys
from collections.abc import Sequence

#: Command -> module with a `main(argv)`, and what it does. Modules are imported when their command is called.
COMMANDS = {
    "convert": (
        "sdt_diffusion.convert.__main__",
        "pipelines from models of DiT, SiT, LightningDiT, diffusers; and back",
    ),
    "demo": ("sdt_diffusion.demo.serve", "a page that samples, and shows how far each head looks from a patch"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; `argv` is the command line's by default."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
        return
    lines = [f"  {name:12} {text}" for name, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: sdt-diffusion COMMAND ...", *lines, "sdt-diffusion COMMAND --help tells more."])
    if words in (["--help"], ["-h"]):
        print(usage)
        sys.exit(0)
    if words:
        similar = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f" (did you mean {similar[0]}?)" if similar else f"; the commands are {', '.join(COMMANDS)}"
        sys.exit(f"sdt-diffusion: error: unknown command {words[0]}{hint}")
    sys.exit(usage)


if __name__ == "__main__":
    main()
