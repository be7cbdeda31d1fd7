"""What proves a kernel.

* :mod:`~iokernels.testing.budget`: how far from the float64 result a kernel may be;
* :mod:`~iokernels.testing.inputs`: values and memory layouts that find mistakes;
* :mod:`~iokernels.testing.layouts`: every layout that a tensor can have in memory, bits of a view included;
* :mod:`~iokernels.testing.tracer`: every byte that an interpreted kernel touches, checked and counted;
* :mod:`~iokernels.testing.poison`: NaN in memory that nobody wrote.

Importing them imports neither Triton nor pytest.
"""
