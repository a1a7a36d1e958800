"""One file an experiment: `cub` is the paper's recipe, the others say what differs."""
