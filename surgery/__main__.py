"""`python -m surgery`: the command `surgery`."""

from surgery.commands.main import main

if __name__ == "__main__":
    main()
