import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; it runs kernels on the CPU then

import diffusers
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from hypothesis import settings

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel

settings.register_profile("default", deadline=None, max_examples=25)
settings.load_profile("default")
torch.set_num_threads(1)  # pytest-xdist runs a process per core

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_classes": 5,
}


@torch.no_grad()
def randomize(model, std=0.1, seed=0):
    """Move every parameter off its start, where zero modulations would hide the blocks."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * std)
    return model


@pytest.fixture(autouse=True)
def fresh_processes():
    """Let no test find accelerate's processes, precision or strategy as another one left them."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def make_model():
    """Build a tiny model with all parameters off their start."""

    def make(**overrides):
        torch.manual_seed(0)
        return randomize(SDTTransformer2DModel(**{**TINY, **overrides})).eval()

    return make


@pytest.fixture
def make_pipe(make_model):
    """Build a pixel-space pipeline around a tiny model."""

    def make(scheduler=None, **kwargs):
        names = {0: "ant", 1: "bee, honey bee", 2: "cat", 3: "dog", 4: "elk"}
        scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
        kwargs = {"id2label": names, **kwargs}
        pipe = SDTPipeline(kwargs.pop("transformer", None) or make_model(), scheduler, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def tiny_vae():
    """Return a random AutoencoderKL: 2x spatial compression, 4 latent channels."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()


@pytest.fixture
def tiny_dc_vae():
    """Return a random AutoencoderDC, whose latents have no variance: 2x spatial compression, 4 latent channels."""
    torch.manual_seed(0)
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.5,
    ).eval()


@pytest.fixture
def tiny_rae():
    """Return a random AutoencoderRAE: images of 16x16, 64 latent channels of 4x4, normalized at each place."""
    torch.manual_seed(0)
    return diffusers.AutoencoderRAE(
        encoder_hidden_size=64,  # one head
        encoder_patch_size=8,
        encoder_num_hidden_layers=1,
        encoder_input_size=32,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        patch_size=4,
        latents_mean=torch.randn(64, 4, 4),
        latents_std=torch.rand(64, 4, 4) + 0.5,
    ).eval()
