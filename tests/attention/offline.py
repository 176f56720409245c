"""Compile the Triton kernels for GPUs that are not there, and print what each needs as JSON.

    python -m tests.attention.offline
    python -m tests.attention.offline --all

Only the compiler and the tools that come with Triton are used.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdt_diffusion.attention import triton_kernels
from sdt_diffusion.attention.fused import kernel_constants
from sdt_diffusion.attention.launch import Launch, candidates

ARCHITECTURES = (80, 90, 100)
KERNELS = ("forward", "backward_query", "backward_key")
IN_TYPE = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")
IN_FP32 = ("lse", "half_decay", "exact_delta", "row_sums", "grad_half_decay")


def resources(
    kernel: str, head_dim: int, architecture: int, pruned: bool = False, launch: Launch | None = None
) -> dict:
    """Compile a kernel for bf16; return its registers, its bytes of local memory (spills) and of shared memory."""
    function = getattr(triton_kernels, f"{kernel}_kernel")
    launch = launch or candidates(kernel, head_dim, 4096, pruned)[0]
    constants = kernel_constants(head_dim, torch.bfloat16, False, launch)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= {"coordinates": None} | ({} if pruned else {"order": None, "lists": None})
    names = function.arg_names
    types = {
        **dict.fromkeys(names, "i32"),
        **{name: "*bf16" for name in names if name in IN_TYPE},
        **{name: "*fp32" for name in names if name in IN_FP32},
        **{name: "*i32" for name in names if name in ("order", "lists")},
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = [
        i for i, name in enumerate(names) if types[name][0] == "*" or name.endswith(("_batch", "_head", "_token"))
    ]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout + shown.stderr)
    return {
        "kernel": kernel,
        "head_dim": head_dim,
        "architecture": architecture,
        "pruned": pruned,
        "launch": launch,
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
    }


if __name__ == "__main__":
    everything = "--all" in sys.argv[1:]
    for head_dim in (16, 24, 64, 72, 80, 96, 128) if everything else (64,):
        for pruned, kernel, architecture in itertools.product((False, True), KERNELS, ARCHITECTURES):
            if everything or not pruned or architecture == 80:  # which has the fewest registers to spare
                print(json.dumps(resources(kernel, head_dim, architecture, pruned)), flush=True)
