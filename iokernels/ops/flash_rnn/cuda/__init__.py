"""Backend ``cuda`` of flash_rnn. ``launch`` has its entry points."""
