import multiprocessing
import os
import shutil
import signal
import time
from itertools import islice
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from simpletuner.config.errors import UserError
from simpletuner.data.cache import Reader
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.geometry import Geometry
from simpletuner.data.identity import Encoding, Ranks
from simpletuner.data.precompute import Cache, outstanding, precompute, prepare
from simpletuner.data.transforms import open_rgb, to_pixels
from tests.unit.data.support import CountingFamily, add_image, dataset, text_cache

SIZES = {"a.png": (64, 64), "b.png": (96, 64), "c.jpg": (64, 64), "d.png": (64, 96), "e.png": (64, 64)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, (name, size) in enumerate(SIZES.items()):
        add_image(tmp_path / "images", name, size, number)
    return tmp_path


def run(root: Path, family: CountingFamily | None = None, vae_dtype: torch.dtype = torch.float32, **values: Any):
    """Returns a family and what it was asked to encode."""
    family = family or CountingFamily()
    cache = precompute(
        prepare([dataset(root, **values)]), text_cache(root), Encoding(family, None, vae_dtype=vae_dtype)
    )
    return family, cache


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in (root / "cache").rglob("*.safetensors")}


def test_the_second_start_loads_no_encoder(root: Path):
    family, _ = run(root)
    assert (family.loaded, len(family.images), len(family.prompts)) == (["vae", "text"], 5, 6)
    before = files(root)
    again, _ = run(root)
    assert (again.loaded, again.images, again.prompts) == ([], [], [])
    assert files(root) == before


def test_latents_are_those_of_the_pixels(root: Path):
    family, cache = run(root, vae_batch_size=1)
    shown: dict[str, torch.Tensor] = {}
    for batch, _ in islice(CachedDataset(cache, family.uncond, 0).batches(), 5):
        shown |= dict(zip(batch.ids, batch.mean, strict=True))
    assert sorted(shown) == sorted(SIZES)
    for name, size in SIZES.items():
        with (root / "images" / name).open("rb") as file:
            pixels = to_pixels(open_rgb(file), Geometry(size, size, 0, 0, size))
        expected, _ = family.encode_image("", pixels[None])
        assert torch.equal(shown[name], expected[0])


@pytest.mark.parametrize(
    ("values", "images", "prompts"),
    [
        ({"resolution": 128}, 5, 0),
        ({"crop": True, "crop_aspect": "square"}, 2, 0),  # the square images are cut as before
        ({"crop_style": "corner"}, 0, 0),  # these images cover their targets exactly
        ({"prepend_instance_prompt": True, "instance_prompt": "photo of"}, 0, 5),
        ({"repeats": 3, "train_batch_size": 1, "probability": 0.5, "write_batch_size": 2, "vae_batch_size": 3}, 0, 0),
    ],
)
def test_a_changed_setting_encodes_what_it_touches(root: Path, values: dict[str, Any], images: int, prompts: int):
    run(root)
    family, _ = run(root, **values)
    assert (len(family.images), len(family.prompts)) == (images, prompts)
    back, _ = run(root)
    assert (back.loaded, len(back.images)) == ([], 0)


def test_a_changed_encoder_encodes_its_own_part_only(root: Path):
    run(root)
    vae, _ = run(root, CountingFamily(vae="another"))
    assert (vae.loaded, len(vae.images)) == (["vae"], 5)
    text, _ = run(root, CountingFamily(text="another"))
    assert (text.loaded, len(text.prompts)) == (["text"], 6)
    half, _ = run(root, vae_dtype=torch.bfloat16)
    assert (half.loaded, len(half.images)) == (["vae"], 5)


def test_changed_files_encode_what_they_touch(root: Path):
    run(root)
    images = root / "images"
    (images / "a.txt").write_text("another caption")
    family, _ = run(root)
    assert (len(family.images), family.prompts) == (0, ["another caption"])
    add_image(images, "c.jpg", (64, 64), seed=77)
    family, _ = run(root)
    assert (len(family.images), family.prompts) == (1, [])
    add_image(images, "new.png", (64, 64), seed=78)
    family, _ = run(root)
    assert (len(family.images), family.prompts) == (1, ["caption of new.png"])


def test_what_is_not_a_change_encodes_nothing(root: Path):
    run(root)
    images = root / "images"
    os.utime(images / "a.png")
    (images / "b.png").rename(images / "z.png")
    (images / "b.txt").rename(images / "z.txt")
    shutil.copy(images / "e.png", images / "copy.png")
    shutil.copy(images / "e.txt", images / "copy.txt")
    (images / "d.png").unlink()
    family, cache = run(root)
    assert family.loaded == []
    assert cache.manifests[0].ids == ["a.png", "c.jpg", "copy.png", "e.png", "z.png"]


