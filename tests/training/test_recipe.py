import random
import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from sdt_diffusion.training.classifier_model import ClassifierModelArguments
from sdt_diffusion.training.config import RunArguments
from sdt_diffusion.training.optimizer import OptimizationArguments
from sdt_diffusion.training.recipe import (
    ClassificationLoss,
    RecipeArguments,
    build_processor,
    layer_decay_groups,
    train_transform,
)
from sdt_diffusion.training.train_classifier import evaluate_classifier
from sdt_diffusion.utils.arguments import fields_with
from sdt_diffusion.utils.seeding import Stream, seeded_cpu_generators
from tests.sdt_h.small import small_model

DEIT = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "scale": [0.08, 1.0], "ratio": [0.75, 1.25]}


class Fixed(nn.Module):
    """Logits that are the first pixels."""

    def forward(self, images):
        return ImageClassifierOutputWithNoAttention(logits=images.flatten(1)[:, :5])


def picture(seed, mode="RGB", size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transforms_give_what_the_processor_gives(mode):
    processor = build_processor(len(mode), 24)
    plain = train_transform(RecipeArguments(), processor, random_flip=False)
    square = picture(0, mode, (24, 24))
    torch.testing.assert_close(plain(square), processor(square, return_tensors="pt").pixel_values[0])
    transform = train_transform(RecipeArguments(**DEIT), processor, random_flip=True)
    for seed in range(30):  # every operation of RandAugment
        assert transform(picture(seed, mode)).shape == (len(mode), 24, 24)


@pytest.mark.parametrize("aa", ["rand-m10-mstd0-inc1-n15", "augmix-m10-mstd0-w9", "v0-mstd9"])
def test_full_magnitude_keeps_at_least_one_bit(aa):
    """DeiT's magnitude of 9 plus noise gets there now and then; Pillow refuses to posterize to none."""
    transform = train_transform(RecipeArguments(aa=aa), build_processor(3, 24), random_flip=False)
    for seed in range(200 if aa.startswith("v0") else 20):
        with seeded_cpu_generators(Stream.AUGMENTATION, seed, 0):
            assert transform(picture(seed)).shape == (3, 24, 24)


def test_no_policy_posterizes_to_nothing():
    for aa in ("v0", "v0r", "original", "originalr", "3a"):
        transform = train_transform(RecipeArguments(aa=aa), build_processor(3, 24), random_flip=False)
        (policy,) = [step.policy for step in transform.transforms if hasattr(step, "policy")]
        for operation in chain.from_iterable(policy):
            if operation.aug_fn is posterize:
                assert all(operation.level_fn(level, {})[0] >= 1 for level in (0, 2, 10))


@pytest.mark.parametrize(
    "aa",
    [
        *("rand", "rand-m9-mstd0.5-inc1", "rand-m9-n3-p1.0-mmax30-mstd101-tweights", "rand-t3a", "rand-t3aw-n2"),
        *("augmix", "augmix-m5-w4-d2-a0.5-b1-mstd1", "original-mstd0.5", "originalr", "v0", "v0r-mstd0.5", "3a"),
    ],
)
def test_timms_automatic_augmentations_are_taken(aa):
    transform = train_transform(RecipeArguments(aa=aa), build_processor(3, 24), random_flip=False)
    assert transform(picture(0)).shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("aa", "reason"),
    [
        *(("rand-q9", "Unknown RandAugment config section"), ("rand-m9.5", "invalid literal for int()")),
        *(("augmix-n2", "Unknown AugMix config section"), ("augmix-a0", "alpha <= 0")),
        *(("v0-m9", "Unknown AutoAugment config section"), ("original-mstd1x", "could not convert string to float")),
        *(("v1", "Unknown AA policy v1"), ("randaugment-m9", "AssertionError")),
        *(("rand-zz", "timm would ignore 'zz'"), ("rand-m", "timm would ignore 'm'")),
        *(("rand-m9-", "timm would ignore ''"), ("rand-tw", "timm would ignore 'tw'")),
        ("rand-mstdinf", "timm would ignore 'mstdinf'"),
    ],
)
def test_augmentations_that_timm_does_not_understand_are_refused_with_its_reason(aa, reason):
    message = (
        rf"^aa {re.escape(repr(aa))} is not an automatic augmentation of timm \({re.escape(reason)}.*\): give one"
    )
    with pytest.raises(ValueError, match=message):
        RecipeArguments(aa=aa)


