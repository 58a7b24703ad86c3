"""Makes what the teacher's UNet is trained from: captioned pictures, and an SDXL whose UNet alone is still random.

The VAE learns to reproduce the pictures, the text encoders to tell what their captions say, both from nothing:

    python config/examples/teacher/make_start.py [--folder output/teacher] [--threads 2]

Shapes: B batch, H W picture size, S tokens, K words back, D width of a text encoder.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from simpletuner.atomic import new_folder
from simpletuner.quickstart.drawing import draw, render
from simpletuner.quickstart.judge import accuracy
from simpletuner.quickstart.model import TEACHER, make_pipeline
from simpletuner.quickstart.scenes import PICTURE_SIZES, Scene, make_prompt, make_scene

NUM_PICTURES, PICTURES_SEED = 16000, 1
NUM_VAE_PICTURES = 6000
VAE_STEPS, VAE_BATCH, VAE_LEARNING_RATE = 4000, 16, 3e-3
TEXT_STEPS, TEXT_BATCH, TEXT_LEARNING_RATE = 500, 128, 2e-3
EDGE_WEIGHT = 0.5
"""Of the difference between neighbouring pixels: without it small corners stay round."""
KL_WEIGHT = 5e-4
"""Per latent number. Enough noise in the latents that the decoder forgives a UNet's small mistakes."""
WORDS_BACK = 16
"""A caption of ours has no more words, so that its end tells all of them in order."""


def main() -> None:
    """Writes the parts and ``start`` into the folder; a part that is there already is kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("output/teacher"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, help="make this part alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, make in PARTS.items():
        if arguments.only in (None, name):
            make(arguments.folder)


def make_scenes(folder: Path) -> None:
    """Draws the pictures that the UNet is trained on."""
    draw(folder / "scenes", NUM_PICTURES, PICTURES_SEED)


def make_text(folder: Path) -> None:
    """Trains the text encoders."""
    if not (folder / "text").exists():
        pipeline = make_pipeline(architecture=TEACHER)
        torch.manual_seed(1)
        train_text(pipeline)
        with new_folder(folder / "text") as made:
            for name in ("text_encoder", "text_encoder_2"):
                getattr(pipeline, name).save_pretrained(made / name)


def make_vae(folder: Path) -> None:
    """Trains the VAE."""
    if not (folder / "vae").exists():
        vae = make_pipeline(architecture=TEACHER).vae
        torch.manual_seed(2)
        train_vae(vae)
        with new_folder(folder / "vae") as made:
            vae.save_pretrained(made)


def make_start(folder: Path) -> None:
    """Writes the model whose UNet is random yet."""
    if (folder / "start").exists():
        return
    pipeline = make_pipeline(architecture=TEACHER)
    pipeline.register_modules(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text" / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text" / "text_encoder_2"),
    )
    with new_folder(folder / "start") as made:
        pipeline.save_pretrained(made)
    print(f"wrote {folder / 'start'}", flush=True)


PARTS = {"scenes": make_scenes, "text": make_text, "vae": make_vae, "start": make_start}


def train_vae(vae: AutoencoderKL) -> None:
    """Trains the VAE and sets its scaling factor to what makes the latents' standard deviation 1."""
    pictures = _pictures()
    fresh = [make_prompt(PICTURES_SEED, index) for index in range(60)]
    _start_as_identity(vae)
    network = vae.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), VAE_LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    for step in _steps("VAE", optimizer, VAE_STEPS, VAE_LEARNING_RATE):
        group = pictures[step % len(pictures)]
        pixels = _to_pixels(group[torch.randint(len(group), (VAE_BATCH,))])
        posterior = network.encode(pixels).latent_dist
        decoded = network.decode(posterior.sample()).sample
        difference = decoded - pixels
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = difference.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl
        loss.backward()
        if step % 100 == 0:
            print(f"  difference {difference.abs().mean().item():.4f} edges {edges.item():.4f} kl {kl.item():.2f}")
        if step % 500 == 499:
            print(f"  {accuracy([reconstruct(network, render(scene)) for scene in fresh], fresh)}")
    network.to(memory_format=torch.contiguous_format).eval()
    _normalise_latents(network, pictures)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, picture: Image.Image) -> Image.Image:
    """Returns the picture as it comes back from its latents' mean."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    decoded = vae.decode(vae.encode(_to_pixels(pixels)).latent_dist.mean).sample[0]
    rounded = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(rounded.numpy())


@torch.no_grad()
def _start_as_identity(vae: AutoencoderKL) -> None:
    """Lets a fresh VAE pass colours through: it starts as one that shrinks pictures and enlarges them again.

    From random weights the signal dies out on the way. Runs with this start (and four norm groups and little noise at
    first: the three were not told apart) had a mean difference of 0.095 after 301 steps, without them 0.286.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Conv2d) and not name.endswith("conv1"):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
    # Little noise in the latents at first.
    vae.quant_conv.bias[vae.config["latent_channels"] :] = -3.0


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKL, pictures: list[Tensor]) -> None:
    """Moves each channel's mean to 0 within the two convolutions around the latents, and sets the scaling factor."""
    means = [vae.encode(_to_pixels(group[:200])).latent_dist.mean.flatten(2) for group in pictures]
    latents = torch.cat([mean.transpose(0, 1).flatten(1) for mean in means], dim=1)
    center = latents.mean(1)
    vae.quant_conv.bias[: len(center)] -= center
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ center
    scale = 1 / (latents - center[:, None]).std().item()
    vae.register_to_config(scaling_factor=round(scale, 5))
    print(f"channel means were {center.tolist()}, deviations {latents.std(1).tolist()}; scaling factor {scale:.5f}")


