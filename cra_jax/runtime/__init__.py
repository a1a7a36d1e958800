"""Devices, hosts, checkpoints, the run directory, signals, progress, files."""
