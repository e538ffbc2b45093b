"""Utilities without knowledge of models or datasets: errors, files, distributed processes."""
