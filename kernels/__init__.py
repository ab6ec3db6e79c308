"""Operators with a torch reference each; hardware kernels register beside them."""
