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
from sdt_diffusion.data import DataArguments, load_images
from sdt_diffusion.generation import class_labels_for, describe_sampling, generate, stack_samples
from sdt_diffusion.metrics.label_accuracy import svm_label_accuracy
from sdt_diffusion.training.arguments import parse_arguments


@dataclass
class EvaluationArguments:
    """What to sample."""

    model: str = field(metadata={"help": "Folder of a saved pipeline."})
    num_images: int = field(default=1000, metadata={"help": "Samples, the classes in turn."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    guidance_scale: float = field(default=1.5, metadata={"help": "Classifier-free guidance."})
    num_inference_steps: int = field(default=25, metadata={"help": "Sampling steps."})
    batch_size: int = field(default=250, metadata={"help": "Images at a time."})


def main(argv):
    args, data_args = parse_arguments((EvaluationArguments, DataArguments), argv, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.model).to(device)
    resolution = data_args.resolution or pipe.transformer.config.sample_size * pipe.vae_scale_factor
    images = load_images(data_args, resolution)
    sampling = {
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
    }
    labels = class_labels_for(args.num_images, range(images.num_classes))
    samples = stack_samples(generate(pipe, labels, batch_size=args.batch_size, output_type="np", **sampling))
    accuracy = svm_label_accuracy(images, samples, labels)
    print(
        json.dumps(
            {"label_accuracy": accuracy, "num_images": len(labels), "sampler": describe_sampling(pipe, sampling)}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
