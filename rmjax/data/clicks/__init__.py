"""Sources of clicks: streams of items of one user each, asked about items."""
