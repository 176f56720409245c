"""Compare samples with a reference: `python eval/fid.py --help`."""

from sdt_diffusion.evaluation.fid import main

if __name__ == "__main__":
    main()
