"""The loop, what is built from a config, optimizer, augmentation, monitoring."""
