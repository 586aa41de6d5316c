"""The commands of the command line, each a thin shell over the functions."""
