"""Utilities without knowledge of models or datasets: errors, files, command-line arguments, processes."""
