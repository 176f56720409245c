import numpy as np

from sdt_diffusion.evaluation.accuracy import describe_classes, format_classes
from sdt_diffusion.metrics.confusion import Confusion


def test_every_class_is_described():
    counts = np.array([[3, 0, 1], [0, 0, 0]])
    ant, bee = describe_classes(Confusion(np.array([0, 1]), counts, None, 0.1), ["ant", "bee"])
    assert ant == {"name": "ant", "label": 0, "count": 4, "top1": 0.75, "top5": None, "predicted": {0: 3, 2: 1}}
    assert bee == {"name": "bee", "label": 1, "count": 0, "top1": None, "top5": None, "predicted": {}}
    assert format_classes([ant, bee]).splitlines() == [
        "class  images  top-1  top-5  most often mistaken for",
        "ant         4  75.0%      -  label 2 (1)",
        "bee         0      -      -",
    ]


def test_of_many_classes_the_table_shows_the_worst():
    counts = np.diag(np.arange(100)) + 1
    described = describe_classes(
        Confusion(np.arange(100), counts, counts.sum(axis=1), 0.1), list(map(str, range(100)))
    )
    lines = format_classes(described).splitlines()
    assert [line.split()[0] for line in lines[1:21]] == list(map(str, range(20)))
    assert lines[-1] == "The 20 of 100 classes with the lowest accuracy; the JSON file has all."
