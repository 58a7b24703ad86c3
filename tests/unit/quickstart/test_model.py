from pathlib import Path

import torch

from simpletuner.quickstart.model import TEACHER, make_pipeline, make_tokenizers, write_model
from simpletuner.quickstart.scenes import make_scene
from simpletuner.quickstart.vocabulary import WORDS, make_tokenizer


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_model_is_a_function_of_the_seed_and_leaves_random_numbers_alone(tiny_model: Path, tmp_path: Path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = write_model(tmp_path / "again")
    assert torch.equal(torch.rand(3), expected)
    assert _files(again) == _files(tiny_model)
    other = make_pipeline(seed=1).unet.state_dict()
    assert not torch.equal(other["conv_in.weight"], make_pipeline().unet.state_dict()["conv_in.weight"])


def test_model_is_written_once(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    (folder / "vae/config.json").write_text("kept")
    write_model(folder)
    assert (folder / "vae/config.json").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_stock_diffusers_opens_it_and_draws(tiny_model: Path):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model, use_safetensors=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(make_scene(0, 0).caption, height=64, width=96, num_inference_steps=2).images[0]
    assert picture.size == (96, 64)
    assert pipeline.vae_scale_factor == 8
    assert pipeline.tokenizer_2.pad_token == "!"
    assert sum(value.numel() for value in pipeline.unet.parameters()) < 1_200_000


def test_words_are_single_tokens_and_any_text_can_be_written():
    tokenizer = make_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word  # start, word, end
    text = "Größe 42, naïve!"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == "größe42,naïve!"
    tokens = tokenizer(make_scene(0, 8).caption).input_ids
    assert len(tokens) <= 77
    assert tokens[-1] == max(tokens) == tokenizer.eos_token_id == len(tokenizer) - 1


def test_teacher_is_small_enough_for_the_repository_and_reads_whole_captions():
    pipeline = make_pipeline(architecture=TEACHER)
    networks = (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    assert 2 * sum(value.numel() for network in networks for value in network.state_dict().values()) < 12e6
    for tokenizer in make_tokenizers(TEACHER):
        lengths = [len(tokenizer(make_scene(0, index).caption).input_ids) for index in range(500)]
        assert max(lengths) <= TEACHER.num_tokens == tokenizer.model_max_length
    tokens = pipeline.encode_prompt("a small red star left of a large blue ring on a yellow background")[0]
    assert tokens.shape == (1, TEACHER.num_tokens, sum(TEACHER.text_widths))
