import pytest
import torch
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader, Dataset

from sdt_diffusion.utils.arguments import exit_on_error, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too\nsmall"), "Error: too small"),
        (OSError(28, "No space left on device", "a/b"), "Error: [Errno 28] No space left on device: 'a/b'"),
        (ValueError(), "Error: ValueError"),
        (MemoryError("12 GB"), "Error: not enough memory, use smaller batches or images: 12 GB"),
        (torch.OutOfMemoryError("12 GB"), "Error: not enough memory, use smaller batches or images: 12 GB"),
        (
            RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."),
            "Error: a process of the data loader ended, perhaps for lack of memory: DataLoader worker (pid 5) is "
            "killed by signal: Killed.",
        ),
    ],
)
def test_errors_that_the_user_can_correct_end_in_one_line(error, line):
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise error
    assert caught.value.code == line  # which Python prints, and exits with 1


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_is_killed_as_it_hands_over_a_tensor_is_named(error):
    class Handle:
        def detach(self):
            raise error

    with pytest.raises(SystemExit) as caught, exit_on_error():
        reductions.rebuild_storage_fd(torch.UntypedStorage, Handle(), 4)
    assert caught.value.code.startswith("Error: a process of the data loader ended, perhaps for lack of memory: ")


@pytest.mark.parametrize("bug", [KeyError("a bug"), RuntimeError("a bug"), EOFError()])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)), exit_on_error():
        raise bug


def test_ctrl_c_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


class Broken(Dataset):
    """Raises an error of two lines for every image."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("images/1.png is damaged:\nit is cut")


def test_an_error_of_a_loaders_worker_is_its_own_line():
    with pytest.raises(SystemExit) as caught, exit_on_error():
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert caught.value.code == "Error: images/1.png is damaged: it is cut"


def test_messages_are_short():
    assert len(one_line(ValueError("x" * 5000))) < 1000