def test_checking_an_augmentation_leaves_the_random_generators_as_they_are():
    for aa in ("rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2"):
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        RecipeArguments(aa=aa)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_the_transform_is_timms():
    recipe = RecipeArguments(**DEIT)
    ours = train_transform(recipe, build_processor(3, 24), random_flip=True)
    timms = create_transform(
        (3, 24, 24),
        is_training=True,
        scale=(0.08, 1.0),
        ratio=(0.75, 1.25),
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    assert repr(ours) == repr(timms)


def test_gray_models_see_color_pictures_in_gray():
    processor = build_processor(1, 8)
    gray = picture(0, "L", (8, 8))
    expected = torch.tensor(np.array(gray)) / 127.5 - 1
    for image in (gray, gray.convert("RGB"), np.array(gray.convert("RGB"))):
        pixel_values = processor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixel_values[0, 0], expected, atol=0.02, rtol=0)


def test_evaluation_sees_the_middle():
    processor = build_processor(3, 21, crop_pct=0.875)
    assert processor.size["shortest_edge"] == 24
    assert processor(picture(0), return_tensors="pt").pixel_values.shape == (1, 3, 21, 21)


def test_smoothed_labels():
    images, labels = torch.randn(4, 1, 3, 3), torch.tensor([0, 4, 2, 2])
    loss = ClassificationLoss(RecipeArguments(smoothing=0.1), 5)(Fixed(), images, labels)
    expected = F.cross_entropy(images.flatten(1)[:, :5], labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_labels(kind):
    """Images that are their one-hot labels: a mixed image is its own target."""
    labels = torch.tensor([0, 1, 2, 3])
    images = F.one_hot(labels, 5).float()[:, :, None, None].expand(-1, -1, 8, 8).clone()
    seen = []

    class Keep(Fixed):
        def forward(self, images):
            seen.append(images.mean(dim=(2, 3)))
            return ImageClassifierOutputWithNoAttention(logits=torch.zeros(4, 5) + torch.arange(5.0))

    np.random.seed(0)
    loss = ClassificationLoss(RecipeArguments(**{kind: 1.0}), 5)(Keep(), images, labels)
    assert 0 < seen[0].max() < 1
    torch.testing.assert_close(loss, -(seen[0] * torch.arange(5.0).log_softmax(0)).sum(dim=1).mean())


def test_epochs_become_steps():
    run, optimization = RunArguments(train_batch_size=4, gradient_accumulation_steps=2), OptimizationArguments()
    recipe = RecipeArguments(num_train_epochs=3, lr_warmup_epochs=0.5)
    run, optimization = recipe.resolve_epochs(run, optimization, 100, num_processes=2)
    assert (run.max_train_steps, optimization.lr_warmup_steps) == (19, 4)


def test_a_resumed_run_may_change_its_length_and_its_memory():
    assert fields_with("resumable", RecipeArguments, ClassifierModelArguments) == {
        "num_train_epochs",
        "gradient_checkpointing",
    }


def test_layer_decay_of_sdt_h():
    model = small_model()
    groups = layer_decay_groups(model, RecipeArguments(layer_decay=0.5), weight_decay=0.05)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert len(names) == len(list(model.parameters()))
    assert names["network.head.weight"] == 1
    assert names["network.stages.2.blocks.0.attn.to_q.weight"] == names["network.proj.weight"] == 0.5
    assert names["network.stages.0.blocks.0.attn.to_q.weight"] == 0.0625
    assert names["network.patch_embed.0.weight"] == 0.03125
    assert layer_decay_groups(model, RecipeArguments(), 0.05) is None


def test_accuracy_counts_every_image_once():
    class Images:
        name, num_classes = "noise", 6

        def __len__(self):
            return 7

        def __getitems__(self, indices):
            return [(picture(i, "L", (8, 8)), i % 5) for i in indices]

    class Classifier(nn.Module):
        dtype, config = torch.float32, SimpleNamespace(num_labels=6, num_channels=1)

        def forward(self, images):
            return ImageClassifierOutputWithNoAttention(logits=images.flatten(1)[:, :6])

    processor = build_processor(1, 8)
    found = evaluate_classifier(Classifier(), Images(), processor, Accelerator(cpu=True), batch_size=3)
    pictures, labels = zip(*Images().__getitems__(range(7)), strict=True)
    logits = processor(list(pictures), return_tensors="pt").pixel_values.flatten(1)[:, :6]
    labels = torch.tensor(labels)
    assert found["count"] == 7
    assert found["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found["top5"] == pytest.approx((logits.argsort(1)[:, 1:] == labels[:, None]).any(1).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ratio": [2.0, 1.0]}, "ratio takes the least and the largest value"),
        ({"reprob": 2.0}, "reprob must be at least 0 and at most 1, not 2.0"),
        ({"num_train_epochs": 0}, "num_train_epochs must be more than 0 and at most 1000000, not 0"),
        ({"aug_repeats": 0}, "aug_repeats must be at least 1 and at most 1000, not 0"),
        ({"layer_decay": 1.5}, "layer_decay must be more than 0 and at most 1, not 1.5"),
    ],
)
def test_bad_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RecipeArguments(**kwargs)
