"""Solvers made of the operations: masks by ADMM, the best weights on a mask, output matching, and steps of tuning."""
