"""Backend ``cuda`` of linear_attention. ``launch`` has its entry points."""
