"""Backend ``triton`` of gated_delta_rule. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
