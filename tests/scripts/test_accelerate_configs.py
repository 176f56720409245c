"""train/accelerate/*.yaml, as `accelerate launch` understands them."""

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from sdt_diffusion import SDTTransformer2DModel
from tests.scripts.process import ROOT


def understood(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = ROOT / "train" / "accelerate" / name
    args = launch_command_parser().parse_args(["--config_file", str(config), "--num_processes", "2", "script.py"])
    return _validate_launch_command(args)[0]


def test_ddp(monkeypatch):
    args = understood("ddp.yaml", monkeypatch)
    assert args.multi_gpu
    assert not args.use_fsdp
    assert (args.num_processes, args.mixed_precision) == (2, "bf16")


def test_fsdp2_wraps_the_blocks(monkeypatch):
    args = understood("fsdp2.yaml", monkeypatch)
    env = prepare_multi_gpu_env(args)
    assert (env["ACCELERATE_USE_FSDP"], env["FSDP_VERSION"]) == ("true", "2")
    assert env["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert env["FSDP_TRANSFORMER_CLS_TO_WRAP"] in SDTTransformer2DModel._no_split_modules
    assert env["FSDP_RESHARD_AFTER_FORWARD"] == "true"
