"""What trains the bundled demo model: the network, batches, optimizers, checkpoints and the evaluation."""
