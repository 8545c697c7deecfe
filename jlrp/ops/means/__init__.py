"""Mean Jacobians: exact finite differences of an operation between two points.

With values v at x and v0 at a reference, D = v - v0, the mean Jacobian M of an
operation f is one with ``M D = f(v) - f(v0)``. Each file holds that of one family:
which activations it reads (``reads``), its transpose (``mean_vjp``), and what it leaves
over (``left_over``), by a formula of its own.
"""
