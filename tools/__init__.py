"""Programs of this project, each run by a target of the Makefile; ``requirements/`` is what pip installs for all."""
