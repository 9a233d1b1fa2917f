"""Tables of events: files and data frames, made into streams on disk."""
