import re
from pathlib import Path

import pytest
from PIL import Image

from sdt_diffusion.experiments import report
from sdt_diffusion.experiments.plot import MAX_LINES
from sdt_diffusion.experiments.report import SECTION, draw_pictures, fill_page, provenance
from sdt_diffusion.experiments.result_files import read_results, result_path, write_result
from sdt_diffusion.experiments.study import read_study
from sdt_diffusion.experiments.tables import (
    attention_table,
    early_table,
    gates_table,
    grid_tables,
    pruning_table,
    table,
)
from tests.experiments.studies import build_study, record_of, write_results, write_study

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if SECTION.search(page.read_text())]
STUDIES = sorted({match["study"] for page in PAGES for match in SECTION.finditer(page.read_text())})
SUMMARY = re.compile(r"<!-- numbers of docs/results.md -->\n(.*?)<!-- end of numbers -->", re.S)
DECIMAL = re.compile(r"\d+\.\d+")
EMPTY = "# Page\n\n<!-- results: small -->\n<!-- end of results -->\n\nMore.\n"


def pictures(study, results):
    described = {
        "": True,
        "_gates": any("gate_rate/0.0" in record.get("curves", {}) for record in results.values()),
        "_reach": any(record.get("metrics", {}).get("gates") for record in results.values()),
    }
    return [f"images/results_{study.name}{ending}.png" for ending, drawn in described.items() if drawn]


class TestCommittedPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_a_page_shows_what_the_results_files_hold(self, page):
        text = page.read_text()
        assert fill_page(text, ROOT / "experiments", ROOT / "experiments" / "results", pictures) == text
        for path in re.findall(r"\(images/results_.*?\)", text):
            assert (page.parent / path.strip("()")).is_file()

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_cell_names_its_config_seed_versions_and_commit(self, name):
        study = read_study(ROOT / "experiments" / f"{name}.yaml")
        results = read_results(ROOT / "experiments" / "results", study)
        for (variant, seed), record in results.items():
            assert (record["variant"], record["seed"]) == (variant, seed)
            assert record["config"]["arguments"]
            assert {"torch", "diffusers", "sdt_diffusion"} <= set(record["versions"])
            assert len(record["commit"].split()[0]) == 40, "run studies in a clone of the repository"
            assert "/" not in str(record["config"].get("arguments", {}).get("dataset", "")).replace("{data}/", "")

    @pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
    def test_numbers_of_the_summaries_are_in_the_tables(self, page):
        """A number of a summary is one of the tables of docs/results.md, rounded to the digits that it has."""
        tables = "".join(match.group() for match in SECTION.finditer((ROOT / "docs" / "results.md").read_text()))
        known = [abs(float(number)) for number in DECIMAL.findall(tables)]
        (summary,) = SUMMARY.findall((ROOT / page).read_text())
        numbers = DECIMAL.findall(summary)
        assert numbers
        for number in numbers:
            half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
            assert any(abs(value - float(number)) <= half for value in known), f"{number} is in no table"


@pytest.fixture
def study(tmp_path):
    return build_study(tmp_path)


def rows_of(study, folder):
    return parsed(table(study, read_results(folder, study)))


