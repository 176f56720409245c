"""Compile the Triton kernels for GPUs that are not there, and print what each needs as JSON.

    python -m tests.attention.offline

Only the compiler and the tools that come with Triton are used.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdt_diffusion.attention import triton_kernels
from sdt_diffusion.attention.fused import launch_for

ARCHITECTURES = (80, 90, 100)
KERNELS = ("forward", "backward_query", "backward_key")
IN_TYPE = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")
IN_FP32 = ("lse", "half_decay", "y", "x", "delta", "grad_half_decay")


def resources(kernel: str, head_dim: int, architecture: int, dtype: str = "bf16", tokens: int = 4096) -> dict:
    """Compile a kernel and return its registers, its bytes of local memory (spills) and of shared memory."""
    function = getattr(triton_kernels, f"{kernel}_kernel")
    launch = launch_for(kernel, head_dim, tokens)
    constants = {"D": head_dim, "D0": launch.d0, "D1": launch.d1, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    constants |= {"CLAMP": False, "PRECISION": "tf32"}
    names = function.arg_names
    types = {
        **dict.fromkeys(names, "i32"),
        **dict.fromkeys(constants, "constexpr"),
        **{name: f"*{dtype}" for name in names if name in IN_TYPE},
        **{name: "*fp32" for name in names if name in IN_FP32},
        "scale": "fp32",
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
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
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
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
    }


if __name__ == "__main__":
    for kernel in KERNELS:
        for architecture in ARCHITECTURES:
            print(json.dumps(resources(kernel, 64, architecture)), flush=True)
