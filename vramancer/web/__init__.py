"""The front door: HTTP connections to the WSGI application, so that nobody's slowness holds up anybody else."""