def parsed(text):
    """The rows of a table: variant -> column -> text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


class TestTable:
    def test_differences_are_paired_by_seed_and_steps_are_relative_to_the_baselines(self, study, tmp_path):
        write_results(tmp_path, study, none=[1.0, 0.6, 0.5], context=[1.0, 0.5, 0.4])
        rows = rows_of(study, tmp_path)
        assert rows["none (baseline)"]["held-out error of the velocity"] == "0.5050 ± 0.0071"
        assert rows["none (baseline)"]["difference to the baseline"] == ""
        assert rows["context"]["difference to the baseline"].startswith("-0.10000 [-0.10000, -0.10000]")
        assert rows["context"]["steps to the baseline's loss"] == "100%"  # 20 of 20 steps
        assert rows["context"]["time a step"] == "1.00"
        assert rows["context"]["parameters"] == "1,000"
        assert rows["context"]["FD"] == "3.00 ± 0.00"
        assert "accuracy of samples" not in rows["context"]

    def test_frechet_distances_are_paired_by_seed_too(self, tmp_path):
        study = build_study(tmp_path, also_compare=["context"])

        def change(cell, record):
            record["metrics"]["fd"] = 20.0 + 3 * cell.seed - 5 * (cell.variant == "context")

        write_changed(tmp_path, study, change)
        rows = rows_of(study, tmp_path)
        assert rows["context"]["FD"] == "16.50 ± 2.12"
        assert rows["context"]["FD, difference to the baseline"].startswith("-5.00 [-5.00, -5.00]")
        assert rows["none (baseline)"]["FD, difference to context"].startswith("+5.00 ")

    def test_a_loss_that_is_not_reached_is_said_so(self, study, tmp_path):
        write_results(tmp_path, study, none=[1.0, 0.5], context=[1.0, 0.7])
        assert rows_of(study, tmp_path)["context"]["steps to the baseline's loss"] == "not reached"

    def test_one_seed_has_no_interval(self, tmp_path):
        study = build_study(tmp_path, seeds=[3])
        write_results(tmp_path, study, none=[1.0, 0.5], context=[1.0, 0.7])
        assert rows_of(study, tmp_path)["context"]["difference to the baseline"] == "+0.20000"

    def test_failed_and_missing_cells_are_listed_and_do_not_count(self, study, tmp_path):
        none0, context0, none1, _ = study.cells()
        for cell, failed in ((none0, None), (none1, None), (context0, "the loss is not finite")):
            write_result(result_path(tmp_path, cell), record_of(cell, failed=failed))
        results = read_results(tmp_path, study)
        assert "context, 0 of 2 seeds" in rows_of(study, tmp_path)
        said = provenance(study, results)
        assert "Failed: context-seed0: the loss is not finite" in said
        assert "Not run: context-seed1." in said
        assert "`python experiments/run.py experiments/small.yaml`" in said
        assert results["none", 0]["commit"] in said

    def test_a_seed_of_which_nothing_has_run_is_one_word(self, study, tmp_path):
        write_result(result_path(tmp_path, study.cells()[0]), record_of(study.cells()[0]))
        assert "Not run: context-seed0, all of seed 1." in provenance(study, read_results(tmp_path, study))

    def test_a_file_of_no_cell_is_refused(self, study, tmp_path):
        write_results(tmp_path, study)
        (tmp_path / "small" / "other-seed0.json").write_text("{}")
        with pytest.raises(ValueError, match=r"other-seed0\.json is of no cell of the study"):
            read_results(tmp_path, study)

    def test_cells_that_different_extractors_judged_are_refused(self, study, tmp_path):
        write_results(tmp_path, study)
        cell = study.cells()[0]
        record = record_of(cell)
        record["metrics"]["extractor"] = {"weights": "others"}
        write_result(result_path(tmp_path, cell), record)
        with pytest.raises(ValueError, match="judged by different extractors"):
            fill_page(EMPTY, tmp_path, tmp_path, pictures)


def write_changed(folder, study, change):
    """Write results of all cells, each changed by a function of the cell and the record."""
    for cell in study.cells():
        record = record_of(cell)
        change(cell, record)
        write_result(result_path(folder, cell), record)
    return read_results(folder, study)


def test_many_variants_are_drawn_as_rows(tmp_path):
    study = build_study(tmp_path, variants={f"v{i}": {} for i in range(MAX_LINES + 1)}, baseline="v0", seeds=[0])
    write_results(tmp_path, study, v3=[1.0, 0.2])
    (name,) = draw_pictures(tmp_path, study, read_results(tmp_path, study))
    with Image.open(tmp_path / name) as picture:
        assert picture.height > 120 * 0.25 * len(study.variants)


class TestFurtherTables:
    def test_differences_on_the_way_are_interpolated_on_the_curves(self, study, tmp_path):
        def change(cell, record):
            values = [1.0, 0.5] if cell.variant == "none" else [0.8, 0.4 + 0.1 * cell.seed]
            record["curves"]["held_out_loss"] = {"steps": [4, 12], "values": values}

        results = write_changed(tmp_path, study, change)  # of 20 steps
        row = parsed(early_table(study, results))["context"]
        assert row["at 10% of the steps"] == ""  # which is before the first validation
        assert row["at 25% of the steps"].startswith("-0.18125 ")
        assert row["at 50% of the steps"].startswith("-0.08750 ")

    def test_the_second_half_of_the_steps_is_averaged(self, study, tmp_path):
        def change(cell, record):
            values = [1.0, 0.7, 0.6, 0.5] if cell.variant == "none" else [0.9, 0.9, 0.5, 0.3 + 0.1 * cell.seed]
            record["curves"]["held_out_loss"] = {"steps": [5, 9, 10, 20], "values": values}  # of 20 steps

        row = parsed(early_table(study, write_changed(tmp_path, study, change)))["context"]
        assert row["mean from 50% on"].startswith("-0.12500 ")  # -0.15 of seed 0, and -0.10 of seed 1

    def test_a_shorter_run_is_compared_at_the_steps_of_the_baseline(self, study, tmp_path):
        def change(cell, record):
            short = cell.variant == "context"
            record["steps"] = 12 if short else 20
            record["curves"]["held_out_loss"] = {"steps": [2, 8 if short else 20], "values": [1.0, 0.4]}

        row = parsed(early_table(study, write_changed(tmp_path, study, change)))["context"]
        assert row["at 25% of the steps"].startswith("-0.20000 ")  # 0.7 instead of 0.9 after 5 of 20 steps
        assert "at 50% of the steps" not in row  # after its last validation
        assert "mean from 50% on" not in row

    def test_a_further_variant_can_be_compared_with(self, tmp_path):
        study = build_study(tmp_path, also_compare=["context"])
        write_results(tmp_path, study, none=[1.0, 0.5], context=[1.0, 0.4])
        rows = rows_of(study, tmp_path)
        assert rows["none (baseline)"]["difference to context"].startswith("+0.10000 ")
        assert rows["context"]["difference to context"] == ""

    def test_classifiers_are_compared_by_their_accuracy_in_points(self, tmp_path):
        study = build_study(tmp_path, trainer="train_classifier", arguments={}, evaluation=None)

        def change(cell, record):
            accuracy = 0.5 + 0.05 * (cell.variant == "context") + 0.01 * cell.seed
            record["metrics"] = {"held_out_loss": 1.5, "accuracy": accuracy}
            record["curves"]["accuracy"] = {"steps": [0, 20], "values": [0.1, accuracy]}

        write_changed(tmp_path, study, change)
        rows = rows_of(study, tmp_path)
        assert rows["none (baseline)"]["test accuracy"] == "50.50 ± 0.71%"
        assert rows["context"]["difference to the baseline"].startswith("+5.00 [")
        assert rows["context"]["steps to the baseline's accuracy"] == "89%"
        assert rows["context"]["test loss"] == "1.5000 ± 0.0000"

    def test_each_other_resolution_has_a_table_with_the_scaling_that_was_best(self, tmp_path):
        study = build_study(tmp_path, evaluation={"resolutions": [12, 16]})

        def change(cell, record):
            loss = 0.5 - 0.1 * (cell.variant == "context")
            wider = {"held_out_loss": loss, "fd": 9.0, "scaling": f"rotary {'ntk' if cell.seed else 'none'}"}
            record["metrics"]["resolutions"] = {"12": wider, "16": {**wider, "fd": 10.0}}

        tables = grid_tables(study, write_changed(tmp_path, study, change))
        assert [text.partition(" pixels")[0] for text in tables] == ["At 12x12", "At 16x16"]
        row = parsed(tables[1])["context"]
        assert row["difference to the baseline"].startswith("-0.10000 ")
        assert row["FD"] == "10.00 ± 0.00"
        assert row["FD, difference to the baseline"].startswith("+0.00 ")
        assert row["best scaling"] == "rotary none (1); rotary ntk (1)"

    def test_gates_are_described_by_the_distance_that_halves_attention(self, study, tmp_path):
        def change(cell, record):
            if cell.variant == "context":
                for block, rate in ((0, 0.1), (1, 0.3)):  # 0.2 on average at first, and then 0.4
                    curve = {"steps": [1, 2], "values": [rate, 2 * rate]}
                    for kind in ("gate_rate", "gate_rate_low_noise", "gate_rate_high_noise", "gate_spread"):
                        record["curves"][f"{kind}/{block}.0"] = curve
                    record["curves"][f"gate_gradient/{block}.proj.weight"] = {"steps": [1, 2], "values": [3.0, 0.0]}
                    record["curves"][f"gate_gradient/{block}.log_alpha"] = {"steps": [1, 2], "values": [0.0, 1.0]}

        results = write_changed(tmp_path, study, change)
        (row,) = parsed(gates_table(study, results)).values()
        assert row["distance that halves attention, by head: first, last"] == "3.47, 1.73"
        assert row["rate at much noise by that at little"] == "1.00"
        assert row["gradient of W_g: first, last"] == "4.2, 0"
        assert row["gradient of alpha: first, last"] == "0, 1.4"
        assert len(draw_pictures(tmp_path, study, results)) == 2
        assert (tmp_path / "images" / "results_small_gates.png").stat().st_size > 10_000

    def test_gates_at_the_end_are_drawn_by_noise_level_and_class(self, study, tmp_path):
        def change(cell, record):
            if cell.variant == "context":
                rates = [[0.1, 0.2], [0.4, 0.0]]  # of two blocks with two heads
                record["metrics"]["gates"] = {"by_noise": {"0.05": rates, "0.95": rates}, "by_class": {"3": rates}}

        pictures = draw_pictures(tmp_path, study, write_changed(tmp_path, study, change))
        assert pictures == ["images/results_small.png", "images/results_small_reach.png"]
        assert (tmp_path / pictures[1]).stat().st_size > 10_000

    def test_the_distance_of_attention_is_shown_at_each_resolution(self, study, tmp_path):
        def change(cell, record):
            if cell.variant == "context":
                heads = [[1.0 + cell.seed, 2.0 + cell.seed], [4.0, 5.0]]  # of two blocks
                record["metrics"]["attention"] = {"8": heads, "12": [[9.0, 9.0]] * 2}

        text = attention_table(study, write_changed(tmp_path, study, change))
        assert parsed(text)["context"] == {
            "8x8, first block": "2.00 ± 0.71",
            "12x12, first block": "9.00 ± 0.00",
            "8x8, all blocks": "3.25 ± 0.35",
            "12x12, all blocks": "9.00 ± 0.00",
        }

    def test_pruning_is_shown_with_what_it_costs_and_saves(self, study, tmp_path):
        def change(cell, record):
            if cell.variant == "context":
                plain = {"held_out_loss": 0.5, "density": 1.0, "relative_time": 1.0}
                pruned = {"held_out_loss": 0.51, "density": 0.4, "relative_time": 0.7}
                record["metrics"]["pruning"] = {"0.0": plain, "0.001": pruned}

        rows = parsed(pruning_table(study, write_changed(tmp_path, study, change)))
        assert list(rows) == ["context, 0", "context, 0.001"]
        assert rows["context, 0.001"] == {
            "held-out error": "0.51000 ± 0.00000",
            "tiles that are computed": "40.0 ± 0.0%",
            "time of the network": "0.70 ± 0.00",
        }

    def test_the_first_seeds_run_is_shown_on_the_way(self, study, tmp_path):
        write_results(tmp_path, study, none=[1.0, 0.5], context=[0.9, 0.4])  # at steps 10 and 20 of 20
        text = fill_page(EMPTY.replace("results: small", "on the way: small"), tmp_path, tmp_path, pictures)
        assert "--seeds 0 --variants none --keep_pipelines`" in text
        row = parsed(text)["context"]
        assert (row["step 10"], row["step 15"], row["step 20"]) == ("0.9000", "0.6500", "0.4000")
        assert row["step 2"] == ""  # no validation yet
        assert row["FD"] == "3.00"

    def test_without_gates_pruning_or_other_resolutions_there_are_no_such_tables(self, study, tmp_path):
        write_results(tmp_path, study)
        results = read_results(tmp_path, study)
        assert attention_table(study, results) == gates_table(study, results) == pruning_table(study, results) == ""
        assert grid_tables(study, results) == []


class TestScript:
    def test_it_fills_the_pages_draws_the_pictures_and_changes_nothing_the_second_time(self, tmp_path, capsys):
        write_study(tmp_path)
        write_results(tmp_path, build_study(tmp_path), none=[1.0, 0.5], context=[1.0, 0.4])
        page = tmp_path / "page.md"
        page.write_text(EMPTY)
        (tmp_path / "other.md").write_text("# Nothing\n")
        folders = [f"--studies_dir={tmp_path}", f"--results_dir={tmp_path}", f"--pages_dir={tmp_path}"]
        report.main(folders)
        text = page.read_text()
        assert "| context | 0.4050" in text
        assert text.startswith("# Page\n")
        assert text.endswith("\n\nMore.\n")
        assert (tmp_path / "images" / "results_small.png").stat().st_size > 10_000
        report.main(folders)
        assert page.read_text() == text
        assert capsys.readouterr().out.count("page.md") == 2

    def test_a_study_that_has_not_run_is_said_so_without_a_table_or_a_picture(self, tmp_path):
        study = build_study(tmp_path)
        text = fill_page(EMPTY, tmp_path, tmp_path, pictures)
        assert "Not run yet." in text
        assert "|" not in text
        assert "images/" not in text
        assert fill_page(text, tmp_path, tmp_path, pictures) == text
        assert study.title in text

    def test_pages_without_markers_are_an_error(self, tmp_path):
        with pytest.raises(SystemExit, match="No page of"):
            report.main([f"--pages_dir={tmp_path}"])

    def test_a_study_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"small\.yaml"):
            fill_page(EMPTY, tmp_path, tmp_path, pictures)
