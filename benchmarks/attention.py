"""Speed and memory of attention with decay, by backend, against torch's plain attention without any.

All candidates take turns in one process; compare ratios rather than times. `far` gates are those that RMT's heads
start with; `local` ones decay so fast that about a sixth of the tiles is needed at 4,096 tokens. Training is forward
and backward, with all gradients. The floor is the time that the matrix products of plain attention would take at the
speed at which this machine multiplies large matrices.

    python benchmarks/attention.py                                          # 256, 1,024 and 4,096 tokens
    python benchmarks/attention.py --sides 16 --batch_sizes 8 --output attention.json
    python benchmarks/attention.py --plot attention.json --picture attention.png   # draw what was measured
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from timing import describe_machine, in_turns, keep_freed_memory, print_table, timed, write_results

from sdt_diffusion.attention import BACKENDS, spatial_decay_attention
from sdt_diffusion.attention.blockwise import MIN_PRUNED_TOKENS
from sdt_diffusion.attention.gate import multi_scale_exponents
from sdt_diffusion.attention.pruning import tile_densities

BASELINE = "sdpa, no decay"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Backends that a device can use, without those that are tests of the others.
BY_DEVICE = {"cpu": ("blockwise", "dense"), "cuda": ("triton", "dense", "factored", "flex")}
#: Dense backends keep tokens^2 numbers for each head; more than these tokens would not fit everywhere.
MAX_DENSE_TOKENS = 4096


def build_inputs(side, batch_size, args):
    """Return queries, keys and values as a model has them, (B, N, h, d) in memory, and gates of both kinds."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, side * side, args.heads, args.head_dim)
    tensors = [torch.randn(shape, generator=generator).to(args.device, DTYPES[args.dtype]) for _ in range(3)]
    tensors = [x.transpose(1, 2).requires_grad_() for x in tensors]
    spread = 0.75 + 0.5 * torch.rand(batch_size, args.heads, side * side, generator=generator)
    far = torch.tensor([torch.log1p(torch.tensor(-(2.0**-a))) for a in multi_scale_exponents(args.heads, 2.0, 6.0)])
    gates = {"far": far[:, None] * spread, "local": args.local_gate * spread}
    gates = {name: gate.to(args.device).requires_grad_() for name, gate in gates.items()}
    return tensors, gates, torch.ones(args.heads, device=args.device, requires_grad=True)


def candidates(side, batch_size, args):
    """Return, by name, a function that attends and the tensors that its gradients are needed for."""
    tensors, gates, alpha = build_inputs(side, batch_size, args)
    found = {BASELINE: (lambda: F.scaled_dot_product_attention(*tensors), tensors)}
    plain = {"grid_size": (side, side), "variant": "none"}
    found["none"] = (lambda: spatial_decay_attention(*tensors, None, None, **plain), tensors)
    names = args.backends or BY_DEVICE[torch.device(args.device).type]
    for backend in names:
        if side * side > MAX_DENSE_TOKENS and backend in ("dense", "reference"):
            continue
        for gate_name, gate in gates.items():
            for eps in (0.0, args.eps) if backend in ("blockwise", "triton") and side > 16 else (0.0,):
                if eps and backend == "blockwise" and side * side < MIN_PRUNED_TOKENS:
                    continue  # computed whole
                if gate_name == "local" and not eps:
                    continue  # takes as long as with other gates

                def attend(backend=backend, gate=gate, eps=eps):
                    grid, options = (side, side), {"backend": backend, "prune_eps": eps}
                    return spatial_decay_attention(*tensors, gate, alpha, grid, **options)

                pruned = f", pruned, {gate_name} gates" if eps else ""
                found[f"{backend}{pruned}"] = (attend, [*tensors, gate, alpha])
    return found


def step_of(attend, wanted, training):
    """Return a function that attends once, with all gradients if it trains."""

    def forward():
        with torch.no_grad():
            attend()

    weights = torch.randn_like(attend())

    def train():
        torch.autograd.grad(attend(), wanted, weights)

    return train if training else forward


def peak_mib(step, device):
    """Return the most memory that a step allocates on a GPU."""
    if torch.device(device).type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed(step, device)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def density_of(attend):
    """Return the fraction of tiles that was computed; all if nothing was pruned."""
    with tile_densities() as densities, torch.no_grad():
        attend()
    return float(densities[0]) if densities else None


