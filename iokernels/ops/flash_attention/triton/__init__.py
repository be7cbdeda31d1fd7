"""Backend ``triton`` of flash_attention. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
