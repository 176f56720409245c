"""Test the command of the demo, without gradio."""

import importlib.util
import re
import threading

import pytest

from sdt_diffusion import commands
from sdt_diffusion.demo import serve


class Page:
    share_url, local_url, closed = None, "http://127.0.0.1:7860/", 0

    def close(self, verbose):
        self.closed += 1


def test_the_command_says_where_the_page_is_and_ends_on_ctrl_c(monkeypatch, capsys):
    page, given = Page(), []

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "open_page", lambda args: given.append(args) or page)
    monkeypatch.setattr(threading.Event, "wait", interrupted)
    commands.main(["demo", "some/model", "--port", "7000", "--seed", "3", "--guidance", "apg"])
    assert capsys.readouterr().out == "The page is at http://127.0.0.1:7860/ until Ctrl-C.\nClosed.\n"
    (args,) = given
    assert (args.model, args.port, args.seed, args.guidance) == ("some/model", 7000, 3, "apg")
    assert (args.host, args.share) == ("127.0.0.1", False)
    assert page.closed == 1


def test_without_gradio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'Error: The page needs gradio: pip install "sdt_diffusion\[demo\]"'):
        serve.main(["nowhere"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["model", "--port", "0"], "port must be at least 1"),
        (["model", "--port", "70000"], "port must be .*at most 65535"),
        (["--port", "7000"], "--model"),
        (["model", "--nonsense", "1"], "unknown argument"),
    ],
)
def test_wrong_command_lines_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        serve.main(argv)
    assert re.search(message, capsys.readouterr().err)
