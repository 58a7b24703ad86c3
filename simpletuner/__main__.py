"""``python -m simpletuner``: the same as the ``simpletuner`` command."""

from simpletuner.cli import main

if __name__ == "__main__":
    main()
