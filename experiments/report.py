"""Write the results of studies into pages: `python experiments/report.py --help`."""

from sdt_diffusion.experiments.report import main

if __name__ == "__main__":
    main()
