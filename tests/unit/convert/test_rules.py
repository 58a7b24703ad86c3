"""Command lines of the scripts, and what they become; ``published`` holds those of the scripts' own documentation."""

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config import Config, UserError, load
from simpletuner.convert.rules import Conversion, convert, write

PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.sh"))
SD = "accelerate launch train_lcm_distill_sd_wds.py --pretrained_teacher_model=a/b --train_shards_path_or_url=x.tar "
SDXL = "accelerate launch train_lcm_distill_lora_sdxl.py --pretrained_teacher_model=a/b --train_data_dir=there "


def loaded(conversion: Conversion, folder: Path, **environ: str) -> Config:
    """Writes and loads the two files."""
    (folder / "here" / "datasets" / "naruto-blip-captions").mkdir(parents=True)
    (folder / "here" / "datasets" / "there").mkdir()
    write(conversion, folder / "config")
    return load(folder / "config", environ=environ, working_dir=folder / "here")


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        convert(text, {})
    return list(caught.value.lines)


def method(conversion: Conversion) -> dict[str, Any]:
    value: Any = conversion.config["distillation_config"]
    return value["lcm"]


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_commands_convert_and_load(file: Path, tmp_path: Path):
    conversion = convert(file.read_text(encoding="utf8"), {})
    config = loaded(conversion, tmp_path, MODEL_DIR="some/model")
    family, _, kind = file.stem.partition("_")
    assert config.model.model_family == {"sd": "sd1x", "sdxl": "sdxl"}[family]
    assert config.model.model_type == ("full" if kind == "full" else "lora")
    assert config.run.mixed_precision == "fp16"
    assert config.optimizer.optimizer == "bnb-adamw8bit"
    assert config.run.max_train_steps == (3000 if kind == "lora_folder" else 1000)
    assert config.optimizer.learning_rate == (1e-6 if kind == "full" else 1e-4)
    assert config.optimizer.adam_weight_decay == (0.01 if kind == "lora_folder" else 0.0)
    assert config.run.checkpoints_total_limit == (0 if kind == "lora_folder" else 10)
    assert config.run.resume_from_checkpoint == (None if kind == "lora_folder" else "latest")
    assert (config.lora.lora_alpha, config.model.gradient_checkpointing) == (None if kind == "full" else 64, True)
    assert config.distillation.distillation_config["w_min"] == (5.0 if family == "sd" else 3.0)
    assert config.distillation.distillation_config["loss_type"] == ("l2" if kind == "lora_folder" else "huber")
    (dataset,) = config.datasets
    edge = 512 if family == "sd" else 1024
    assert (dataset.resolution, dataset.resolution_type, dataset.crop, dataset.crop_style) == (
        edge,
        "pixel",
        True,
        "random",
    )
    assert config.validation.resolutions == ((edge, edge),)
    assert dataset.minimum_image_size == (700 if family == "sdxl" and kind != "lora_folder" else None)
    assert dataset.type == ("local" if kind == "lora_folder" else "webdataset")


def test_the_pipe_around_a_url_is_taken_off():
    made = convert(PUBLISHED[0].read_text(encoding="utf8"), {})
    (entry,) = made.datasets
    assert str(entry["shards"]).startswith("https://huggingface.co/datasets/laion/conceptual")
    assert str(entry["shards"]).endswith("/{00000..01099}.tar?download=true")
    assert (entry["vae_cache_disable"], entry["text_cache_disable"]) == (True, True)  # the scripts cache nothing
    assert any("downloaded before training" in notice for notice in made.notices)
    for place, plain in {
        "pipe:curl -fsSL https://a/{0..9}.tar": "https://a/{0..9}.tar",
        "pipe:wget -qO- http://a/x.tar?y=z": "http://a/x.tar?y=z",
        "pipe:cat shards/{0..9}.tar": "shards/{0..9}.tar",
    }.items():
        made = convert(f"{SD} --max_train_steps 1 --train_shards_path_or_url '{place}'", {})
        assert made.datasets[0]["shards"] == plain
        assert any("downloaded before training" in notice for notice in made.notices) is plain.startswith("http")
    for place in (
        "pipe:curl -s https://a/x.tar | cat",
        "pipe:curl -H secret https://a/x.tar",  # without the header it would be another file
        "pipe:cat a.tar b.tar",
        "pipe:aws s3 cp s3://a/x.tar -",
    ):
        made = convert(f"{SD} --max_train_steps 1 --train_shards_path_or_url '{place}'", {})
        assert made.datasets[0]["shards"] == place
        assert any("it runs a command" in notice for notice in made.notices)


def test_the_scripts_defaults_are_written_where_ours_differ(tmp_path: Path):
    conversion = convert(SD + "--max_train_steps 7", {})
    config = loaded(conversion, tmp_path)
    assert (config.run.train_batch_size, config.data.vae_batch_size) == (16, 32)
    assert (config.run.checkpoints_total_limit, config.run.resume_from_checkpoint) == (0, None)
    assert (config.run.allow_tf32, config.model.gradient_checkpointing) == (False, False)
    assert (config.run.mixed_precision, config.optimizer.optimizer) == ("no", "adamw")
    assert (config.optimizer.lr_scheduler, config.optimizer.lr_warmup_steps) == ("constant", 0)
    assert config.validation.validation_step_interval == 200
    assert method(conversion) == {
        "w_min": 5.0,
        "w_max": 15.0,
        "num_ddim_timesteps": 50,
        "loss_type": "l2",
        "huber_c": 0.001,
        "timestep_scaling_factor": 10.0,
        "ema_decay": 0.95,
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--lr_scheduler=cosine", {"lr_scheduler": "cosine", "lr_warmup_steps": 500}),
        ("--use_8bit_adam", {"optimizer": "bnb-adamw8bit"}),
        ("--enable_xformers", {"attention_mechanism": "xformers"}),  # argparse takes beginnings of names
        ("--resolution 520", {"resolution": 520, "aspect_bucket_alignment": 8}),
        ("--proportion_empty_prompts=0.1", {"caption_dropout_probability": 0.1}),
        ("--teacher_revision fp16", {"revision": "fp16"}),
        ("--output_dir one --output_dir 'my results'", {"output_dir": "my results"}),
    ],
)
def test_flags_become_keys(flags: str, expected: dict[str, Any]):
    config = convert(f"{SD} --max_train_steps 7 {flags}", {}).config
    assert expected.items() <= config.items()


