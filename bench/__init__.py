"""The command line: check, time and describe every operator."""

if __name__ != "iokernels.bench":
    raise ImportError("import iokernels.bench: the top-level name would be a second copy of the package")
