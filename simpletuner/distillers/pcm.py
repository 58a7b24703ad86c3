"""Phased consistency distillation (arXiv 2405.18407): ``lcm`` whose jumps end at the start of a phase.

The way from noise to picture is cut into M phases, and the student learns to cross each in one step: easier than the
whole way at once, and M steps of sampling need no new noise in between. The adversarial loss of the paper is no part
of it.
"""

from simpletuner.config.fields import setting
from simpletuner.distillers._edges import EdgePolicy
from simpletuner.distillers.lcm import LCM, LCMConfig


class PCMConfig(LCMConfig):
    """Options of ``distillation_method: pcm``: those of lcm, with other defaults."""

    num_ddim_timesteps: int = setting(
        40, "must_match", "Steps of the teacher's solver; num_phases must divide it: 40 serves 4 and 8 phases.", ge=1
    )
    edge_policy: EdgePolicy = setting("phased", "must_match", "Where jumps end: at the start of the phase.")


class PCM(LCM):
    """The student jumps from any noise time to the start of its phase."""

    Config = PCMConfig


PLUGIN = PCM
