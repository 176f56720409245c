"""Speed and peak memory of the model: `context` against `none`, and against diffusers' DiT of the same size.

All models take turns in one process, so that noise of the machine affects them alike; compare medians and ratios.
Peak memory is taken in a fresh process for each, on CUDA from the allocator, on CPU from the resident set (which,
compiled, includes the compiler). A graph break in our models or a recompilation of any is an error.

    python benchmarks/model.py                            # SDT-S/2, batch 8, 256 tokens
    python benchmarks/model.py --preset SDT-B/2 --rounds 5
    python benchmarks/model.py --tokens 1024 --batch_size 2
    python benchmarks/model.py --models none none+ 'none {"rotary": true}'    # the `+` preset, and one of its options
"""

import argparse
import json
import math
import multiprocessing
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from timing import describe_machine, in_turns, keep_freed_memory, print_table, write_results

from sdt_diffusion import SDTTransformer2DModel

BASELINE = "none"


def build_model(name, args):
    """Build diffusers' DiT, or our model by a spatial decay, a + for the `+` preset, and JSON of config values."""
    torch.manual_seed(0)
    decay, _, overrides = name.partition(" ")
    if name == "diffusers DiT":
        decay, overrides = BASELINE, ""
    plus = "+" if decay.endswith("+") else ""
    config = SDTTransformer2DModel.preset_config(args.preset + plus, **json.loads(overrides or "{}"))
    config["sample_size"] = math.isqrt(args.tokens) * config["patch_size"]
    if name != "diffusers DiT":
        model = SDTTransformer2DModel(**{**config, "spatial_decay": decay.removesuffix("+")})
    else:
        keys = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size")
        model = DiTTransformer2DModel(**{key: config[key] for key in keys})
    return model.to(args.device)


def build_step(name, compiled, mode, args):
    """Return a function that runs one forward pass or one training step (forward, backward, AdamW)."""
    model = build_model(name, args).train(mode == "training")
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, config.in_channels, config.sample_size, config.sample_size)
    inputs = torch.randn(shape, generator=generator).to(args.device)
    timestep = torch.randint(0, 1000, (args.batch_size,), generator=generator).to(args.device)
    labels = torch.randint(0, 10, (args.batch_size,), generator=generator).to(args.device)
    run = torch.compile(model, fullgraph=name != "diffusers DiT") if compiled else model
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bf16")

    def forward():
        with torch.no_grad(), autocast:
            run(inputs, timestep=timestep, class_labels=labels, return_dict=False)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # as training does

    def training():
        with autocast:
            loss = run(inputs, timestep=timestep, class_labels=labels, return_dict=False)[0].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward if mode == "forward" else training


def _resident_kib(field):
    """Return VmRSS, the resident set, or VmHWM, its peak (the peak of getrusage would include the parent process)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _measure_peak(queue, name, compiled, mode, args):
    torch.set_num_threads(args.threads)
    before = _resident_kib("VmRSS")
    step = build_step(name, compiled, mode, args)
    for _ in range(2):
        step()
    if torch.device(args.device).type == "cuda":
        queue.put(torch.cuda.max_memory_allocated())
    else:
        queue.put((_resident_kib("VmHWM") - before) * 1024)


def peak_memory(*measurement):
    """Measure the peak bytes of two steps, model and optimizer included, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_peak, args=(queue, *measurement))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"Measuring the memory of {measurement[:3]} ended with exit code {process.exitcode}.")
    return queue.get()


def main():
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="SDT-S/2")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 is by autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--models", nargs="+", default=["none", "context", "diffusers DiT"], help="`none` among them; see above"
    )
    parser.add_argument("--tokens", type=int, default=256, help="patches of an image, a square number")
    parser.add_argument("--modes", nargs="+", choices=["forward", "training"], default=["forward", "training"])
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument(
        "--keep_freed_memory", action="store_true", help="keep glibc from returning freed memory to the system"
    )
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.keep_freed_memory:
        keep_freed_memory()

    machine = describe_machine(args.device)
    print(f"{args.preset}, batch {args.batch_size}, {args.tokens} tokens, {args.dtype}, {machine}")
    print(f"Medians of {args.rounds} interleaved rounds, ratios to `{BASELINE}`\n")
    rows = []
    for compiled in (False,) if args.no_compile else (False, True):
        for mode in args.modes:
            torch.compiler.reset()
            steps = {name: build_step(name, compiled, mode, args) for name in args.models}
            for step in steps.values():
                step()
            kind = "compiled" if compiled else "eager"
            # A step that needed a recompilation ends the benchmark.
            with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
                medians = in_turns(steps, args.rounds, args.device, f"{kind} {mode}")
            del steps
            for name, median in medians.items():
                ratio = median / medians[BASELINE]
                peak = "-" if args.no_memory else f"{peak_memory(name, compiled, mode, args) / 2**20:.0f}"
                row = {"": kind, " ": mode, "model": name, "ms": f"{median * 1e3:.0f}", "ratio": f"{ratio:.3f}"}
                rows.append(row | {"peak MiB": peak})
                print(rows[-1], flush=True)
    print_table(rows)
    write_results(args.output, machine, rows)


if __name__ == "__main__":
    main()
