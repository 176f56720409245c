"""Sample images from a saved pipeline: how to sample, many samples, folders of samples on all processes."""
