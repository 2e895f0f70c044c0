"""Training: state, optimizers, the steps of both stages, and the loop that runs them."""
