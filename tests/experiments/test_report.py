from pathlib import Path

import pytest

from sdt_diffusion.experiments import report
from sdt_diffusion.experiments.report import SECTION, fill_page, provenance, table
from sdt_diffusion.experiments.result_files import read_results, result_path, write_result
from sdt_diffusion.experiments.study import read_study
from tests.experiments.studies import build_study, record_of, write_results, write_study

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if SECTION.search(page.read_text())]
STUDIES = sorted({match["study"] for page in PAGES for match in SECTION.finditer(page.read_text())})
EMPTY = "# Page\n\n<!-- results: small -->\n<!-- end of results -->\n\nMore.\n"


def picture(study, results):
    return f"images/results_{study.name}.png"


class TestCommittedPages:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
    def test_a_page_shows_what_the_results_files_hold(self, page):
        text = page.read_text()
        assert fill_page(text, ROOT / "experiments", ROOT / "experiments" / "results", picture) == text
        for match in SECTION.finditer(text):
            assert (page.parent / "images" / f"results_{match['study']}.png").is_file()

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_cell_names_its_config_seed_versions_and_commit(self, name):
        study = read_study(ROOT / "experiments" / f"{name}.yaml")
        results = read_results(ROOT / "experiments" / "results", study)
        assert results
        for (variant, seed), record in results.items():
            assert (record["variant"], record["seed"]) == (variant, seed)
            assert record["config"]["arguments"]
            assert {"torch", "diffusers", "sdt_diffusion"} <= set(record["versions"])
            assert len(record["commit"].split()[0]) == 40, "run studies in a clone of the repository"
            assert "/" not in str(record["config"].get("arguments", {}).get("dataset", "")).replace("{data}/", "")


@pytest.fixture
def study(tmp_path):
    return build_study(tmp_path)


def rows_of(study, folder):
    lines = table(study, read_results(folder, study)).splitlines()
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
            fill_page(EMPTY, tmp_path, tmp_path, picture)


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

    def test_pages_without_markers_are_an_error(self, tmp_path):
        with pytest.raises(SystemExit, match="No page of"):
            report.main([f"--pages_dir={tmp_path}"])

    def test_a_study_that_does_not_exist_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"small\.yaml"):
            fill_page(EMPTY, tmp_path, tmp_path, picture)
