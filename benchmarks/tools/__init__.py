"""Commands for maintainers: checks on a GPU, and tables of what the compilers make of every kernel."""
