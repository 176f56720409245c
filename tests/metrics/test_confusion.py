import numpy as np
import pytest
import torch

from sdt_diffusion.metrics.confusion import RunningConfusion, from_log, to_log


def logits_for(*predictions, num_labels=8):
    """Logits whose order is the prediction, then the labels after it."""
    return torch.stack([-((torch.arange(num_labels) - p) % num_labels).float() for p in predictions])


def test_known_answers():
    running = RunningConfusion([0, 1, 2], num_labels=8)
    running.update(logits_for(0, 0, 1), torch.tensor([0, 0, 1]))
    running.update(logits_for(7, 5, 1), torch.tensor([1, 1, 0]))  # 7: the label 1 is third; 5: fifth
    found = running.result()
    assert found.counts.tolist() == [[2, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0, 1], [0] * 8]
    assert found.top1 == 3 / 6
    assert found.top1_standard_error == pytest.approx((0.25 / 6) ** 0.5)
    assert found.found.tolist() == [2, 3, 0]  # 0 is last after 1
    assert found.top5 == 5 / 6
    assert found.class_mean == (2 / 3 + 1 / 3) / 2
    assert found.within_data_set().tolist() == [[2, 1, 0, 0], [0, 1, 0, 2], [0, 0, 0, 0]]


def test_classes_have_the_labels_they_are_matched_with():
    running = RunningConfusion([6, 2], num_labels=8)
    running.update(logits_for(6, 2, 2), torch.tensor([0, 0, 1]))
    found = running.result()
    assert found.correct.tolist() == [1, 1]
    assert found.within_data_set().tolist() == [[1, 1, 0], [0, 1, 0]]


def test_top5_of_five_labels_says_nothing():
    for num_labels, top5 in ((2, None), (5, None), (6, 1.0)):
        running = RunningConfusion([0, 1], num_labels)
        running.update(logits_for(1, 0, num_labels=num_labels), torch.tensor([1, 0]))
        assert running.result().top5 == top5


def test_batches_change_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, classes = torch.randn(50, 8, generator=generator), torch.randint(0, 5, (50,), generator=generator)
    whole, parts = (RunningConfusion([3, 1, 4, 0, 7], 8) for _ in range(2))
    whole.update(logits, classes)
    for rows in torch.arange(50).split(7):
        parts.update(logits[rows], classes[rows])
    first, second = whole.result(), parts.result()
    assert np.array_equal(first.counts, second.counts)
    assert np.array_equal(first.found, second.found)
    labels = torch.tensor([3, 1, 4, 0, 7])[classes]
    assert first.top1 == (logits.argmax(dim=1) == labels).double().mean().item()
    rank = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert first.top5 == (rank < 5).double().mean().item()
    for found in (first, second):
        assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_numbers_have_other_names_in_the_log_of_a_training_run():
    running = RunningConfusion([0, 1, 2], num_labels=8)
    running.update(logits_for(0, 1, 1), torch.tensor([0, 1, 2]))
    numbers = running.result().numbers()
    assert set(numbers) == {"top1", "top5", "loss", "count"}
    record = to_log(numbers)
    assert (record["test_accuracy"], record["test_images"]) == (2 / 3, 3)
    assert from_log({"step": 3, **record}) == numbers
    assert "test_accuracy_top5" not in to_log({**numbers, "top5": None})
    assert from_log({"step": 3, "loss": 0.5, "learning_rate": 1e-4}) == {}
