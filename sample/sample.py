"""Sample images from a saved pipeline: `python sample/sample.py --help`."""

from sdt_diffusion.sampling.sample import main

if __name__ == "__main__":
    main()
