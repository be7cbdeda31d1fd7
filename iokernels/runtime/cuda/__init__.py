"""CUDA C++ on GPUs and in the emulated GPU: compiled, cached, launched."""
