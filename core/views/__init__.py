"""What monitoring shows: typed records built from an engine and its statistics."""
