"""Save the statistics of a reference: `python eval/make_reference.py --help`."""

from sdt_diffusion.evaluation.make_reference import main

if __name__ == "__main__":
    main()
