"""The datasets of ``dataset_type: eval``: never trained on, they tell how the loss is on pictures that are new."""

from collections.abc import Iterable

from simpletuner.config.backends import DatasetConfig
from simpletuner.config.findings import Findings
from simpletuner.config.validation import ValidationSection


def as_measured(
    datasets: Iterable[DatasetConfig],
    trained: Iterable[DatasetConfig],
    section: ValidationSection,
    findings: Findings,
) -> tuple[DatasetConfig, ...]:
    """Returns the datasets whose loss is measured, as they are shown for that.

    One picture at a time, never mirrored, from the caches: so neither the batch size of a run nor the number of its
    processes decides which noise a picture meets, and two runs compare.

    Args:
        datasets: Of ``dataset_type: eval``.
        trained: The others.
        section: With the ``eval_*`` options.
        findings: Where mistakes and notices go.
    """
    datasets = tuple(datasets)
    chosen = tuple(dataset for dataset in datasets if section.eval_dataset_id in (None, dataset.id))
    if section.eval_dataset_id is not None and datasets and not chosen:
        known = ", ".join(dataset.id for dataset in datasets)
        findings.problems.append(
            f"eval_dataset_id: there is no dataset '{section.eval_dataset_id}' of dataset_type eval; there is {known}"
        )
    folders = {dataset.instance_data_dir: dataset.id for dataset in trained if dataset.type == "local"}
    for dataset in chosen:
        if dataset.type == "local" and (other := folders.get(dataset.instance_data_dir)):
            findings.notices.append(
                f"dataset '{dataset.id}': '{other}' trains on its pictures, so its loss tells nothing of new ones"
            )
    return tuple(
        dataset.model_copy(
            update={
                "max_num_samples": min(dataset.max_num_samples or section.num_eval_images, section.num_eval_images),
                "train_batch_size": 1,
                "repeats": 0,
                "probability": 1.0,
                "random_flip": False,
                "vae_cache_disable": False,
                "vae_cache_clear_each_epoch": False,
                "text_cache_disable": False,
                "start_step": 0,
                "end_step": None,
                "start_epoch": 1,
                "end_epoch": None,
            }
        )
        for dataset in chosen
    )
