"""`/openapi.json`, made from the routes themselves, and a page that shows it."""
