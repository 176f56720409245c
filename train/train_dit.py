"""Train a class-conditional diffusion transformer: `accelerate launch train/train_dit.py --help`."""

from sdt_diffusion.training.train_dit import main

if __name__ == "__main__":
    main()
