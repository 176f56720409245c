"""What training on ImageNet and sampling from it cost: the tables of docs/imagenet.md.

Arithmetic, parameters and bytes on disk are computed: networks are counted on the meta device, without weights. Hours
are that arithmetic at a speed that you name, nothing else: measure yours by training for a hundred steps. Activations
are measured, as the bytes that autograd keeps for the backward pass on a CPU.

    python benchmarks/imagenet.py --tflops 100                                # a minute on one core
    python benchmarks/imagenet.py --models SDT-S/2 --resolutions 256 --no_activations
"""

import argparse

import torch
from diffusers import AutoencoderKL

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.attention_processor import SDTAttnProcessor
from sdt_diffusion.evaluation.cost import count_cost

IMAGES = 1_281_167
SAMPLES = 50_000
BATCH_SIZE = 256
#: DiT's shorter and longer training.
STEPS = (400_000, 7_000_000)
SAMPLING_STEPS = (250, 50)
VAE_SCALE, LATENT_CHANNELS = 8, 4
MODELS = ("SDT-S/2", "SDT-B/2", "SDT-L/2", "SDT-XL/2")
#: That of Stable Diffusion 1 and 2, which DiT uses too (stabilityai/sd-vae-ft-*).
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def network_cost(preset, resolution, spatial_decay="context"):
    """Parameters, and multiply-adds of one forward pass for one image."""
    side = resolution // VAE_SCALE
    with torch.device("meta"):
        model = SDTTransformer2DModel.from_preset(preset, sample_size=side, spatial_decay=spatial_decay).to("meta")
        return count_cost(model.eval(), *model_inputs(1, side))


def vae_costs(resolution):
    """Cost of the VAE's encoder and decoder for one image."""
    side = resolution // VAE_SCALE
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE_CONFIG)
        encoder = count_cost(vae.encoder, torch.zeros(1, 3, resolution, resolution))
        return encoder, count_cost(vae.decoder, torch.zeros(1, LATENT_CHANNELS, side, side))


def model_inputs(batch_size, side):
    noisy = torch.zeros(batch_size, LATENT_CHANNELS, side, side)
    return noisy, torch.zeros(batch_size), torch.zeros(batch_size, dtype=torch.int64)


def kept_bytes(preset, resolution, spatial_decay, num_layers, batch_size, gradient_checkpointing=False):
    """Bytes that a forward pass under bf16 autocast keeps for the backward pass, on a CPU.

    Attention with decay is that of the backend `dense`, which keeps the attention maps.
    """
    side = resolution // VAE_SCALE
    model = SDTTransformer2DModel.from_preset(
        preset, sample_size=side, spatial_decay=spatial_decay, num_layers=num_layers
    ).train()
    if spatial_decay != "none":
        model.set_attn_processor(SDTAttnProcessor("dense"))
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = model(*model_inputs(batch_size, side)).sample  # noqa: F841  (as long as it lives, all that is kept does)
    return sum(storages.values())


def activation_bytes(preset, resolution, spatial_decay):
    """Bytes kept for each image of a batch: without gradient checkpointing, and with it.

    All blocks are alike, so one and two of them tell of any number; and the second image of a batch tells what an
    image adds to weights and constants.
    """

    def per_image(num_layers, **kwargs):
        one, two = (kept_bytes(preset, resolution, spatial_decay, num_layers, count, **kwargs) for count in (1, 2))
        return two - one

    depth = SDTTransformer2DModel.preset_config(preset)["num_layers"]
    first, second = per_image(1), per_image(2)
    first_input, second_input = (per_image(layers, gradient_checkpointing=True) for layers in (1, 2))
    all_inputs = first_input + (depth - 1) * (second_input - first_input)
    block = second - first  # with checkpointing, one block at a time is computed again
    return first + (depth - 1) * block, all_inputs + block


