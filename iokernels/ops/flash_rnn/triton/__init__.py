"""Backend ``triton`` of flash_rnn. ``launch`` has its entry points; reading ``tuning`` needs no Triton."""
