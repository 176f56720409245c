"""Measure how many samples show their class: `python eval/label_accuracy.py --help`."""

from sdt_diffusion.evaluation.label_accuracy import main

if __name__ == "__main__":
    main()
