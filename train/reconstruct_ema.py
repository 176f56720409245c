"""Make the pipeline of another average of the weights: `python train/reconstruct_ema.py --help`."""

from sdt_diffusion.training.reconstruct_ema import main

if __name__ == "__main__":
    main()
