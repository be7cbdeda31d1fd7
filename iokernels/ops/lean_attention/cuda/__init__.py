"""Backend ``cuda`` of lean_attention. ``launch`` has its entry points."""
