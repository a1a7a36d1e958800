"""The command `cra-jax`: its flags, its help, and the module that runs each mode."""
