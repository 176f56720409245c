import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.splits import ValidationDataArguments, load_splits, stratified_split, take_samples


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))


def fill(folder, *names):
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for copy in range(2):
            picture(10 * i + copy).save(folder / name / f"{copy}.png")
    return folder


def table(path, labels, names=None):
    feature = ClassLabel(names=names) if names else Value("int64")
    features = Features({"image": ImageFeature(), "label": feature})
    Dataset.from_dict({"image": [picture(i) for i in labels], "label": labels}, features).to_parquet(path)
    return str(path)


def load(dataset, **validation):
    return load_splits(DataArguments(dataset=str(dataset)), ValidationDataArguments(**validation), 6)


def test_the_held_out_part_is_stratified_fixed_and_never_trained_on():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 10, 1]))
    train, held_out = stratified_split(labels, 0.2)
    assert sorted([*train, *held_out]) == list(range(61))
    assert np.bincount(labels[held_out]).tolist() == [10, 2]  # never the only image of a class
    assert np.array_equal(stratified_split(labels, 0.2)[1], held_out)


def test_samples_to_train_on_are_balanced_nested_and_those_of_the_seed():
    _, train, _ = load("digits")
    few, more = (take_samples(train, number, seed=3) for number in (23, 100))
    assert sorted(np.bincount(few.labels)) == [2] * 7 + [3] * 3
    assert set(few.indices) < set(more.indices)
    assert np.array_equal(take_samples(train, 23, seed=3).indices, few.indices)
    assert not np.array_equal(take_samples(train, 23, seed=4).indices, few.indices)
    assert few.__getitems__([0])[0][1] == few.labels[0]
    assert take_samples(train, None, seed=3) is train
    assert len(np.unique(take_samples(train, len(train), seed=3).indices)) == len(train)
    for number in (9, 1439):
        with pytest.raises(ValueError, match=f"must be 10, the number of classes, to 1438, .*, not {number}"):
            take_samples(train, number, seed=3)


def test_a_small_class_gives_all_it_has(tmp_path):
    _, train, _ = load(table(tmp_path / "x.parquet", [0, 1, 1, 1, 1, 1] * 2), validation_fraction=0.1)
    assert np.bincount(take_samples(train, 8, seed=0).labels).tolist() == [2, 6]


def test_digits_are_split_in_one_fixed_way():
    images, train, tested = load("digits")
    assert (len(images), len(train), len(tested)) == (1797, 1438, 359)
    (picture, label), *_ = tested.__getitems__([5])
    row = tested.indices[5]
    assert picture.mode == "L"
    assert label == images.labels[row] == tested.labels[5]


def test_a_split_or_a_data_set_of_its_own(tmp_path):
    fill(tmp_path / "both" / "train", "ant", "bee")
    fill(tmp_path / "both" / "val", "ant", "bee")
    images, train, tested = load(tmp_path / "both", validation_split="validation")
    assert train is images
    assert len(train) == len(tested) == 4
    other = fill(tmp_path / "other", "ant", "bee")
    for dataset in (other, tmp_path / "both", table(tmp_path / "x.parquet", [0, 1], ["ant", "bee"])):
        assert load(tmp_path / "both", validation_dataset=str(dataset))[2].class_names == ["ant", "bee"]


def test_numbers_as_labels_may_lack_the_last_classes(tmp_path):
    train, fewer = table(tmp_path / "train.parquet", [0, 1, 2]), table(tmp_path / "fewer.parquet", [0, 1])
    assert load(train, validation_dataset=fewer)[2].labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"train.parquet, row 2: label 2 is beyond the 2 classes of .*fewer.parquet"):
        load(fewer, validation_dataset=train)


def test_classes_that_differ_are_named(tmp_path):
    train = fill(tmp_path / "train", "ant", "bee", "cat")
    other = fill(tmp_path / "other", "ant", "bee", "dog")
    with pytest.raises(ValueError, match=r"differ: 'cat' only in .*train; 'dog' only in .*other"):
        load(train, validation_dataset=str(other))
    swapped = table(tmp_path / "x.parquet", [0, 1], ["bee", "ant"])
    with pytest.raises(ValueError, match="differ: another order"):
        load(table(tmp_path / "y.parquet", [0, 1], ["ant", "bee"]), validation_dataset=swapped)


def test_classes_without_images_are_named(tmp_path):
    train = fill(tmp_path / "train", "ant", "bee")
    (train / "cat").mkdir()
    with pytest.raises(ValueError, match=r"1 class folder\(s\) without an image: '.*train/cat'"):
        load(train)
    with pytest.raises(ValueError, match=r"no image of the class\(es\) 'bee', 'dog'"):
        load(table(tmp_path / "x.parquet", [0, 2], ["ant", "bee", "cat", "dog"]))


def test_a_folder_as_on_the_hub(tmp_path):
    """Parquet files in `data/`, beside folders of other things."""
    (tmp_path / "data").mkdir()
    (tmp_path / "notes").mkdir()
    for split in ("train", "validation"):
        table(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [0, 1, 0, 1], ["ant", "bee"])
    images, _, tested = load(tmp_path, validation_split="validation")
    assert (images.class_names, len(images), len(tested)) == (["ant", "bee"], 4, 4)


@pytest.mark.parametrize("validation", [{"validation_split": "train"}, {"validation_dataset": "digits"}])
def test_testing_on_what_is_trained_on_is_refused(validation):
    with pytest.raises(ValueError, match="name the images of digits that are trained on"):
        load("digits", **validation)


def test_too_few_images_to_hold_any_out(tmp_path):
    with pytest.raises(ValueError, match=r"too small for validation_fraction 0\.2"):
        load(table(tmp_path / "x.parquet", [0, 1]))
    with pytest.raises(ValueError, match=r"validation_fraction must be more than 0 and less than 1, not 1\.0"):
        ValidationDataArguments(validation_fraction=1.0)
