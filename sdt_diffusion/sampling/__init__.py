"""Sample images from a saved pipeline: settings, many samples, folders of samples, on all processes."""
