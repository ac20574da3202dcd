"""Entrances: each translates one protocol to the service and back, nothing else."""
