"""What several operators compute with: tiles, windows, partial results, memory orders."""
