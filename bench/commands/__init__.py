"""One module a command; :mod:`..cli` imports it when it runs."""
