"""Backend ``triton`` of hip_attention. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
