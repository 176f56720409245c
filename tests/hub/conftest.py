from types import SimpleNamespace

import pytest

from sdt_diffusion.hub import describe_run
from sdt_diffusion.hub.run_record import write_record
from tests.hub.flowers import CONFIG, FiveImages


@pytest.fixture
def finished_run(tmp_path, make_pipe):
    """A pipeline's folder with the record of its run, and everything that a run leaves besides."""
    pipe = make_pipe()
    folder = tmp_path / "flowers"
    pipe.save_pretrained(folder)
    command = "accelerate launch train/train_dit.py --dataset flowers"
    record = describe_run(command, CONFIG, FiveImages(range(40)), [pipe.transformer], 100, 4, 1)
    write_record(folder, record)
    for name in (
        *("checkpoint-100/transformer/model.safetensors", "logs/events.json", "samples/step-1.png"),
        *("fid.samples/0.npy", ".results.partial.json", "transformer/.hidden", "reference.safetensors"),
        *("training_config.yaml", "samples.png", "log.jsonl"),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"something")
    return SimpleNamespace(folder=folder, pipe=pipe, record=record)
