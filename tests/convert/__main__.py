"""Measure converted models of published sizes against the formulas of their sources; prints the table of the docs.

python -m tests.convert                       # S/2 and S/1: a minute
python -m tests.convert --size XL             # XL/2 and XL/1: 8 GiB, several minutes

Only the class table is smaller than the published one: 10 classes.
"""

import argparse

from sdt_diffusion.convert.assemble import READERS, build_pipeline
from tests.convert.references import random_reference
from tests.convert.test_convert import PUBLISHED, difference

#: Width, blocks and heads.
SIZES = {"S": (384, 12, 6), "XL": (1152, 28, 16)}
LIGHTNING = {"options": PUBLISHED, "learn_sigma": False, "patch": 1, "channels": 32}
KINDS = {"dit": {}, "sit": {}, "lightningdit": LIGHTNING}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S")
    size = parser.parse_args().size
    print("| source | spatial_decay context | none |\n|---|---|---|")
    for kind, options in KINDS.items():
        reference = random_reference(*SIZES[size], side=16, flow=kind != "dit", **options)
        pipes = (build_pipeline(READERS[kind](reference.state_dict()), decay) for decay in ("context", "none"))
        found = [f"{difference(reference, pipe):.1e}" for pipe in pipes]
        print(f"| {kind}-{size}/{options.get('patch', 2)} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