def latent_cache_bytes(resolution, images=IMAGES):
    """Mean and std of the latents of images and their mirrors in fp16, and int64 labels."""
    return images * (2 * 2 * LATENT_CHANNELS * (resolution // VAE_SCALE) ** 2 * 2 + 8)


def training_flops(multiply_adds, images):
    """Operations, two a multiply-add; the backward pass takes twice the forward's."""
    return 2 * 3 * multiply_adds * images


def sampling_flops(multiply_adds, steps, samples=SAMPLES):
    """Operations of a sampler of one evaluation a step, which guidance doubles."""
    return 2 * multiply_adds * 2 * steps * samples


def print_table(title, header, rows):
    print(f"{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print()


def print_arithmetic(costs):
    rows = []
    for (preset, resolution), cost in costs.items():
        plain = network_cost(preset, resolution, "none")
        work = [training_flops(cost.multiply_adds, BATCH_SIZE * steps) / 1e18 for steps in STEPS]
        counts = f"{cost.multiply_adds / 1e9:.2f}", f"{plain.multiply_adds / 1e9:.2f}"
        step = training_flops(cost.multiply_adds, BATCH_SIZE) / 1e15
        rows.append((preset, resolution, f"{cost.parameters / 1e6:.1f}M", *counts, f"{step:.3g}", *map(rounded, work)))
    print_table(
        "Computed. Multiply-adds (10^9) are those of a forward pass for one image, with `context` and of a plain DiT. "
        f"A training step is {BATCH_SIZE} images at three times that, two operations a multiply-add.",
        (
            *("model", "pixels", "parameters", "multiply-adds", "DiT's", "PFLOP a step"),
            *(f"EFLOP, {name(steps)} steps" for steps in STEPS),
        ),
        rows,
    )


def print_hours(costs, vaes, tflops):
    def hours(flops):
        return rounded(flops / (tflops * 1e12) / 3600)

    rows = []
    for (preset, resolution), cost in costs.items():
        training = [hours(training_flops(cost.multiply_adds, BATCH_SIZE * steps)) for steps in STEPS]
        sampling = [hours(sampling_flops(cost.multiply_adds, steps)) for steps in SAMPLING_STEPS]
        rows.append((preset, resolution, *training, *sampling))
    print_table(
        f"Computed, not measured: hours at {tflops:g} TFLOP/s, sustained, of all devices together. Sampling is of "
        f"{SAMPLES:,} images with guidance, two network evaluations a step.",
        (
            *("model", "pixels", *(f"training, {name(steps)} steps" for steps in STEPS)),
            *(f"sampling, {steps} steps" for steps in SAMPLING_STEPS),
        ),
        rows,
    )
    rows = []
    for resolution, (encoder, decoder) in vaes.items():
        counts = [f"{cost.multiply_adds / 1e9:.1f}" for cost in (encoder, decoder)]
        encoding = hours(2 * encoder.multiply_adds * 2 * IMAGES)
        rows.append((resolution, *counts, encoding, hours(2 * decoder.multiply_adds * SAMPLES)))
    print_table(
        f"Computed, not measured: the VAE's multiply-adds (10^9) for one image, and hours at {tflops:g} TFLOP/s.",
        ("pixels", "encoder", "decoder", f"encoding {IMAGES:,} images and mirrors", f"decoding {SAMPLES:,} samples"),
        rows,
    )


def print_bytes(costs, vaes):
    parameters = {preset: cost.parameters for (preset, _), cost in costs.items()}
    vae = sum(cost.parameters for cost in next(iter(vaes.values())))
    print_table(
        "Computed. GB (10^9 bytes) in fp32. On a device: weights, gradients, AdamW's two moments and the averages. In "
        f"a checkpoint: all but the gradients. In a pipeline: weights, and {4 * vae / 1e9:.2f} besides for the VAE.",
        ("model", "on a device, one EMA", "two", "in a checkpoint, one EMA", "two", "in a pipeline"),
        [
            (preset, *(f"{4 * copies * count / 1e9:.2f}" for copies in (5, 6, 4, 5, 1)))
            for preset, count in parameters.items()
        ],
    )
    rows = []
    for resolution in vaes:
        cache = f"{latent_cache_bytes(resolution, 1) / 1e3:.1f}", f"{latent_cache_bytes(resolution) / 1e9:.1f}"
        rows.append((resolution, *cache, f"{SAMPLES * 3 * resolution**2 / 1e9:.1f}"))
    print_table(
        "Computed. Bytes of data.",
        ("pixels", "latents of one image, KB", "cache of latents, GB", f"{SAMPLES:,} samples, uint8, GB"),
        rows,
    )


def print_activations(runs):
    rows = []
    for run in runs:
        counts = [*activation_bytes(*run, "context"), *activation_bytes(*run, "none")]
        rows.append((*run, *(f"{count / 1e6:,.0f}" for count in counts)))
    print_table(
        "Measured on a CPU with one and two blocks and images, and extended to all blocks. MB (10^6 bytes) kept for "
        "the backward pass for each image of a batch, under bf16 autocast, with the attention of accelerators.",
        ("model", "pixels", "`context`", "with gradient checkpointing", "DiT", "with gradient checkpointing"),
        rows,
    )


def rounded(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def name(steps):
    return f"{steps // 1_000_000}M" if steps >= 1_000_000 else f"{steps // 1000}k"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets")
    parser.add_argument("--resolutions", nargs="+", type=int, default=[256, 512], help="sides of the images in pixels")
    parser.add_argument("--tflops", type=float, default=100, help="sustained, of all devices together, for the hours")
    parser.add_argument("--no_activations", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    runs = [(preset, resolution) for resolution in args.resolutions for preset in args.models]
    costs = {run: network_cost(*run) for run in runs}
    vaes = {resolution: vae_costs(resolution) for resolution in args.resolutions}
    print_arithmetic(costs)
    print_hours(costs, vaes, args.tflops)
    print_bytes(costs, vaes)
    if not args.no_activations:
        print_activations(runs)


if __name__ == "__main__":
    main()
