"""Initialize diffusion transformers as facebookresearch/DiT does."""

import math
import zlib
from collections.abc import Callable

import torch
from torch import nn

from ..attention import ContextAwareGate


def draw_seed() -> int:
    """Draw a seed for `initialize_weights` from torch's global generator."""
    return int(torch.randint(2**62, (), device="cpu"))


@torch.no_grad()
def initialize_weights(model: nn.Module, seed: int) -> None:
    """Initialize an `SDTTransformer2DModel`: Xavier linears, zero modulations and output; gates as their class says.

    Queries, keys and values are three layers here and one of 3 dim outputs in DiT, whose number of outputs narrows
    Xavier's distribution: they are initialized as parts of that one.

    Args:
        model: The model, changed in place.
        seed: Each parameter draws from this and its own name, so that models that differ in a part start with the
            other parts alike, and their comparison is paired.
    """
    draw = _draws_by_name(model, seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            draw(nn.init.xavier_uniform_, module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    head = model.wide_head
    for patches in [model.pos_embed] if head is None else [model.pos_embed, head.pos_embed]:
        draw(lambda kernel, **kw: nn.init.xavier_uniform_(kernel.flatten(1), **kw), patches.proj.weight)
        nn.init.zeros_(patches.proj.get_parameter("bias"))
    embed = model.time_class_embed
    for layer in (embed.class_embedder, embed.timestep_embedder.linear_1, embed.timestep_embedder.linear_2):
        draw(nn.init.normal_, layer.weight, std=0.02)
    for block in [*model.transformer_blocks, *(() if head is None else head.blocks)]:
        for linear in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
            bound = math.sqrt(6 / (linear.in_features + 3 * linear.out_features))
            draw(nn.init.uniform_, linear.weight, a=-bound, b=bound)
        if block.norm1.adaln == "single":
            nn.init.zeros_(block.norm1.table)
        else:
            nn.init.zeros_(block.norm1.linear.weight)
        if isinstance(block.attn.gate, ContextAwareGate):
            block.attn.gate.reset_parameters()
    for linear in (model.proj_out_1, model.proj_out_2, model.shared_modulation):
        if linear is not None:
            nn.init.zeros_(linear.weight)
    if embed.interval_embedder is not None:  # starts as a model without it
        draw(nn.init.normal_, embed.interval_embedder.linear_1.weight, std=0.02)
        nn.init.zeros_(embed.interval_embedder.linear_2.weight)
    if model.pos_embed.registers is not None:
        draw(nn.init.normal_, model.pos_embed.registers, std=0.02)
    for linear in model.skip_projections or ():  # starts as a model without long skips
        linear.weight.copy_(torch.eye(*linear.weight.shape))


def _draws_by_name(model: nn.Module, seed: int) -> Callable[..., None]:
    """Return a function that calls a function of `nn.init` for a parameter, with a generator of its own."""
    names = {parameter: name for name, parameter in model.named_parameters()}

    def draw(initialize: Callable[..., object], parameter: torch.Tensor, **options: float) -> None:
        if not parameter.is_meta:  # which has no values to draw
            own_seed = seed ^ zlib.crc32(names[parameter].encode())
            initialize(parameter, **options, generator=torch.Generator(parameter.device).manual_seed(own_seed))

    return draw


@torch.no_grad()
def initialize_meta(model: nn.Module) -> None:
    """Initialize the parameters that loading left without values, on the meta device, as a new model's.

    Args:
        model: A model of diffusers, which builds another one from its config; changed in place.
    """
    new = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    if new:
        initial = type(model).from_config(model.config).state_dict()
        model.load_state_dict({name: initial[name].to(new[name].dtype) for name in new}, strict=False, assign=True)
