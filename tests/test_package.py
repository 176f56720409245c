import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sdt_diffusion"


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout


def test_import_registers_the_classes_with_diffusers():
    run(
        "import sdt_diffusion, diffusers\n"
        "assert diffusers.SDTPipeline is sdt_diffusion.SDTPipeline\n"
        "assert diffusers.SDTTransformer2DModel is sdt_diffusion.SDTTransformer2DModel\n"
        "assert diffusers.pipelines.sdt.SDTPipeline is sdt_diffusion.SDTPipeline\n"
    )


def test_swap_scheduler_is_public():
    import sdt_diffusion
    from sdt_diffusion.sdt import schedulers

    assert sdt_diffusion.swap_scheduler is schedulers.swap_scheduler
    assert "swap_scheduler" in sdt_diffusion.__all__


def test_import_brings_nothing_that_diffusers_pipelines_do_not():
    imported = "print('\\n'.join(sorted(m.split('.')[0] for m in set(sys.modules))))"
    before = set(run(f"import sys, torch\nfrom diffusers import DiffusionPipeline, ModelMixin\n{imported}").split())
    after = set(run(f"import sys, sdt_diffusion\n{imported}").split())
    assert after - before <= {"sdt_diffusion"}


def test_attention_needs_torch_only():
    code = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('attention', r'{PACKAGE}/attention/__init__.py')\n"
        "module = u.module_from_spec(spec)\n"
        "sys.modules['attention'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    run(code)
