"""A gate on the machine code (SASS) of the CUDA and Triton kernels. It needs a compiler and no GPU."""
