"""Triton kernels of fastft's operators, one file each: torch and triton only, no fastft.

Every file ends with its launchers, which take what the operator of the same name takes, and
`configurations`, every form in which its kernels can be compiled, for the proofs that need no GPU.
"""
