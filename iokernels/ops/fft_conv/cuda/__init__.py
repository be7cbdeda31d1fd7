"""Backend ``cuda`` of fft_conv. ``launch`` has its entry points."""
