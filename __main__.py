"""`python -m healthgpt` is the command `healthgpt`; torchrun takes modules."""

from .app.cli import main

main()
