"""Backend ``cuda`` of flash_attention. ``launch`` has its entry points."""
