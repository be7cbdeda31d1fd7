"""Backend ``triton`` of linear_attention. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