def test_a_change_that_keeps_size_and_mtime_is_encoded(root: Path):
    path = add_image(root / "images", "f.bmp", (64, 64), seed=98)
    run(root)
    before = path.stat()
    add_image(root / "images", "f.bmp", (64, 64), seed=99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert len(run(root)[0].images) == 1


def test_an_image_that_does_not_decode_changes_no_other(tmp_path: Path):
    for folder in ("whole", "broken"):
        for number in range(6):
            add_image(tmp_path / folder / "images", f"{number}.png", (64, 64), number)
    path = tmp_path / "broken" / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:-300])
    (_, whole), (family, broken) = run(tmp_path / "whole"), run(tmp_path / "broken")
    data = CachedDataset(broken, family.uncond, 0)
    assert data.problems == {"pictures": {"truncated or corrupt": ("2.png",)}}
    assert data.sampler.datasets[0].bucket_sizes == (5,)
    places = [c.latents[0].places(c.buckets[0][0].keys).tolist() for c in (whole, broken)]
    assert [place >= 0 for place in places[1]] == [True, True, False, True, True, True]
    for number in (0, 1, 3, 4, 5):
        a, b = (Reader(c.latents[0]).row(own[number]) for c, own in zip((whole, broken), places, strict=True))
        assert torch.equal(a["mean"], b["mean"])
    again, _ = run(tmp_path / "broken")
    assert again.loaded == []  # it is not tried again until the file changes
    add_image(tmp_path / "broken" / "images", "2.png", (64, 64), 2)
    assert len(run(tmp_path / "broken")[0].images) == 1


def test_no_image_that_decodes_is_one_line(tmp_path: Path):
    path = add_image(tmp_path / "images", "a.png", (64, 64))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(
        UserError, match=r"^dataset 'pictures': .*none of its 1 images can be used: truncated or corrupt$"
    ):
        run(tmp_path)


def test_a_file_that_changes_under_its_encoder_is_left_for_the_next_start(root: Path):
    class Editing(CountingFamily):
        def load_encoders(self, *args: Any, **kwargs: Any) -> str:
            add_image(root / "images", "a.png", (64, 64), seed=77, caption=None)
            return super().load_encoders(*args, **kwargs)

    family, cache = run(root, Editing())
    data = CachedDataset(cache, family.uncond, 0)
    assert data.problems == {"pictures": {"could not be read when it was to be encoded": ("a.png",)}}
    again, cache = run(root)
    assert len(again.images) == 1
    assert CachedDataset(cache, again.uncond, 0).problems == {"pictures": {}}


def test_infinite_latents_name_the_image_and_what_to_change(root: Path):
    class Overflowing(CountingFamily):
        def encode_image(self, encoders: str, pixels: torch.Tensor):
            mean, std = super().encode_image(encoders, pixels)
            mean[-1, 0, 0, 0] = float("nan")
            return mean, std

    with pytest.raises(
        UserError, match=r"^dataset 'pictures': the VAE gives NaN or infinity for 'c.jpg': set vae_dtype"
    ):
        run(root, Overflowing())
    assert files(root) == {}


