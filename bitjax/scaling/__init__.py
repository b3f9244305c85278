"""Scaling studies: plans and runs, their table, laws fitted to it and what these predict."""
