"""Backend ``triton`` of short_conv. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
