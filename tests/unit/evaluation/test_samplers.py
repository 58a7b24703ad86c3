"""Which samplers are compared."""

from simpletuner.evaluation.samplers import student_samplers, undistilled_samplers

SCHEDULER = {"_class_name": "LCMScheduler", "beta_schedule": "scaled_linear", "original_inference_steps": 5}


def test_a_student_takes_no_more_steps_than_its_grid_has():
    found = student_samplers(SCHEDULER, {"num_inference_steps": 4, "guidance_scale": 0.0, "eta": 0.3})
    assert [sampler.label for sampler in found] == ["student, 1 step", "student, 2 steps", "student, 4 steps"]
    assert all(sampler.options == {"eta": 0.3} for sampler in found)


def test_rivals_are_three_samplers_with_and_without_guidance():
    labels = [sampler.label for sampler in undistilled_samplers(SCHEDULER)]
    assert len(set(labels)) == len(labels) == 4 * 3 * 2
    assert "teacher, 2 steps, DPM++, guided" in labels
