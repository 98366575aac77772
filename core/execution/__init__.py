"""Running a scheduled batch: stages, attention, sampling."""
