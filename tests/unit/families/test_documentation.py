import re
from pathlib import Path

import torch

from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL

PAGE = Path(__file__).parents[3] / "documentation" / "ADDING_A_FAMILY.md"


def test_the_family_of_the_page_works(tiny_model: Path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), flags=re.DOTALL)
    module: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), module)
    assert module["NAMES"] == ("sdxl-uncropped",)
    family, source = module["PLUGIN"](), ModelSource(str(tiny_model))
    unet = family.load(source)
    cond = {"prompt_embeds": torch.ones(1, 77, 96), "pooled_prompt_embeds": torch.ones(1, 64)}
    inputs = unet, torch.ones(1, 4, 8, 8), torch.tensor([499]), cond
    cropped, whole = torch.tensor([[96.0, 64, 8, 3, 64, 64]]), torch.tensor([[96.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        assert torch.equal(family.forward(*inputs, cropped), SDXL().forward(*inputs, whole))
        assert not torch.equal(family.forward(*inputs, cropped), SDXL().forward(*inputs, cropped))