def train_text(pipeline: StableDiffusionXLPipeline) -> None:
    """Trains both text encoders to tell words, their order, and what the caption says of each object.

    The layer before the last, which the UNet is shown, must tell at every word it and the words before it. The second
    encoder's pooled output must tell the attributes.
    """
    scenes = [make_scene(PICTURES_SEED, index) for index in range(NUM_PICTURES)]
    captions = [scene.caption for scene in scenes]
    slots = _attribute_classes(scenes)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    tokens = [_tokenize(tokenizer, captions) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]
    words, classes = torch.unique(tokens[0], return_inverse=True)
    targets = _words_back(classes, tokens[0] == pipeline.tokenizer.eos_token_id)
    heads = nn.ModuleList(nn.Linear(width, WORDS_BACK * len(words)) for width in TEACHER.text_widths)
    slot_heads = nn.ModuleList(nn.Linear(TEACHER.text_widths[1], int(slot.max()) + 1) for slot in slots.T)
    everything = nn.ModuleList([*encoders, heads, slot_heads]).train()
    optimizer = torch.optim.AdamW(everything.parameters(), TEXT_LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    for step in _steps("text encoders", optimizer, TEXT_STEPS, TEXT_LEARNING_RATE):
        rows = torch.randint(len(captions), (TEXT_BATCH,))
        outputs = [encoder(ids[rows], output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
        logits = [head(output.hidden_states[-2]) for head, output in zip(heads, outputs, strict=True)]
        word_losses = [F.cross_entropy(each.view(-1, len(words)), targets[rows].view(-1)) for each in logits]
        told = [head(outputs[1].text_embeds) for head in slot_heads]
        slot_losses = [F.cross_entropy(each, slots[rows, index]) for index, each in enumerate(told)]
        (sum(word_losses) + sum(slot_losses) / len(slot_losses)).backward()
        if step % 100 == 0 or step == TEXT_STEPS - 1:
            right = [float((each.argmax(1) == slots[rows, index]).float().mean()) for index, each in enumerate(told)]
            known = targets[rows] >= 0
            found = [(each.view(*known.shape, -1).argmax(-1) == targets[rows])[known].float().mean() for each in logits]
            print(f"  words told {found[0]:.3f} {found[1]:.3f}; attributes told {min(right):.3f} or better")
    everything.eval()


def _tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns [len(captions), S] ids, as the pipeline makes them."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _words_back(classes: Tensor, is_end: Tensor) -> Tensor:
    """Returns [n, S, K]: the class of the token 0, 1, ... places back; -100 before the text and after its first end."""
    num_ends = is_end.int().cumsum(1)
    targets = torch.full((*classes.shape, WORDS_BACK), -100)
    for back in range(WORDS_BACK):
        targets[:, back:, back] = classes[:, : classes.shape[1] - back]
    return targets.masked_fill(((num_ends > 1) | ((num_ends == 1) & ~is_end))[..., None], -100)


def _attribute_classes(scenes: list[Scene]) -> Tensor:
    """Returns [len(scenes), number of attributes]: which value each attribute of the caption has, as a number."""
    rows: list[tuple[str, ...]] = []
    for scene in scenes:
        first, *others = scene.things
        second = (others[0].size, others[0].color, others[0].shape) if others else ("", "", "")
        where = scene.relation if others else scene.caption.partition(" at the ")[2].partition(" on ")[0]
        background = scene.background
        rows.append((first.size, first.color, first.shape, where, *second, background.color, background.texture))
    columns = [np.unique(column, return_inverse=True)[1] for column in zip(*rows, strict=True)]
    return torch.from_numpy(np.stack(columns, axis=1))


def _pictures() -> list[Tensor]:
    """Returns [n, 3, H, W] uint8 for each size of pictures."""
    groups: list[Tensor] = []
    for first in range(len(PICTURE_SIZES)):
        scenes = (make_scene(PICTURES_SEED, index) for index in range(first, NUM_VAE_PICTURES, len(PICTURE_SIZES)))
        groups.append(torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes])).permute(0, 3, 1, 2))
    return groups


def _to_pixels(pictures: Tensor) -> Tensor:
    """Returns [B, 3, H, W] from -1 to 1, laid out as convolutions with few channels are fastest: three times."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _steps(name: str, optimizer: torch.optim.Optimizer, num_steps: int, learning_rate: float) -> Iterator[int]:
    """Yields the numbers of the steps, and updates the weights after each; the rate rises, then falls as a cosine."""
    started = time.perf_counter()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 50, (1 + math.cos(math.pi * step / num_steps)) / 2)
        optimizer.zero_grad(set_to_none=True)
        yield step
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == num_steps - 1:
            seconds = time.perf_counter() - started
            left = seconds / (step + 1) * (num_steps - step - 1)
            print(f"{name}: step {step + 1} of {num_steps}, {seconds:.0f} s, {left:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
