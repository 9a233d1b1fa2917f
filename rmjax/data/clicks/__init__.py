"""Sources of clicks. A stream holds the items of one user, and questions ask about items."""
