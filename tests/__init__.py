"""A package, so that `tests` is found here: torch-fidelity installs one of that name."""
