"""VRAMancer's engine: one large language model across devices that do not match."""
