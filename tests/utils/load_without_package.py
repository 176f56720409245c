# ruff: noqa: E402  (the package must be hidden before others are imported)
"""Load and use the models of folders where `sdt_diffusion` cannot be imported; run by test_code_export.py.

python load_without_package.py PIPELINE GUIDED_PIPELINE CLASSIFIER PROBE BARE_PIPELINE RESULTS
"""

import importlib.abc
import json
import sys
from pathlib import Path


class WithoutPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sdt_diffusion":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, WithoutPackage())
sys.path.pop(0)

import diffusers
import torch
from diffusers import DiffusionPipeline
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification


def samples(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(["bee", 4], num_inference_steps=3, generator=generator, output_type="pt").images


def refusal(load, folder):
    try:
        load(folder)
    except (AttributeError, ValueError, OSError) as error:
        return str(error)


plain, guided, classifier, probe, bare, results = sys.argv[1:]
torch.set_num_threads(1)
found = {"refusals": [refusal(DiffusionPipeline.from_pretrained, plain)]}
found["refusals"].append(
    refusal(lambda folder: AutoConfig.from_pretrained(folder, trust_remote_code=False), classifier)
)
found["without_code"] = [
    refusal(DiffusionPipeline.from_pretrained, bare),
    refusal(lambda folder: diffusers.AutoModel.from_pretrained(folder, subfolder="transformer"), bare),
]
pipe = DiffusionPipeline.from_pretrained(plain, trust_remote_code=True)
found["plain"] = samples(pipe)
pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
found["misfit"] = refusal(samples, pipe)
for name in ("UniPCMultistepScheduler", "FlowMatchSDEScheduler"):
    pipe.swap_scheduler(name)
    found[name] = samples(pipe)
pipe.save_pretrained(results + ".swapped")
found["swapped_again"] = samples(DiffusionPipeline.from_pretrained(results + ".swapped", trust_remote_code=True))
found["custom"] = samples(
    DiffusionPipeline.from_pretrained(plain, custom_pipeline=plain + "/pipeline_sdt.py", trust_remote_code=True)
)
guided_pipe = DiffusionPipeline.from_pretrained(guided, trust_remote_code=True)
found["guided"] = samples(guided_pipe)
guided_pipe.save_pretrained(results + ".again", with_code=True)  # its code goes along in any case
found["again"] = samples(DiffusionPipeline.from_pretrained(results + ".again", trust_remote_code=True))

model = AutoModelForImageClassification.from_pretrained(classifier, trust_remote_code=True).eval()
inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
found["logits"] = model(inputs).logits.detach()
model.save_pretrained(results + ".classifier", with_code=True)
found["saved"] = json.loads(Path(results + ".classifier/config.json").read_text())["auto_map"]
features = AutoModel.from_pretrained(classifier, trust_remote_code=True).eval()
found["features"] = features(inputs).pooler_output.detach()
found["pixels"] = AutoImageProcessor.from_pretrained(classifier, trust_remote_code=True)(
    torch.arange(3 * 40 * 40, dtype=torch.uint8).reshape(3, 40, 40), return_tensors="pt"
).pixel_values
model = AutoModelForImageClassification.from_pretrained(probe, trust_remote_code=True).eval()
found["probe"] = model(inputs[:, :, :8, :8]).logits.detach()
found["modules"] = sorted(name for name in sys.modules if name.startswith("sdt_diffusion"))
torch.save(found, results)
