"""Readers of datasets: CUB, Cars, ..., folders, CSV, tfds, drawn birds -> records."""
