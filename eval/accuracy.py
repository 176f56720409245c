"""Measure the accuracy of an image classifier: `python eval/accuracy.py --help`."""

from sdt_diffusion.evaluation.accuracy import main

if __name__ == "__main__":
    main()
