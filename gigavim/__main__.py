"""`python -m gigavim` is `gigavim`."""

from gigavim.cli.main import main

main()
