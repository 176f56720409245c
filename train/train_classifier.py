"""Train an image classifier: `accelerate launch train/train_classifier.py --help`."""

from sdt_diffusion.training.train_classifier import main

if __name__ == "__main__":
    main()
