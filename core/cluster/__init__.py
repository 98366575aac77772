"""Several machines as one: stages on other nodes, the master that drives them and the workers that host them."""
