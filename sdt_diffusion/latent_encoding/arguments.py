"""How to encode a data set."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..command_line import require_at_least


@dataclass
class EncodingArguments:
    """What to encode with, and where to."""

    output_dir: Path = field(metadata={"help": "Folder of the cache."})
    pretrained_vae_model_name_or_path: str | None = field(
        default=None, metadata={"help": "AutoencoderKL or AutoencoderDC, a folder or a name on the Hub."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read tar, parquet or the Hub's files in passing; otherwise `datasets` copies them first."},
    )
    batch_size: int = field(
        default=32, metadata={"help": "Images that are encoded at a time, and then their mirrors."}
    )
    shard_size: int = field(default=4096, metadata={"help": "Images in a file; a kill costs at most one a process."})
    dtype: Literal["float16", "float32"] = field(
        default="float16",
        metadata={"help": "Of the files; float16 is finer than the bfloat16 that networks train in."},
    )
    vae_dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the VAE."})
    max_unreadable: int = field(
        default=10, metadata={"help": "Images that may be left out, because they cannot be decoded, before it stops."}
    )
    num_threads: int = field(default=4, metadata={"help": "Threads of each process that decode images."})
    verify: bool = field(
        default=False, metadata={"help": "Encode nothing, but compare --output_dir with its checksums."}
    )

    def __post_init__(self):
        require_at_least(self, 1, "batch_size", "shard_size", "num_threads")
        require_at_least(self, 0, "max_unreadable")
        if not self.verify and self.pretrained_vae_model_name_or_path is None:
            raise ValueError("--pretrained_vae_model_name_or_path must name the VAE to encode with.")
