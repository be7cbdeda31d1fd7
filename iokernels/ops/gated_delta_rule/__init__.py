"""The gated delta rule: a state that erases what it overwrites. Public functions are in ``api``."""

from .api import gated_delta_rule, gated_delta_rule_step

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]
