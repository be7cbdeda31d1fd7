"""Backend ``triton`` of fft_conv. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
