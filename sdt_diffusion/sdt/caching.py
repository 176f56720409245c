"""diffusers' caches of earlier steps, told what their defaults do not know of `SDTTransformer2DModel`."""

from dataclasses import replace
from typing import Any

from diffusers import FasterCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin

#: What TaylorSeer's lite mode leaves out at predicted steps, and what it predicts instead.
SKIPPED, PREDICTED = r"transformer_blocks\.\d+", "proj_out_2"
#: Inputs of which FasterCache leaves out the half of the null class.
BATCHED_INPUTS = ("hidden_states", "timestep", "class_labels", "decay_scale", "end_timestep")


class SDTCacheMixin(CacheMixin):
    """Enables diffusers' caches for models with `transformer_blocks`, labels and images."""

    def enable_cache(self, config: Any) -> None:
        """Enable a cache of diffusers; lite TaylorSeer and FasterCache get this model's names.

        Args:
            config: A config of diffusers, such as `TaylorSeerCacheConfig(use_lite_mode=True)`.

        Raises:
            ValueError: If it is no such config, a cache is enabled already, or the model has long skips, whose blocks
                take what a cache may leave out.
        """
        if self.config.long_skips:
            raise ValueError("A model with long_skips takes no cache: its blocks need the tokens of earlier ones.")
        if isinstance(config, TaylorSeerCacheConfig) and config.use_lite_mode:
            names = {"skip_predict_identifiers": [SKIPPED], "cache_identifiers": [PREDICTED]}
            config = replace(config, use_lite_mode=False, **names)
        elif isinstance(config, FasterCacheConfig):
            inputs = {"_unconditional_conditional_input_kwargs_identifiers": list(BATCHED_INPUTS)}
            config = replace(config, tensor_format="BCHW", **inputs)
        super().enable_cache(config)


def check_single_batch(model: Any) -> None:
    """Refuse a pass of one prediction where FasterCache would leave out half of it.

    Raises:
        ValueError: Says what to do.
    """
    config = getattr(model, "_cache_config", None)
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
        raise ValueError(
            "FasterCache leaves out the predictions of the null class, but this guidance makes none in the same pass: "
            "set is_guidance_distilled=True, or guide by the null class with a guidance_scale above 1."
        )
