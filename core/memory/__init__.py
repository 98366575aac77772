"""Memory below a device's own: weights that stream in from main memory."""
