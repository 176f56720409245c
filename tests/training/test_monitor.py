import torch

from sdt_diffusion.training.monitor import StepValues, TrainingLog, read_log


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


def test_values_are_read_once_and_in_order_and_late_if_the_device_is_ahead():
    values = StepValues(torch.device("cpu"))
    values.put(1, torch.tensor([1.0, 2.0]))
    assert list(values.pop(everything=False)) == [(1, [1.0, 2.0])]

    late = StepValues(torch.device("cuda"))  # as if the tensors below were there
    seen = []
    for step in (1, 2, 3):
        late.put(step, torch.tensor([float(step)]))
        seen.append(list(late.pop(everything=False)))
    assert seen == [[], [(1, [1.0])], [(2, [2.0])]]
    assert list(late.pop(everything=True)) == [(3, [3.0])]
    assert list(late.pop(everything=True)) == []
