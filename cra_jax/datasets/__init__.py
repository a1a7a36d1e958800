"""What there is to read: CUB, Cars, folders, CSV, tfds, drawn birds -> records."""
