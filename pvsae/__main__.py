"""`python -m pvsae` is the command `pvsae`."""

from pvsae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
