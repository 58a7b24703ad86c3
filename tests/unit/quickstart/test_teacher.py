"""The script that makes the model from which the teacher is trained."""

import runpy
from pathlib import Path

import torch

from simpletuner.quickstart.model import TINY, make_pipeline

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "config/examples/teacher/make_start.py"))


def test_latents_are_normalised_and_pictures_stay_as_they_were():
    vae = make_pipeline(architecture=TINY).vae
    with torch.no_grad():
        vae.quant_conv.bias[:4] = torch.tensor([1.0, -2.0, 3.0, 0.5])
    pictures = [torch.randint(0, 256, (6, 3, *size), dtype=torch.uint8) for size in ((64, 64), (64, 80))]
    pixels = SCRIPT["_to_pixels"](pictures[1])
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        SCRIPT["_normalise_latents"](vae, pictures)
        latents = [vae.encode(SCRIPT["_to_pixels"](group)).latent_dist.mean for group in pictures]
        after = vae.decode(latents[1]).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    scaled = vae.config["scaling_factor"] * torch.cat([each.transpose(0, 1).flatten(1) for each in latents], dim=1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.std(), torch.tensor(1.0), rtol=1e-3, atol=0)


def test_each_word_is_to_tell_the_words_before_it_up_to_the_first_end():
    classes = torch.tensor([[7, 4, 5] + 17 * [9]])  # start, two words, the end, and padding with it
    targets = SCRIPT["_words_back"](classes, classes == 9)
    assert targets[0, :, :4].tolist() == [
        [7, -100, -100, -100],
        [4, 7, -100, -100],
        [5, 4, 7, -100],
        [9, 5, 4, 7],
        *[[-100] * 4] * 16,
    ]


def test_attributes_tell_two_captions_apart_whatever_differs():
    make_scene = SCRIPT["make_scene"]
    scenes = [make_scene(0, index) for index in range(400)]
    classes = SCRIPT["_attribute_classes"](scenes)
    # Row by row: the same caption if and only if the same attributes.
    assert len({tuple(row) for row in classes.tolist()}) == len({scene.caption for scene in scenes})
