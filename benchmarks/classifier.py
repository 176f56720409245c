"""Speed of the classifier: `context` (SDT-H) against `fixed` (RMT), and what both cost in arithmetic.

All models take turns in one process, so that noise of the machine affects them alike; compare medians and ratios.
Multiply-adds are counted over convolutions and matrix products, attention among them, and given in 2^30, as
RMT's published figures are, and as GFLOPs, 10^9 operations, two a multiply-add.

    python benchmarks/classifier.py                                 # SDT-H-T, 224x224, batch 1
    python benchmarks/classifier.py --preset SDT-H-B --rounds 5
"""

import argparse
import statistics

import torch
from timing import keep_freed_memory, timed
from tqdm import tqdm

from sdt_diffusion.classification import SDTHNetwork
from sdt_diffusion.evaluation.cost import count_cost
from sdt_diffusion.sdt_h.network import preset_config

BASELINE = "fixed"


def build_network(preset, spatial_decay, decomposed=None):
    """Build a classifier; `decomposed` is the preset's by default."""
    torch.manual_seed(0)
    options = {} if decomposed is None else {"decomposed": decomposed}
    return SDTHNetwork(**preset_config(preset, spatial_decay=spatial_decay, **options)).eval()


def print_cost(preset, size):
    """Print parameters and arithmetic of a preset with each kind of decay."""
    print("| | parameters | multiply-adds / 2^30 | GFLOPs |\n|---|---|---|---|")
    for label, spatial_decay, decomposed in (
        ("context", "context", None),
        ("fixed", "fixed", None),
        ("RMT: fixed, larger ones decomposed in stage 3 too", "fixed", (True, True, preset != "SDT-H-T", False)),
    ):
        cost = count_cost(build_network(preset, spatial_decay, decomposed), torch.zeros(1, 3, size, size))
        print(f"| {label} | {cost.parameters:,} | {cost.gibi_multiply_adds:.2f} | {cost.gflops:.2f} |")


def main():
    """Run the benchmark and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="SDT-H-T")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()

    kind = "compiled" if args.compile else "eager"
    print(
        f"{args.preset}, {args.size}x{args.size}, batch {args.batch_size}, {args.device}, {args.threads} threads, "
        f"{kind}"
    )
    print_cost(args.preset, args.size)
    print(f"\ntorch {torch.__version__}, medians of {args.rounds} interleaved rounds, ratios to `{BASELINE}`\n")
    inputs = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)

    def build_step(spatial_decay):
        network = build_network(args.preset, spatial_decay).to(args.device)
        run = torch.compile(network, fullgraph=True) if args.compile else network

        def step():
            with torch.no_grad():
                run(inputs)

        return step

    steps = {name: build_step(name) for name in (BASELINE, "context", "none")}
    for step in steps.values():
        for _ in range(3):
            step()
    times = {name: [] for name in steps}
    for _ in tqdm(range(args.rounds), leave=False):
        for name, step in steps.items():
            times[name].append(timed(step, args.device))
    print("| forward | ms | ratio |\n|---|---|---|")
    baseline = statistics.median(times[BASELINE])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median * 1e3:.0f} | {median / baseline:.3f} |")


if __name__ == "__main__":
    main()
