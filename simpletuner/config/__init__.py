"""Reads config files into frozen, typed sections; imports neither torch nor diffusers."""

from simpletuner.config.backends import DatasetConfig, TextCacheConfig
from simpletuner.config.errors import UserError
from simpletuner.config.load import default_config_path, load
from simpletuner.config.schema import Config

__all__ = ["Config", "DatasetConfig", "TextCacheConfig", "UserError", "default_config_path", "load"]
