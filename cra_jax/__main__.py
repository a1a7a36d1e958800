"""`python -m cra_jax` is the command `cra-jax`."""

from cra_jax.command.main import main

if __name__ == "__main__":
    main()
