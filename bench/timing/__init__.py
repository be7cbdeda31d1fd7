"""How long calls take: the protocol, who is timed, and comparisons of versions."""
