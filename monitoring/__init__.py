"""What operators of VRAMancer run beside it: Prometheus, Alertmanager, Grafana. docs/monitoring.md says how."""
