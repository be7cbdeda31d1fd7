"""One file an operator: its inputs, its costs, its peers."""