def test_pictures_and_layers():
    made = convert(SDXL + "--center_crop --random_flip --lora_target_modules 'to_q, to_k' --max_train_samples 9", {})
    assert made.config["peft_lora_target_modules"] == ["to_q", "to_k"]
    assert made.datasets[0]["crop_style"] == "center"
    assert made.datasets[0]["random_flip"] is True
    assert (made.config["num_train_epochs"], made.config["max_train_samples"]) == (100, 9)
    assert "max_train_steps" not in made.config
    assert 'load_dataset("imagefolder", data_dir="there")' in made.first


def test_steps_are_counted_where_only_an_epoch_is_given():
    flags = "--max_train_samples 1000 --train_batch_size 8 --num_train_epochs 3 --dataloader_num_workers 2"
    text = SD.replace("launch", "launch --num_processes 4") + flags + " --gradient_accumulation_steps 5"
    # 1000 / (8 x 4 x 2), rounded up for each worker: 16 x 2 batches, 7 updates an epoch.
    assert convert(text, {}).config["max_train_steps"] == 21
    assert problems(SD) == ["--max_train_steps: required, or --max_train_samples: how long the run is"]


def test_what_the_launcher_is_told():
    launcher = "--multi_gpu --num-processes=4 --mixed_precision BF16 --gpu_ids 0,1 --main_process_port 29501 -q"
    text = "NCCL_DEBUG=INFO " + SD.replace("launch", f"launch {launcher}") + "--max_train_steps 2"
    made = convert(text, {})
    assert made.environment == {
        "TRAINING_NUM_PROCESSES": "4",
        "ACCELERATE_EXTRA_ARGS": "--gpu_ids 0,1 --main_process_port 29501",
        "NCCL_DEBUG": "INFO",
    }
    assert made.config["mixed_precision"] == "bf16"
    assert convert(text + " --mixed_precision=fp16", {}).config["mixed_precision"] == "fp16"


def test_accelerates_own_file_decides_the_precision_as_for_the_script(tmp_path: Path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("mixed_precision: bf16\n")
    made = convert(SD + "--max_train_steps 2", {"HF_HOME": str(tmp_path)})
    assert "mixed_precision" not in made.config


def test_a_variable_is_taken_from_the_text_then_from_the_environment():
    text = "export B=text\n" + SD.replace("a/b", "$A/${B}") + "--max_train_steps 2 --output_dir $C"
    made = convert(text, {"A": "environment", "B": "other"})
    assert made.config["pretrained_model_name_or_path"] == "environment/text"
    assert made.config["output_dir"] == "{env:C}"
    assert "C: set nowhere in the command: export it before the run" in made.notices


def test_what_is_ignored_there_is_said():
    made = convert(SD + "--max_train_steps 2 --scale_lr --random_flip --cast_teacher_unet", {})
    assert "scale_lr" not in made.config
    assert "--scale_lr: left out: the script ignores it; write scale_lr if you mean it" in made.notices
    assert "--random_flip: the script ignores it; here it acts" in made.notices
    assert any(notice.startswith("--cast_teacher_unet: needs nothing here: ") for notice in made.notices)
    assert convert(SDXL + "--scale_lr", {}).config["scale_lr"] is True


def test_a_secret_is_not_copied():
    made = convert(SDXL + "--hub_token hf_secret --max_train_steps 1", {})
    assert "hf_secret" not in json.dumps([made.config, made.datasets, made.notices])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("accelerate launch other.py", "no command line of these scripts"),
        (SD + "--max_train_stepz 4", "it has no such flag - did you mean 'max_train_steps'?"),
        (SD + "--lora_rank 4", "it has no such flag"),
        (SD + "--max_train_steps", "its value is missing"),
        (SD + "--max_train_steps four", "it must be a whole number above 0"),
        (SD + "--max_train_steps 4 --learning_rate fast", "--learning_rate: 'fast' is not a number"),
        (SD + "--max_train_steps 4 --unet_time_cond_proj_dim 128", "only 256 is supported"),
        (SD + "--max_train_steps 4 --resolution 500", "500 is not a multiple of 8 px"),
        (SD + "'--output_dir", "a quote is not closed"),
        (SD + "--output_dir $(date)", "runs a command"),
        (SD.replace("launch", "launch --use_fsdp"), "sharding over GPUs is not built"),
        (SD.replace("launch", "launch --zero_stage 3"), "sharding over GPUs is not built"),
        (SD.replace("accelerate launch", "torchrun --nproc_per_node 2"), "write the command as accelerate launch"),
        ("python train_lcm_distill_lora_sdxl.py --pretrained_teacher_model a/b", "--dataset_name: required"),
    ],
)
def test_what_cannot_be_converted_is_one_line(text: str, line: str):
    found = problems(text)
    assert len(found) == 1 or "unet" not in line
    assert any(line in one for one in found)


def test_files_that_are_there_are_kept(tmp_path: Path):
    made = convert(SDXL, {})
    write(made, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write(made, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
