"""Run a study: `python experiments/run.py --help`."""

from sdt_diffusion.experiments.runner import main

if __name__ == "__main__":
    main()
