"""The dashboard for browsers. It knows a server by its public HTTP API alone, wherever that runs."""

from dashboard.board import Dashboard, create_blueprint
from dashboard.gateway import ApiGateway, AppGateway, HttpGateway

__all__ = ["ApiGateway", "AppGateway", "Dashboard", "HttpGateway", "create_blueprint"]
