"""How many samples of a pipeline an RBF SVM, trained on the real images, takes for the class they were made for.

    python eval/label_accuracy.py --model outputs/digits --dataset digits

For small images and data sets only; the same measure train/train_dit.py reports at the end of the digits run.
"""

import json
import sys
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)
from sdt_diffusion.command_line import parse_arguments, require_at_least
from sdt_diffusion.data import DataArguments, load_images
from sdt_diffusion.evaluation.label_accuracy import label_accuracy


@dataclass
class EvaluationArguments:
    """What to sample."""

    model: str = field(metadata={"help": "Folder of a saved pipeline."})
    num_images: int = field(default=1000, metadata={"help": "Samples, the classes in turn."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    guidance_scale: float = field(default=1.5, metadata={"help": "Classifier-free guidance."})
    num_inference_steps: int = field(default=25, metadata={"help": "Sampling steps."})
    batch_size: int = field(default=250, metadata={"help": "Images at a time."})

    def __post_init__(self):
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "num_images", "num_inference_steps", "batch_size")


def main(argv):
    args, data_args = parse_arguments((EvaluationArguments, DataArguments), argv, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.model).to(device)
    images = load_images(data_args, pipe.transformer.config.sample_size * pipe.vae_scale_factor)
    sampling = {
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
    }
    print(json.dumps(label_accuracy(pipe, images, args.num_images, sampling, args.batch_size)))


if __name__ == "__main__":
    main(sys.argv[1:])
