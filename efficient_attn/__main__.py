"""`python -m efficient_attn`: the command line."""

from .cli import main

if __name__ == "__main__":
    main()
