"""Compare samples of many settings with a reference: `python eval/sweep.py --help`."""

from sdt_diffusion.evaluation.sweep import main

if __name__ == "__main__":
    main()