class Suicidal(CountingFamily):
    """Dies without warning at its n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def count(self) -> None:
        self.calls -= 1
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def encode_image(self, encoders: str, pixels: torch.Tensor):
        self.count()
        return super().encode_image(encoders, pixels)

    def encode_prompt(self, encoders: str, prompts: list[str]):
        self.count()
        return super().encode_prompt(encoders, prompts)


def die(root: Path, moment: str, count: int) -> None:
    """Fills the caches in a process that kills itself at the count-th encoding or at the count-th fsync of a file."""
    torch.set_num_threads(1)
    family, original = Suicidal(count if moment == "encode" else -1), os.fsync

    def fsync(file: Any) -> None:
        nonlocal count
        count -= moment == "fsync"
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(file)

    os.fsync = fsync
    run(root, family, write_batch_size=2, vae_batch_size=1)


def test_killed_anywhere_the_next_start_completes_to_the_same_bytes(root: Path):
    shutil.copytree(root, root / "straight")
    run(root / "straight", write_batch_size=2, vae_batch_size=1)
    expected = files(root / "straight")
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit a locked mutex
    context.set_forkserver_preload([__name__])
    died: list[str] = []
    for moment, stride in (("encode", 1), ("fsync", 3)):
        for count in range(1, 20, stride):
            victim = context.Process(target=die, args=(root, moment, count))
            victim.start()
            victim.join(60)
            if victim.exitcode == 0:
                break
            assert victim.exitcode == -signal.SIGKILL
            died.append(moment)
            assert files(root).items() <= expected.items()
            run(root, write_batch_size=2, vae_batch_size=1)
            assert files(root) == expected
            shutil.rmtree(root / "cache")
        shutil.rmtree(root / "cache", ignore_errors=True)
    # Encoded: 5 images, the empty prompt, 2 batches of captions. Written, each with an fsync of file and folder: a
    # manifest three times, 4 shards of latents, 3 of text.
    assert (died.count("encode"), died.count("fsync")) == (8, 7)


def test_ranks_share_the_work_and_end_with_the_same_bytes(root: Path):
    shutil.copytree(root, root / "alone")
    settings = {"write_batch_size": 1, "vae_batch_size": 1}
    run(root / "alone", **settings)
    barrier = Barrier(2, timeout=20)
    families, caches = [CountingFamily(), CountingFamily()], dict[int, Cache]()

    def work(rank: int) -> None:
        def wait() -> None:
            barrier.wait()
            time.sleep(0.3 * rank)  # the other rank must not go ahead and change what this one plans from

        ranks = Ranks(rank, 2, wait)
        manifests = prepare([dataset(root, **settings)], ranks)
        caches[rank] = precompute(manifests, text_cache(root), Encoding(families[rank], None), ranks=ranks)

    threads = [Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(root) == files(root / "alone")
    assert sorted(len(family.images) for family in families) == [2, 3]
    assert sorted(len(family.prompts) for family in families) == [2, 4]
    (one, two) = (cache.latents[0] for cache in caches.values())
    assert (one.shards, one.keys.tolist(), one.key_places.tolist()) == (
        *(two.shards, two.keys.tolist(), two.key_places.tolist()),
    )
    assert [p.name for p in (root / "cache" / "vae").iterdir() if "part" in p.name] == []


def test_two_runs_that_share_a_cache_do_no_harm(root: Path):
    results: list[Cache] = []
    threads = [Thread(target=lambda: results.append(run(root)[1])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    shutil.copytree(root / "images", root / "alone" / "images")
    run(root / "alone")
    assert files(root) == files(root / "alone")


def test_equal_captions_and_images_are_encoded_once(tmp_path: Path):
    for number in range(4):
        add_image(tmp_path / "images", f"{number}.png", (64, 64), seed=0, caption="the same")
    family, cache = run(tmp_path)
    assert (len(family.images), family.prompts) == (1, ["", "the same"])
    assert CachedDataset(cache, family.uncond, 0).sampler.datasets[0].num_samples == 4


def test_a_prompt_is_encoded_alone_even_when_a_caption_has_its_words(root: Path):
    batches: list[list[str]] = []

    class Listening(CountingFamily):
        def encode_prompt(self, encoders: str, prompts: list[str]):
            batches.append(prompts)
            return super().encode_prompt(encoders, prompts)

    (root / "images" / "a.txt").write_text("the words")
    encoding = Encoding(Listening(), "source")
    precompute(prepare([dataset(root)]), text_cache(root), encoding, ["the words"])
    assert batches[:2] == [[""], ["the words"]]
    assert sum("the words" in batch for batch in batches) == 2


def test_extra_prompts_are_encoded_beside_the_captions(root: Path):
    family = CountingFamily()
    prompts = ["a prompt", "blurry", "a prompt"]
    cache = precompute(prepare([dataset(root)]), text_cache(root), Encoding(family, None), prompts)
    expected = CountingFamily().encode_prompt("", ["blurry"])
    assert torch.equal(cache.prompt("blurry")["tokens"], expected["tokens"])
    assert cache.prompt("")["pooled"].shape == (1, 6)
    assert sorted(family.prompts) == sorted(["", "a prompt", "blurry", *(f"caption of {name}" for name in SIZES)])
    with pytest.raises(KeyError):
        cache.prompt("never encoded")


def test_outstanding_says_what_is_missing_before_anything_is_encoded(root: Path):
    family = CountingFamily()
    encoding = Encoding(family, None)
    manifests = prepare([dataset(root)])
    latents, text = outstanding(manifests, text_cache(root), encoding, 12, ["a prompt"])
    size = 3 * 4 * 2 * (3 * 8 * 8 + 2 * 8 * 12)  # C float32 mean+std (3 squares, 2 of 64 x 96)
    assert (latents.total, latents.missing, latents.total_bytes, latents.missing_bytes) == (5, 5, size, size)
    assert (text.total, text.missing, text.missing_bytes) == (7, 7, 7 * 12 * 4)
    assert family.loaded == []
    cache = precompute(manifests, text_cache(root), encoding)
    stored = sum(p.stat().st_size for p in cache.latents[0].shards)
    assert size < stored < size + 4096 * len(cache.latents[0].shards)
    latents, text = outstanding(prepare([dataset(root)]), text_cache(root), encoding, 12, ["a prompt"])
    assert (latents.missing, latents.missing_bytes, text.missing) == (0, 0, 1)


def test_progress_tells_how_much_of_what_is_done(root: Path):
    told: list[tuple[int, int, str]] = []
    precompute(
        prepare([dataset(root)]), text_cache(root), Encoding(CountingFamily(), None), progress=lambda *a: told.append(a)
    )
    assert [t for t in told if "reading" in t[2]] == [(5, 5, "pictures: reading files")]
    assert [t[:2] for t in told if "images" in t[2]][-1] == (5, 5)
    assert [t[:2] for t in told if "captions" in t[2]][-1] == (6, 6)


def test_nothing_is_written_beside_the_images(root: Path):
    before = sorted(path.name for path in (root / "images").rglob("*"))
    run(root)
    assert sorted(path.name for path in (root / "images").rglob("*")) == before
