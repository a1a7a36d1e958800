"""The command `cra-jax`, from a checkout: `launch.py [--config F] [--mode M]`.

Without flags it trains the quickstart. `--help` describes modes and flags.
"""

from cra_jax.command.main import main
from cra_jax.command.modes import MODES
from cra_jax.command.parsing import parse_flags

__all__ = ["MODES", "main", "parse_flags"]

if __name__ == "__main__":
    main()
