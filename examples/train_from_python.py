"""Train a small model on the digits from Python: `python examples/train_from_python.py [OUTPUT_DIR [STEPS]]`.

It saves a pipeline and a sampled three; 1,000 steps make good digits.
"""

import sys

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.training.config import RunArguments, TrainingConfig, TrainingSet
from sdt_diffusion.training.loop import train
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.optimizer import OptimizationArguments
from sdt_diffusion.training.run import TrainingRun


def main(output_dir="outputs/from_python", steps=20):
    """Train, sample and save."""
    data = open_training_data(DataArguments(dataset="digits"), vae_name=None, default_sample_size=8, seed=0)
    model = SDTTransformer2DModel.from_preset("SDT-digits", num_layers=2)
    objective = build_objective(ObjectiveArguments(objective="flow"))
    settings = {"train_batch_size": 64, "mixed_precision": "no", "report_to": "none"}
    config = TrainingConfig(
        RunArguments(output_dir=output_dir, max_train_steps=int(steps), **settings),
        OptimizationArguments(learning_rate=1e-3),
    )
    run = TrainingRun(model, "transformer", TrainingSet(data.images, data.augment), config)
    train(run, DiffusionLoss(objective, class_dropout_prob=0.1))

    pipe = SDTPipeline(run.trained_model.eval(), objective.sampling_scheduler(pixels=True), guidance_scale=1.5)
    pipe(3, num_inference_steps=10).images[0].resize((64, 64)).save(run.output_dir / "three.png")
    pipe.save_pretrained(run.output_dir / "pipeline")
    print(f"Saved three.png and the pipeline to {run.output_dir}.")
    run.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
