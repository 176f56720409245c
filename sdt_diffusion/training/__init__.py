"""Train: the loop, runs and their checkpoints, objectives, recipes, and the training scripts."""
