import numpy as np

from sdt_diffusion.metrics.features import FeatureFile


def test_it_reads_like_the_array_it_stands_for_and_leaves_no_file(tmp_path):
    array = np.random.default_rng(0).random((10, 3), dtype=np.float32)
    file = FeatureFile(tmp_path, 10, 3)
    file.append(array[:4])
    file.append(array[4:])
    assert len(file) == 10
    assert file.shape == (10, 3)
    assert np.array_equal(file[:], array)
    assert np.array_equal(file[2:5], array[2:5])
    assert np.array_equal(file[np.array([9, 0, 3])], array[[9, 0, 3]])
    assert list(tmp_path.iterdir()) == []
