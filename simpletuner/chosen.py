"""The plug-ins that a config names, and what the headers of its model tell."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from simpletuner import registry
from simpletuner.config.errors import Problems, UserError
from simpletuner.config.schema import Config
from simpletuner.config.sections import ModelSection
from simpletuner.distillers._base import Distiller
from simpletuner.families._base import Facts, ModelFamily
from simpletuner.families._source import ModelSource
from simpletuner.optimizers._base import OptimizerPlugin


@dataclass(frozen=True)
class Chosen:
    """The plug-ins that the config names, and what the model's headers tell."""

    family: ModelFamily
    source: ModelSource
    facts: Facts
    method: str
    distiller: type[Distiller]
    optimizer: OptimizerPlugin


def source_of(model: ModelSection) -> ModelSource:
    """Returns where the model of a config comes from."""
    return ModelSource(
        path=model.pretrained_model_name_or_path,
        vae_path=model.pretrained_vae_model_name_or_path,
        unet_path=model.pretrained_unet_model_name_or_path,
        revision=model.revision,
        variant=model.variant,
        single_file_config=model.single_file_config,
    )


def choose(config: Config) -> Chosen:
    """Returns the plug-ins of a config; needs no data, so that the scan can wait for it.

    Raises:
        UserError: One line for each name that is unknown, each package that is missing and each path that is no model.
    """
    problems, model = Problems(), config.model
    method = config.distillation.distillation_method or "sft"
    source = source_of(model)
    family = problems.attempt(lambda: registry.load("families", model.model_family, "model_family")().for_model(source))
    facts = problems.attempt(lambda: family.facts(source)) if family else None
    distiller = problems.attempt(lambda: registry.load("distillers", method, "distillation_method"))
    optimizer = problems.attempt(lambda: registry.load("optimizers", config.optimizer.optimizer, "optimizer"))
    if optimizer is not None:
        problems.attempt(lambda: optimizer.keywords(config.optimizer))
    problems.attempt(lambda: _check_attention(model.attention_mechanism))
    problems.raise_any()
    assert family
    assert facts
    assert distiller
    assert optimizer
    return Chosen(family, source, facts, method, distiller, optimizer)


def _check_attention(mechanism: str) -> None:
    """Raises UserError for a kernel that this machine cannot run."""
    if mechanism != "xformers":
        return
    if find_spec("xformers") is None:
        raise UserError("attention_mechanism: 'xformers' needs its package: pip install \"simpletuner[xformers]\"")
    if not torch.cuda.is_available():
        raise UserError("attention_mechanism: 'xformers' needs a CUDA device, and there is none; use 'diffusers'")
