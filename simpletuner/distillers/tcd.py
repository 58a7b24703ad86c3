"""Trajectory consistency distillation (arXiv 2402.19159): ``lcm`` whose jumps end at a random time below.

What is compared is the noisy picture at that time. So the student can also stop on the way, and sampling can choose
how much new noise each step gets (the paper's gamma, diffusers' eta).
"""

from simpletuner.config.fields import setting
from simpletuner.distillers._edges import EdgePolicy
from simpletuner.distillers.lcm import LCM, LCMConfig


class TCDConfig(LCMConfig):
    """Options of ``distillation_method: tcd``: those of lcm, with other defaults."""

    edge_policy: EdgePolicy = setting("random", "must_match", "Where jumps end: at a random grid time below.")


class TCD(LCM):
    """The student jumps from any noise time to any lower one, along one straight line."""

    Config = TCDConfig


PLUGIN = TCD
