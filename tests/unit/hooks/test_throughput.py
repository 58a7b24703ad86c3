from simpletuner.hooks.throughput import ThroughputHook
from simpletuner.training.state import TrainState


def test_the_table_has_medians_without_the_first_reading():
    hook, state = ThroughputHook(), TrainState(10)
    for samples, wait, memory in ((1.0, 0.9, 1.0), (10.0, 0.02, 2.0), (30.0, 0.04, 2.5), (20.0, 0.03, 2.25)):
        row = {"samples_per_second": samples, "data_wait": wait, "peak_memory_gib": memory}
        hook.on_step(state, {**row, "tflops_per_second": samples / 100, "loss": 1.0})
        hook.on_step(state, None)
    heading, figures = hook.table().splitlines()
    assert heading.split("  ") == ["samples/s", "TFLOP/s", "waiting for data", "most memory, GiB"]
    assert figures.split() == ["20", "0.2", "3.0%", "2.50"]
    assert len(heading) == len(figures)


def test_a_run_of_one_reading_has_a_table_too():
    hook = ThroughputHook()
    hook.on_step(TrainState(1), {"samples_per_second": 4.0, "mfu": 0.41})
    assert hook.table().split() == ["samples/s", "of", "the", "device's", "peak", "4", "41%"]
