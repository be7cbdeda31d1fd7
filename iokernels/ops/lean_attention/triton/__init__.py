"""Backend ``triton`` of lean_attention. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
