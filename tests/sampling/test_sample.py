import json

import numpy as np
import pytest
from PIL import Image

from sdt_diffusion.sampling.sample import main
from sdt_diffusion.utils.arguments import parse_arguments


@pytest.fixture
def model(make_pipe, tmp_path):
    make_pipe(guidance_scale=1.5, num_inference_steps=2).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_settings_of_the_pipeline_apply_where_no_flag_names_others(model, tmp_path, capsys):
    main(["--model", model, "--num_images", "6", "--output_dir", str(tmp_path / "a")])
    assert "2 steps, 4 network evaluations, guidance 1.5, seed 0" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert (record["kind"], record["guidance_scale"], record["num_inference_steps"]) == ("samples", 1.5, 2)
    assert record["labels"] == [0, 1, 2, 3, 4, 0]
    flags = ["--guidance_scale", "1", "--num_inference_steps", "1", "--scheduler", "FlowMatchHeunDiscreteScheduler"]
    main(["--model", model, "--num_samples", "2", "--output_dir", str(tmp_path / "b"), *flags])
    assert "FlowMatchHeunDiscreteScheduler, 1 steps, 1 network evaluations, guidance 1," in capsys.readouterr().out


def test_samples_for_adm_go_to_the_file_named_or_to_the_output_folder(model, tmp_path):
    common = ["--model", model, "--classes", "bee", "3", "--num_images", "2", "--output_dir"]
    main([*common, str(tmp_path / "a"), "--npz"])
    main([*common, str(tmp_path / "b"), "--samples_npz", str(tmp_path / "new" / "b.npz")])
    first, second = (np.load(path)["arr_0"] for path in (tmp_path / "a" / "samples.npz", tmp_path / "new" / "b.npz"))
    assert np.array_equal(first, second)
    assert np.array_equal(first[0], np.array(Image.open(tmp_path / "a" / "images" / "000000-class1.png")))
    assert not (tmp_path / "b" / "samples.npz").exists()


def test_every_flag_has_help(capsys):
    from sdt_diffusion.evaluation.decay_maps import DecayArguments
    from sdt_diffusion.evaluation.fid import FidArguments, FidSamplingArguments
    from sdt_diffusion.evaluation.label_accuracy import LabelAccuracyArguments
    from sdt_diffusion.sampling.sample import SampleArguments
    from sdt_diffusion.sampling.settings import SamplingArguments

    for types in (
        (SampleArguments, SamplingArguments),
        (FidArguments, FidSamplingArguments),
        (LabelAccuracyArguments, SamplingArguments),
        (DecayArguments,),
    ):
        assert all(field.metadata.get("help") for each in types for field in each.__dataclass_fields__.values())
        with pytest.raises(SystemExit):
            parse_arguments(types, ["--help"])
        text = capsys.readouterr().out
        for flag in ("--scheduler", "--num_inference_steps", "--guidance_scale", "--attention_backend", "--seed"):
            assert flag in text


def test_an_output_folder_with_files_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit, match=r"^Error: output_dir .* is not an empty folder: choose another"):
        main(["--model", model, "--output_dir", str(tmp_path)])


def test_all_classes_are_sampled_in_the_order_of_their_ids(make_pipe, tmp_path):
    names = {0: "4", 1: "3", 2: "2", 3: "1", 4: "0"}
    make_pipe(num_inference_steps=1, id2label=names).save_pretrained(tmp_path / "model")
    main(["--model", str(tmp_path / "model"), "--num_images", "5", "--output_dir", str(tmp_path / "a")])
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["labels"] == [0, 1, 2, 3, 4]
