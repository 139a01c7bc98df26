"""Where pictures of evaluations are kept."""

from latentdiff.metrics.rows import picture_file as picture_file
