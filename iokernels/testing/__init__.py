"""What proves a kernel: error budgets, input generators, the interpreter harness, the IO tracer."""
