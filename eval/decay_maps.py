"""Draw what attention's decay lets a network look at: `python eval/decay_maps.py --help`."""

from sdt_diffusion.evaluation.decay_maps import main

if __name__ == "__main__":
    main()