def flops_per_second(args):
    """Measure how fast the machine multiplies large matrices of this type."""
    size = 8192 if torch.device(args.device).type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=args.device, dtype=DTYPES[args.dtype]) for _ in range(2))
    seconds = min(timed(lambda: a @ b, args.device) for _ in range(7))
    return 2 * size**3 / seconds


def measure(side, batch_size, args, speed):
    """Return the rows of one grid."""
    found, rows = candidates(side, batch_size, args), []
    densities = {name: density_of(attend) for name, (attend, _) in found.items()}
    for training in (False, True):
        steps = {name: step_of(attend, wanted, training) for name, (attend, wanted) in found.items()}
        mode = "training" if training else "forward"
        medians = in_turns(steps, args.rounds, args.device, f"{side * side} tokens, {mode}")
        products = 7 if training else 2  # S and PV; the backward pass has S again, dP, dV, dQ and dK
        floor = products * 2 * batch_size * args.heads * side**4 * args.head_dim / speed
        for name, seconds in medians.items():
            rows.append(
                {
                    "tokens": side * side,
                    "batch": batch_size,
                    "": mode,
                    "attention": name,
                    "ms": f"{seconds * 1e3:.2f}",
                    "ratio": f"{seconds / medians[BASELINE]:.3f}",
                    "times the floor": f"{seconds / floor:.2f}",
                    "density": None if densities[name] is None else f"{densities[name]:.3f}",
                    "MiB": peak_mib(steps[name], args.device),
                }
            )
    return rows


def plot(results, path):
    """Draw time against tokens, relative to plain attention, for forward passes and for training."""
    rows = results["rows"]
    names = dict.fromkeys(row["attention"] for row in rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, mode in zip(axes, ("forward", "training"), strict=True):
        for name in names:
            own = [row for row in rows if row["attention"] == name and row[""] == mode]
            points = [(row["tokens"], float(row["ratio"])) for row in own]
            style = {"color": "black", "linestyle": "--"} if name == BASELINE else {"marker": "o"}
            axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set(xscale="log", yscale="log", title=mode, xlabel="tokens")
        axis.set_xticks(sorted({row["tokens"] for row in rows}), sorted({row["tokens"] for row in rows}), minor=False)
        axis.minorticks_off()
        ticks = (0.25, 0.5, 1, 2, 4)
        axis.set_yticks(ticks, ticks)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time / plain attention's")
    axes[1].legend(fontsize=8)
    figure.suptitle(results["machine"]["device"])
    figure.savefig(path, dpi=130)


def main():
    """Run the benchmark and print a table, or draw one that was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64], help="rows of the square grids")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 2, 1], help="one for each grid")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on CPUs, bf16 on GPUs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: those that the device can use")
    parser.add_argument("--eps", type=float, default=1e-4, help="share of the softmax that pruning may skip")
    parser.add_argument("--local_gate", type=float, default=-3.0, help="G of the local gates, on average")
    parser.add_argument(
        "--keep_freed_memory", action="store_true", help="keep glibc from returning freed memory to the system"
    )
    parser.add_argument("--output", help="JSON file for the results")
    parser.add_argument("--plot", help="JSON file to draw instead of measuring")
    parser.add_argument("--picture", default="attention.png", help="where to draw it")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads(Path(args.plot).read_text()), args.picture)
        return
    if len(args.sides) != len(args.batch_sizes):
        parser.error(f"{len(args.sides)} sides need as many batch_sizes, not {len(args.batch_sizes)}")
    torch.set_num_threads(args.threads)
    if args.keep_freed_memory:
        keep_freed_memory()
    args.dtype = args.dtype or ("bf16" if torch.device(args.device).type == "cuda" else "fp32")
    machine = describe_machine(args.device) | {"dtype": args.dtype, "heads": args.heads, "head_dim": args.head_dim}
    speed = flops_per_second(args)
    machine["measured matrix products, TFLOP/s"] = round(speed / 1e12, 3)
    print(machine)
    rows = []
    for side, batch_size in zip(args.sides, args.batch_sizes, strict=True):
        rows += measure(side, batch_size, args, speed)
    print_table(rows)
    write_results(args.output, machine, rows)


if __name__ == "__main__":
    main()
