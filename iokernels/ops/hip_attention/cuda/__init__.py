"""Backend ``cuda`` of hip_attention. ``launch`` has its entry points."""
