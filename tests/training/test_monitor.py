from sdt_diffusion.training.monitor import TrainingLog, read_log


def test_a_resumed_log_drops_the_steps_to_be_repeated(tmp_path):
    log = TrainingLog(tmp_path, start_step=0)
    for step in (10, 20, 30):
        log.append({"step": step, "loss": 1 / step})
    with log.path.open("a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    assert [record["step"] for record in read_log(tmp_path)] == [10, 20, 30]

    resumed = TrainingLog(tmp_path, start_step=20)
    resumed.append({"step": 30, "loss": 0.5})
    assert read_log(tmp_path) == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 30, "loss": 0.5}]


def test_a_run_without_a_log_has_no_records(tmp_path):
    assert read_log(tmp_path) == []
