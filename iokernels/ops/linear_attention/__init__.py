"""Linear attention and its family. Public functions are in ``api`` and ``delta_api``."""

from .delta_api import gated_delta_rule, gated_delta_rule_step

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]
