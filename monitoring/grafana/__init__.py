"""The Grafana board, and the code that it is generated from."""
