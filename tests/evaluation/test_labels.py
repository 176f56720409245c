import pytest

from sdt_diffusion.data import DataArguments, load_images
from sdt_diffusion.evaluation.labels import check_labels, match_labels

NAMELESS = {i: f"LABEL_{i}" for i in range(12)}
DIGITS = [str(i) for i in range(10)]
ANIMALS = {0: "dog", 1: "cat, house cat", 2: "cat"}


def test_names_match_in_any_order():
    assert match_labels(["cat", "dog"], {0: "dog", 1: "cat", 2: "elk"}) == ([1, 0], "name")
    assert match_labels(["house cat", "dog"], ANIMALS) == ([1, 0], "name")
    assert match_labels(["cat"], ANIMALS) == ([2], "name")  # the full name of a class is that class


def test_without_names_the_index_counts():
    assert match_labels(["cat", "dog"], NAMELESS) == ([0, 1], "index")
    assert match_labels(DIGITS[:3], ANIMALS) == ([0, 1, 2], "index")
    assert match_labels(["dog", "ant"], ANIMALS, "index") == ([0, 1], "index")


def test_numbers_are_labels_even_when_sorted_as_words():
    assert match_labels(["0", "1", "10", "2"], NAMELESS) == ([0, 1, 10, 2], "name")
    assert match_labels(DIGITS, {i: str(9 - i) for i in range(10)}) == (list(range(9, -1, -1)), "name")


def test_missing_names_are_listed():
    with pytest.raises(ValueError, match=r"no label for 2 of the data set's 3 classes: 'ant', 'bee'\. It knows 'dog'"):
        match_labels(["ant", "bee", "cat"], ANIMALS)
    with pytest.raises(ValueError, match=r"'10', '11'\. .*set match_labels to index"):
        match_labels(["0", "10", "11"], {0: "LABEL_0"})
    with pytest.raises(ValueError, match="no label for 2"):
        match_labels(["0", "1"], ANIMALS, "name")
    with pytest.raises(ValueError, match="and 30 more"):
        match_labels([f"class {i}" for i in range(50)], ANIMALS)


def test_a_name_of_several_labels_is_refused():
    with pytest.raises(ValueError, match="'crane' is a name of the model's labels 1, 2"):
        match_labels(["crane"], {0: "dog", 1: "crane", 2: "crane"})


def test_two_classes_of_one_label_are_refused():
    with pytest.raises(ValueError, match=r"classes 'cat', 'kitty' are all the model's label 0 \('cat, kitty'\)"):
        match_labels(["cat", "kitty"], {0: "cat, kitty", 1: "dog"})


def test_a_class_beyond_the_labels_is_named():
    images = load_images(DataArguments(), None)
    check_labels(images, range(10), 10)
    with pytest.raises(ValueError, match=r"^digits, row 7: class 7 \('7'\) is beyond the model's labels 0\.\.6\.$"):
        check_labels(images, range(10), 7)
